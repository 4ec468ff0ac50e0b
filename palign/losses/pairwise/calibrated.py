"""Pairwise losses that ask for more than an order: a finite margin, or a place for each reward of its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import check_between, check_pairs, check_positive, log_ratios, margins


def exo_pair(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    label_smoothing: float | Float[Array, ""] = 1e-3,
) -> Float[Array, " B"]:
    """Efficient exact optimisation on pairs: the reverse KL from the policy's preference to a smoothed label.

    `L = KL(p_theta || p_r)`, with `p_theta = softmax(beta rho_w, beta rho_l)`, `p_r = (1 - eps, eps)` and
    `rho = policy_logps - ref_logps`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        label_smoothing: eps, the probability that the label is wrong, above 0 and at most 1/2.

    Returns:
        `[B]` losses in nats, at least 0 up to rounding: 0 where `beta h = log((1 - eps) / eps)`, the one point where
        the gradient vanishes. Far on the wrong side it tends to log(1 / eps) and its gradient to 0.

    Raises:
        ValueError: a shape is not `[B, 2]`, `beta` is a plain number that is not finite and above 0, or
            `label_smoothing` is a plain number that is not above 0 and at most 1/2.

    References:
        Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment", arXiv 2402.00856, Eq. 16.

    Notes:
        TRL's `exo_pair` is the same and raises at eps = 0. The authors' code has log-labels of (0, -10) that are not
        normalised. The forward KL instead would be conservative DPO, up to the entropy of the label.

    Examples:
        Before training p_theta = (1/2, 1/2). Against (3/4, 1/4): 1/2 log 2/3 + 1/2 log 2 = 0.1438.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros = jnp.zeros((1, 2))
        >>> print(np.asarray(losses.exo_pair(zeros, zeros, label_smoothing=0.25)).round(4))
        [0.1438]
    """
    check_pairs("exo_pair", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("exo_pair", beta=beta, label_smoothing=label_smoothing)
    check_between("exo_pair", 0.0, 0.5, label_smoothing=label_smoothing)
    gaps = beta * margins(log_ratios(policy_logps, ref_logps))
    chosen = jax.nn.sigmoid(gaps) * (-jax.nn.softplus(-gaps) - jnp.log1p(-label_smoothing))
    rejected = jax.nn.sigmoid(-gaps) * (-jax.nn.softplus(gaps) - jnp.log(label_smoothing))
    return chosen + rejected


def nca_pair(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """Noise contrastive alignment on pairs: each response is told from the reference's samples, the chosen one upwards.

    `L = -log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l)`, with
    `r = beta (policy_logps - ref_logps)`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses in nats; 2 log 2 where the policy equals the reference. The chosen reward has its optimum at
        log 2, so that it cannot fall with the rejected one.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369.

    Notes:
        The absolute rewards count: a constant added to both log-ratios changes the loss, and no log Z cancels. TRL and
        EasyDeL have it as `nca_pair`.

    Examples:
        Rewards of 0.2 and -0.2: 0.5981 + 0.7981 / 2 + 0.5981 / 2 = 1.2963.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(np.asarray(losses.nca_pair(policy, reference, beta=0.1)).round(4))
        [1.2963]
    """
    chosen, rejected = _rewards("nca_pair", policy_logps, ref_logps, beta)
    return jax.nn.softplus(-chosen) + 0.5 * (jax.nn.softplus(chosen) + jax.nn.softplus(rejected))


def apo_zero(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """Anchored preference optimisation, zero: the chosen response goes up and the rejected one down.

    `L = (1 - sigmoid(r_w)) + sigmoid(r_l)`, with `r = beta (policy_logps - ref_logps)`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses between 0 and 2, without unit; 1 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions: Addressing
        Underspecification in Alignment", arXiv 2408.06266, Eq. 7.

    Notes:
        Meant for chosen responses better than what the model writes itself; `apo_down` is for worse ones. It is KTO
        with its KL term at 0, on pairs.

    Examples:
        Rewards of 0.2 and -0.2: (1 - 0.5498) + 0.4502 = 0.9003.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(np.asarray(losses.apo_zero(policy, reference, beta=0.1)).round(4))
        [0.9003]
    """
    chosen, rejected = _rewards("apo_zero", policy_logps, ref_logps, beta)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """Anchored preference optimisation, down: both responses go down, the rejected one further.

    `L = sigmoid(r_w) + (1 - sigmoid(r_w - r_l))`, with `r = beta (policy_logps - ref_logps)`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses between 0 and 2, without unit; 1 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        D'Oosterlinck et al., arXiv 2408.06266, Eq. 8.

    Notes:
        Meant for chosen responses worse than what the model writes itself. TRL's `apo_down` is the same.

    Examples:
        Rewards of 0.2 and -0.2: 0.5498 + (1 - sigmoid(0.4)) = 0.5498 + 0.4013 = 0.9511.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(np.asarray(losses.apo_down(policy, reference, beta=0.1)).round(4))
        [0.9511]
    """
    chosen, rejected = _rewards("apo_down", policy_logps, ref_logps, beta)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def sppo_hard(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 1e-3
) -> Float[Array, " B"]:
    """Self-play preference optimisation with hard labels: each log-ratio is regressed on a target of its own.

    `L = (rho_w - 1 / (2 beta))^2 + (rho_l + 1 / (2 beta))^2`, with `rho = policy_logps - ref_logps`: the probabilities
    of winning are 1 and 0, and the targets `(P - 1/2) / beta`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the reference, which is the policy of the round before. Receives no
            gradient.
        beta: the paper's 1 / eta, above 0; the targets are 1 / (2 beta) nats away.

    Returns:
        `[B]` losses in squared nats, at least 0; 0 at `rho = (1, -1) / (2 beta)`, and `1 / (2 beta^2)` where the policy
        equals the reference: 500000 at the default.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Wu et al., "Self-Play Preference Optimization for Language Model Alignment", arXiv 2405.00675, with
        probabilities of winning of 1 and 0.

    Notes:
        Without the factor 1/2 of the authors' code, as TRL's `sppo_hard`; the gradient is then twice theirs.

    Examples:
        Targets of 5 and -5, log-ratios of 2 and -2: (2 - 5)^2 + (-2 + 5)^2 = 18.

        >>> import jax.numpy as jnp
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(losses.sppo_hard(policy, reference, beta=0.1))
        [18.]
    """
    check_pairs("sppo_hard", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("sppo_hard", beta=beta)
    ratios, target = log_ratios(policy_logps, ref_logps), 1 / (2 * beta)
    return (ratios[:, 0] - target) ** 2 + (ratios[:, 1] + target) ** 2


def _rewards(
    loss: str, policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float | Float[Array, ""]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Return `beta rho` of the chosen and of the rejected responses."""
    check_pairs(loss, policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive(loss, beta=beta)
    rewards = beta * log_ratios(policy_logps, ref_logps)
    return rewards[:, 0], rewards[:, 1]
