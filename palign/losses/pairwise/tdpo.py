"""Token-level DPO: the policy may not drift from the reference anywhere in the vocabulary, token by token."""

import jax
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_between, check_pairs, check_positive, log_ratios, margins


def tdpo1(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    sequence_kl: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """Token-level DPO, first form: DPO less the difference of the two responses' forward KL divergences.

    `L = -log sigmoid(beta (h - (D_l - D_w)))`, with `rho = policy_logps - ref_logps`, `h = rho_w - rho_l` and
    `D = sum_t KL(pi_ref(. | s_t) || pi_theta(. | s_t))` over the response tokens.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        sequence_kl: `[B, 2]`, the divergences D in nats, at least 0, reference first, over the whole vocabulary
            (`losses.dense.sequence_kl`). Gradient flows through both columns.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses in nats, at least 0; exactly log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Zeng et al., "Token-level Direct Preference Optimization", arXiv 2404.11999.

    Notes:
        The chosen response's divergence enters with a plus: this form rewards drift on it. `tdpo2` does not. The
        authors' code takes the logarithm of a softmax for the reference, which is minus infinity where it underflows.

    Examples:
        h = 4 and divergences of 1 and 3: 4 - (3 - 1) = 2, and log(1 + exp(-0.2)) = 0.5981.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(np.asarray(losses.tdpo1(policy, reference, jnp.array([[1.0, 3.0]]), beta=0.1)).round(4))
        [0.5981]
    """
    check_pairs("tdpo1", policy_logps=policy_logps, ref_logps=ref_logps, sequence_kl=sequence_kl)
    check_positive("tdpo1", beta=beta)
    divergence = as_float(sequence_kl)
    return jax.nn.softplus(-beta * (margins(log_ratios(policy_logps, ref_logps)) + margins(divergence)))


def tdpo2(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    sequence_kl: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    alpha: float | Float[Array, ""] = 0.5,
) -> Float[Array, " B"]:
    """Token-level DPO, second form: the chosen response's divergence is a baseline that gets no gradient.

    `L = -log sigmoid(beta (h - alpha (D_l - stop_gradient(D_w))))`, with `rho = policy_logps - ref_logps`,
    `h = rho_w - rho_l` and `D = sum_t KL(pi_ref(. | s_t) || pi_theta(. | s_t))` over the response tokens.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        sequence_kl: `[B, 2]`, the divergences D in nats, at least 0, reference first, over the whole vocabulary
            (`losses.dense.sequence_kl`). Gradient flows through column 1 only.
        beta: strength of the tie to the reference, per nat, above 0.
        alpha: weight of the divergences, at least 0; 0 is `dpo`.

    Returns:
        `[B]` losses in nats, at least 0; exactly log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, `beta` is a plain number that is not finite and above 0, or `alpha` is a
            plain number that is not finite and at least 0.

    References:
        Zeng et al., arXiv 2404.11999.

    Notes:
        This is the authors' default, with alpha = 0.5. TRL, tunix and EasyDeL have neither form.

    Examples:
        h = 4 and divergences of 1 and 3: 4 - 0.5 * (3 - 1) = 3, and log(1 + exp(-0.3)) = 0.5544.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(np.asarray(losses.tdpo2(policy, reference, jnp.array([[1.0, 3.0]]), beta=0.1)).round(4))
        [0.5544]
    """
    check_pairs("tdpo2", policy_logps=policy_logps, ref_logps=ref_logps, sequence_kl=sequence_kl)
    check_positive("tdpo2", beta=beta)
    check_between("tdpo2", 0.0, float("inf"), alpha=alpha)
    divergence = as_float(sequence_kl)
    drift = divergence[:, 1] - jax.lax.stop_gradient(divergence[:, 0])
    return jax.nn.softplus(-beta * (margins(log_ratios(policy_logps, ref_logps)) - alpha * drift))
