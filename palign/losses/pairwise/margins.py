"""DPO with another zero, another margin or another beta per pair: scaled reference, offset, reward-dependent beta."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_between, check_pairs, check_positive, log_ratios, margins


def scaled_dpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    gamma: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """DPO whose reference counts gamma times: between DPO and a loss without reference.

    `L = -log sigmoid(beta (logp_w - logp_l - gamma (ref_w - ref_l)))`. With gamma < 1 a policy must rank a pair more by
    itself, where DPO is content with having improved on the reference.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: reward per nat, above 0.
        gamma: weight of the reference: 1 is `dpo`, 0 has no reference.

    Returns:
        `[B]` losses in nats, at least 0. Where the policy equals the reference it is log 2 only for gamma = 1.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings", arXiv 2405.19534: the loss
        DPO^gamma.

    Notes:
        TRL, tunix and EasyDeL do not have it.

    Examples:
        The policy puts the chosen response 4 nats ahead; the reference has it 2 nats behind and counts half:
        0.1 * (4 + 0.5 * 2) = 0.5, and log(1 + exp(-0.5)) = 0.4741.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-13.0, -11.0]])
        >>> print(np.asarray(losses.scaled_dpo(policy, reference, beta=0.1, gamma=0.5)).round(4))
        [0.4741]
    """
    check_pairs("scaled_dpo", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("scaled_dpo", beta=beta)
    # Not log_ratios of gamma * ref_logps: that would also stop the gradient of a traced gamma.
    reference = jax.lax.stop_gradient(as_float(ref_logps))
    return jax.nn.softplus(-beta * margins(as_float(policy_logps) - gamma * reference))


def margin_dpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    scores: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    alpha: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """DPO with an offset: a pair whose scores lie further apart must be further apart in the policy.

    `L = -log sigmoid(beta h - alpha (score_w - score_l))`, with `rho = policy_logps - ref_logps` and
    `h = rho_w - rho_l`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        scores: `[B, 2]`, for example of a reward model; higher is better, only the difference counts. Receives no
            gradient. For an offset that is another function f of the gap, such as its logarithm, pass `[f(gap), 0]`.
        beta: strength of the tie to the reference, per nat, above 0.
        alpha: reward per unit of score; 0 is `dpo`.

    Returns:
        `[B]` losses in nats, at least 0; log 2 at `beta h = alpha (score_w - score_l)`.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Amini, Vieira and Cotterell, "Direct Preference Optimization with an Offset", arXiv 2402.10571.

    Notes:
        The paper's offset is alpha times an increasing function of the score gap; here it is the gap itself.

    Examples:
        Both pairs have beta h = 0.1 * 4 = 0.4. Equal scores give DPO's log(1 + exp(-0.4)) = 0.513; a gap of 2 asks for
        more, log(1 + exp(-(0.4 - 0.5 * 2))) = 1.0375.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0]] * 2), jnp.full((2, 2), -12.0)
        >>> scores = jnp.array([[3.0, 3.0], [5.0, 3.0]])
        >>> print(np.asarray(losses.margin_dpo(policy, reference, scores, beta=0.1, alpha=0.5)).round(4))
        [0.513  1.0375]
    """
    check_pairs("margin_dpo", policy_logps=policy_logps, ref_logps=ref_logps, scores=scores)
    check_positive("margin_dpo", beta=beta)
    h = margins(log_ratios(policy_logps, ref_logps))
    return jax.nn.softplus(alpha * _score_gaps(scores).astype(h.dtype) - beta * h)


def mm_dpo_beta(
    scores: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    weight: float | Float[Array, ""] = 0.1,
    rate: float | Float[Array, ""] = 0.5,
) -> Float[Array, " B"]:
    """Beta of each pair in `mm_dpo`: it grows with the score gap, and is bounded.

    `beta(delta) = beta (1 + weight (1 - exp(-rate delta)))`, with `delta = max(0, score_w - score_l)`.

    Args:
        scores: `[B, 2]`, of the chosen (column 0) and the rejected (column 1) response under a reward model; higher is
            better. A pair whose chosen response scores lower has delta = 0. Receives no gradient.
        beta: value at delta = 0, per nat, above 0.
        weight: by how much of itself beta grows at most, at least 0.
        rate: how fast it grows, per unit of score, above 0.

    Returns:
        `[B]` values from `beta` to `(1 + weight) beta`.

    Raises:
        ValueError: the shape is not `[B, 2]`, `beta` or `rate` is a plain number that is not finite and above 0, or
            `weight` is one below 0.

    References:
        Zhang et al., "MM-RLHF: The Next Step Forward in Multimodal LLM Alignment", arXiv 2502.10391: the dynamic
        reward scaling of MM-DPO.

    Notes:
        The paper's formula. The authors' code by default replaces it by one value for the whole batch, made from a
        random subsample of the margins h.

    Examples:
        A gap of 0 leaves 0.1. A gap of 2 log 2 = 1.3863 at rate 0.5 goes half the way, 1 - exp(-log 2) = 0.5, to
        0.1 * (1 + 0.4 * 0.5) = 0.12. A gap of 100 goes all the way, to 0.14.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> scores = jnp.array([[1.0, 1.0], [1.3863, 0.0], [100.0, 0.0]])
        >>> print(np.asarray(losses.mm_dpo_beta(scores, beta=0.1, weight=0.4, rate=0.5)).round(4))
        [0.1  0.12 0.14]
    """
    check_pairs("mm_dpo_beta", scores=scores)
    _check_curve("mm_dpo_beta", beta, weight, rate)
    return _curve(scores, beta, weight, rate)


def mm_dpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    scores: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    weight: float | Float[Array, ""] = 0.1,
    rate: float | Float[Array, ""] = 0.5,
) -> Float[Array, " B"]:
    """DPO with a larger beta for pairs that a reward model finds clearer.

    `L = -log sigmoid(beta(delta) h)`, with `rho = policy_logps - ref_logps`, `h = rho_w - rho_l` and
    `beta(delta) = beta (1 + weight (1 - exp(-rate delta)))` of `delta = max(0, score_w - score_l)`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        scores: `[B, 2]`, of the two responses under a reward model; higher is better. Receives no gradient.
        beta: beta of a pair with equal scores, per nat, above 0.
        weight: by how much of itself beta grows at most, at least 0; 0 is `dpo`.
        rate: how fast it grows, per unit of score, above 0.

    Returns:
        `[B]` losses in nats, at least 0; log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, `beta` or `rate` is a plain number that is not finite and above 0, or
            `weight` is one below 0.

    References:
        Zhang et al., "MM-RLHF: The Next Step Forward in Multimodal LLM Alignment", arXiv 2502.10391: the dynamic
        reward scaling of MM-DPO.

    Notes:
        The paper's formula, see `mm_dpo_beta`. The authors' script has beta = 0.1 and weight = 0.1; `rate` must suit
        the scale of the scores. TRL, tunix and EasyDeL do not have it.

    Examples:
        h = 4 in both pairs. Equal scores: beta stays 0.1 and log(1 + exp(-0.4)) = 0.513. A gap of 100 with weight 0.5:
        beta is 0.15, and log(1 + exp(-0.6)) = 0.4375.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0]] * 2), jnp.full((2, 2), -12.0)
        >>> scores = jnp.array([[1.0, 1.0], [100.0, 0.0]])
        >>> print(np.asarray(losses.mm_dpo(policy, reference, scores, beta=0.1, weight=0.5, rate=0.5)).round(4))
        [0.513  0.4375]
    """
    check_pairs("mm_dpo", policy_logps=policy_logps, ref_logps=ref_logps, scores=scores)
    _check_curve("mm_dpo", beta, weight, rate)
    h = margins(log_ratios(policy_logps, ref_logps))
    return jax.nn.softplus(-_curve(scores, beta, weight, rate).astype(h.dtype) * h)


def _score_gaps(scores: Float[Array, "B 2"]) -> Float[Array, " B"]:
    """Return `score_w - score_l`; scores are data, so no gradient reaches them."""
    return jax.lax.stop_gradient(margins(as_float(scores)))


def _check_curve(
    loss: str, beta: float | Float[Array, ""], weight: float | Float[Array, ""], rate: float | Float[Array, ""]
) -> None:
    """Raise ValueError for plain numbers with which beta(delta) would fall or have no bound."""
    check_positive(loss, beta=beta, rate=rate)
    check_between(loss, 0.0, float("inf"), weight=weight)


def _curve(
    scores: Float[Array, "B 2"],
    beta: float | Float[Array, ""],
    weight: float | Float[Array, ""],
    rate: float | Float[Array, ""],
) -> Float[Array, " B"]:
    """Return `beta(delta)`: see `mm_dpo_beta`."""
    gaps = jnp.maximum(_score_gaps(scores), 0)
    return beta * (1 - weight * jnp.expm1(-rate * gaps))
