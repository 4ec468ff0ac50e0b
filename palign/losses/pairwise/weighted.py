"""Weighted preference optimisation: pairs count by how likely the policy is to write them itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_pairs, check_positive
from palign.losses.pairwise.dpo import dpo


def wpo_weights(alignment: Float[Array, "B 2"]) -> Float[Array, " B"]:
    """Weight of a pair: how likely its responses are under the policy, next to what the policy would sample.

    `w = min(1, exp(a_w + a_l))`, no gradient flows through it.

    Args:
        alignment: `[B, 2]`, mean over response tokens of `log p(y_t) - log sum_v p_v^2`, in nats per token, for the
            chosen (column 0) and the rejected (column 1) response (`losses.dense.alignment_logps`). Receives no
            gradient.

    Returns:
        `[B]` between 0 and 1; 1 where the tokens of both responses have, in the geometric mean, at least the
        probability that a sampled token has on average, which is `sum_v p_v^2`.

    Raises:
        ValueError: the shape is not `[B, 2]`.

    References:
        Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization", arXiv 2406.11827, Eq. 2, with sampled
        alignment.

    Notes:
        A greedy token is more likely than a sampled one: with p = (0.4, 0.3, 0.1, 0.1, 0.1) it counts 0.4 / 0.28 =
        1.43. The authors' code and TRL 0.24 clamp the product at 1, as here; TRL 1.16 does not.

    Examples:
        exp(-0.5 - 0.2) = 0.4966; and exp(0.36 + 0.36) = 2.05 is clamped.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.wpo_weights(jnp.array([[-0.5, -0.2], [0.36, 0.36]]))).round(4))
        [0.4966 1.    ]
    """
    check_pairs("wpo_weights", alignment=alignment)
    # Clamped before exp, which then cannot overflow.
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(as_float(alignment).sum(-1), 0.0)))


def wpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    alignment: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """Weighted preference optimisation: DPO on pairs weighted towards what the policy writes itself.

    `L = -w log sigmoid(beta h)`, `w = min(1, exp(a_w + a_l))`, with `rho = policy_logps - ref_logps` and
    `h = rho_w - rho_l`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        alignment: `[B, 2]`, the a of both responses in nats per token (`losses.dense.alignment_logps`). Receives no
            gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses in weighted nats, at least 0. Divide by the number of pairs, not by the sum of the weights.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Zhou et al., arXiv 2406.11827, Eq. 2.

    Notes:
        TRL has it as `use_weighting=True`, without the clamp. Multiply any other pairwise loss by `wpo_weights` for the
        same effect, but not `aot`, whose value for a pair depends on the others.

    Examples:
        The loss of 0.5130 of `dpo` at h = 4, times exp(-0.7) = 0.4966.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(np.asarray(losses.wpo(policy, reference, jnp.array([[-0.5, -0.2]]), beta=0.1)).round(4))
        [0.2548]
    """
    check_pairs("wpo", policy_logps=policy_logps, ref_logps=ref_logps, alignment=alignment)
    check_positive("wpo", beta=beta)
    return wpo_weights(alignment) * dpo(policy_logps, ref_logps, beta=beta)
