"""DiscoPOP: a loss that a language model proposed and that did well when tried."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import check_pairs, check_positive, log_ratios, margins

# exp overflows float32 at 88.7.
_LARGEST_EXPONENT = 80.0


def discopop(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.05,
    temperature: float | Float[Array, ""] = 0.05,
) -> Float[Array, " B"]:
    """Log-ratio modulated loss: logistic where the pair is wrong, exponential where it is right.

    `L = (1 - sigmoid(x / tau)) (-log sigmoid(x)) + sigmoid(x / tau) exp(-x)`, with `x = beta h`,
    `rho = policy_logps - ref_logps` and `h = rho_w - rho_l`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        temperature: tau, the width in units of x over which one loss passes into the other, above 0.

    Returns:
        `[B]` losses in nats, at least 0; (log 2 + 1) / 2 = 0.8466 where the policy equals the reference. Not convex:
        at tau = 0.05 it rises a little from there before it falls. The second term is taken as one exponential, which
        cannot overflow for tau up to 1; beyond, its exponent is clamped at 80, just short of float32's limit.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` or `temperature` is a plain number that is not finite and
            above 0.

    References:
        Lu et al., "Discovering Preference Optimization Algorithms with and for Large Language Models",
        arXiv 2406.08414, Eq. 5.

    Notes:
        TRL's `discopop` takes exp(-x) by itself, which overflows. EasyDeL fixes tau at 1.

    Examples:
        h = 2, so x = 0.1 and x / tau = 2: (1 - 0.8808) * 0.6444 + 0.8808 * 0.9048 = 0.8738.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-11.0, -13.0]])
        >>> print(np.asarray(losses.discopop(policy, reference, beta=0.05, temperature=0.05)).round(4))
        [0.8738]
    """
    check_pairs("discopop", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("discopop", beta=beta, temperature=temperature)
    gaps = beta * margins(log_ratios(policy_logps, ref_logps))
    logistic = jax.nn.sigmoid(-gaps / temperature) * jax.nn.softplus(-gaps)
    exponent = -jax.nn.softplus(-gaps / temperature) - gaps
    return logistic + jnp.exp(jnp.minimum(exponent, _LARGEST_EXPONENT))
