"""DPO that does not learn to be long: per-token rewards, a penalty on length, or a discounted tail."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from palign.losses.checks import check_between, check_pairs, check_positive, log_ratios, margins


def ln_dpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    lengths: Int[Array, "B 2"] | Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 5.0,
) -> Float[Array, " B"]:
    """Length-normalised DPO: the log-ratio of each response is divided by its number of tokens.

    `L = -log sigmoid(beta (rho_w / |y_w| - rho_l / |y_l|))`, with `rho = policy_logps - ref_logps`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, *summed* over response tokens: the division is made here.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        lengths: `[B, 2]`, numbers of response tokens, the end of turn included; integers or floats. An empty response
            counts as one token.
        beta: reward per nat per token, above 0. About a response length larger than a good beta for `dpo`.

    Returns:
        `[B]` losses in nats, at least 0; log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Lambert et al., "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", arXiv 2411.15124, Eq. 6.

    Notes:
        TRL has it as `sigmoid_norm`; tunix and EasyDeL do not. It is `dpo` of `losses.dense.average_logps`, and `simpo`
        with gamma = 0 where the reference gives every response the same log-probability per token.

    Examples:
        The chosen response gained 2 nats over 4 tokens, the rejected one lost 1 over 2: 5 * (0.5 + 0.5) = 5, and
        log(1 + exp(-5)) = 0.0067.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -13.0]]), jnp.array([[-12.0, -12.0]])
        >>> print(np.asarray(losses.ln_dpo(policy, reference, jnp.array([[4, 2]]), beta=5.0)).round(4))
        [0.0067]
    """
    check_pairs("ln_dpo", policy_logps=policy_logps, ref_logps=ref_logps, lengths=lengths)
    check_positive("ln_dpo", beta=beta)
    ratios = log_ratios(policy_logps, ref_logps)
    tokens = jnp.maximum(_tokens(lengths, ratios), 1)
    return jax.nn.softplus(-beta * margins(ratios / tokens))


def r_dpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    lengths: Int[Array, "B 2"] | Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    alpha: float | Float[Array, ""] = 0.05,
) -> Float[Array, " B"]:
    """Length-regularised DPO: as if every response's reward had been lowered by alpha for each of its tokens.

    `L = -log sigmoid(beta h + alpha (|y_w| - |y_l|))`, with `rho = policy_logps - ref_logps` and
    `h = rho_w - rho_l`. A policy that maximises `r - alpha |y|` has `r = beta rho + alpha |y|` up to a term of the
    prompt, hence the plus: a preference for the longer response is explained by its length already and moves the
    policy less, one for the shorter response moves it more.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        lengths: `[B, 2]`, numbers of response tokens; integers or floats. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        alpha: penalty in units of reward per token; 0 is `dpo`.

    Returns:
        `[B]` losses in nats, at least 0; log(1 + exp(-alpha (|y_w| - |y_l|))) where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Park et al., "Disentangling Length from Quality in Direct Preference Optimization", arXiv 2403.19159.

    Notes:
        TRL, tunix and EasyDeL do not have it.

    Examples:
        beta h = 0.1 * 4 = 0.4 either way. Chosen is 8 tokens longer: log(1 + exp(-(0.4 + 0.4))) = 0.3711. Chosen is 8
        tokens shorter: log(1 + exp(-(0.4 - 0.4))) = 0.6931.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0]] * 2), jnp.full((2, 2), -12.0)
        >>> lengths = jnp.array([[20, 12], [12, 20]])
        >>> print(np.asarray(losses.r_dpo(policy, reference, lengths, beta=0.1, alpha=0.05)).round(4))
        [0.3711 0.6931]
    """
    check_pairs("r_dpo", policy_logps=policy_logps, ref_logps=ref_logps, lengths=lengths)
    check_positive("r_dpo", beta=beta)
    ratios = log_ratios(policy_logps, ref_logps)
    return jax.nn.softplus(-(beta * margins(ratios) + alpha * margins(_tokens(lengths, ratios))))


def ld_dpo(
    policy_shared: Float[Array, "B 2"],
    policy_tail: Float[Array, "B 2"],
    ref_shared: Float[Array, "B 2"],
    ref_tail: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    alpha: float | Float[Array, ""] = 0.5,
) -> Float[Array, " B"]:
    """Length-desensitised DPO: what the longer response has beyond the shorter one's length counts less.

    `L = -log sigmoid(beta h)`, with `rho = rho_shared + alpha rho_tail` and `h = rho_w - rho_l`. `shared` is the
    first min(|y_w|, |y_l|) tokens of each response, `tail` the rest.

    Args:
        policy_shared: `[B, 2]`, log-probabilities of the first min(|y_w|, |y_l|) tokens of the chosen (column 0) and
            the rejected (column 1) response under the policy, in nats, summed.
        policy_tail: `[B, 2]`, those of the remaining tokens, summed: 0 for the shorter response.
        ref_shared: `[B, 2]`, as `policy_shared` under the frozen reference. Receives no gradient.
        ref_tail: `[B, 2]`, as `policy_tail` under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        alpha: weight of the tail from 0 (cut both responses to the shorter length) to 1 (`dpo`).

    Returns:
        `[B]` losses in nats, at least 0; log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, `beta` is a plain number that is not finite and above 0, or `alpha` is one
            outside [0, 1].

    References:
        Liu et al., "Length Desensitization in Direct Preference Optimization", arXiv 2409.06411.

    Notes:
        TRL has it as the setting `ld_alpha` of its DPO trainer; tunix and EasyDeL do not have it.

    Examples:
        The chosen response is the longer one: it gained 2 nats in the shared part and 4 in its tail, of which half
        count; the rejected one did not change. beta h = 0.1 * (2 + 0.5 * 4) = 0.4, and log(1 + exp(-0.4)) = 0.513.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> shared, tail = jnp.array([[-10.0, -12.0]]), jnp.array([[-4.0, 0.0]])
        >>> ref_shared, ref_tail = jnp.array([[-12.0, -12.0]]), jnp.array([[-8.0, 0.0]])
        >>> print(np.asarray(losses.ld_dpo(shared, tail, ref_shared, ref_tail, beta=0.1, alpha=0.5)).round(4))
        [0.513]
    """
    check_pairs(
        "ld_dpo", policy_shared=policy_shared, policy_tail=policy_tail, ref_shared=ref_shared, ref_tail=ref_tail
    )
    check_positive("ld_dpo", beta=beta)
    check_between("ld_dpo", 0.0, 1.0, alpha=alpha)
    ratios = log_ratios(policy_shared, ref_shared) + alpha * log_ratios(policy_tail, ref_tail)
    return jax.nn.softplus(-beta * margins(ratios))


def _tokens(lengths: Array, ratios: Float[Array, "B 2"]) -> Float[Array, "B 2"]:
    """Return lengths in the type of the log-ratios; they are data, so no gradient reaches them."""
    return jax.lax.stop_gradient(jnp.asarray(lengths).astype(ratios.dtype))
