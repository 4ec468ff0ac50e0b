"""Supervised losses from f-divergences, a reconstruction and not the paper's letter: SFT that knows where to stop.

The equations were derived from the conjugate form that the abstract of "Implicit Reward as the Bridge" (arXiv
2507.00018) describes; their constants were not compared with the paper's. Do not report numbers as the paper's method.

All are `L = -phi(u)` of the implicit reward `u = beta (policy_logps - ref_logps)` of a demonstration. Supervised
fine-tuning has phi(u) = u: the same pull however far the policy has gone. A concave phi pulls less the higher u is.

Some phi end at a finite u, where their slope is infinite. A demonstration can lie beyond: so each loss goes on, from a
distance of 0.1 before that end, along its tangent. Value and gradient are then continuous, finite, and never 0.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import check_positive, check_same_shape, log_ratios

_EDGE = 0.1  # distance in u from the end of phi's domain at which the tangent takes over
_LOWEST_EXPONENT = -70.0  # exp(70) times a reward of 1e4 still fits in float32


def f_sft_chi2(
    policy_logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, "*shape"]:
    """Supervised loss from Pearson's chi-squared divergence: a parabola with its rest at u = 2.

    `L = -u + u^2 / 4`, with `u = beta (policy_logps - ref_logps)`. Its gradient is SFT's times `beta (1 - u / 2)`.

    Args:
        policy_logps: any shape, log-probabilities of demonstrations under the policy, in nats: one per token, or sums
            over responses.
        ref_logps: the same shape, under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        The shape of the arguments; at least -1, and 0 where the policy equals the reference. Nothing is reduced.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number that is not finite and above 0.

    References:
        After "Implicit Reward as the Bridge", arXiv 2507.00018; see the module's first line.

    Notes:
        No tangent: the parabola is defined everywhere. Beyond u = 2 demonstrations become less likely again.

    Examples:
        u = 0.1 * 10 = 1: -1 + 1/4.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.losses import experimental
        >>> print(np.asarray(experimental.f_sft_chi2(jnp.array([-10.0]), jnp.array([-20.0]), beta=0.1)).round(4))
        [-0.75]
    """
    u = _rewards("f_sft_chi2", policy_logps, ref_logps, beta)
    return jnp.square(u) / 4 - u


def f_sft_hellinger(
    policy_logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, "*shape"]:
    """Supervised loss from the squared Hellinger distance: bounded gains, steep losses.

    `L = -u / (1 + u)`, with `u = beta (policy_logps - ref_logps)`. Its gradient is SFT's times `beta / (1 + u)^2`.

    Args:
        policy_logps: any shape, log-probabilities of demonstrations under the policy, in nats: one per token, or sums
            over responses.
        ref_logps: the same shape, under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        The shape of the arguments; above -1, and 0 where the policy equals the reference. Nothing is reduced.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number that is not finite and above 0.

    References:
        After "Implicit Reward as the Bridge", arXiv 2507.00018; see the module's first line.

    Notes:
        The formula ends at u = -1. Below u = -0.9 the loss is its tangent, of slope -100.

    Examples:
        u = 0.1 * 10 = 1: -1/2. At u = -0.9 it is 9, and at u = -1 on the tangent 9 + 100 * 0.1.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.losses import experimental
        >>> policy = jnp.array([-10.0, -29.0, -30.0])
        >>> print(np.asarray(experimental.f_sft_hellinger(policy, jnp.full(3, -20.0), beta=0.1)).round(3))
        [-0.5  9.  19. ]
    """
    u = _rewards("f_sft_hellinger", policy_logps, ref_logps, beta)
    return _with_tangent(lambda u: -u / (1 + u), u, lowest=_EDGE - 1, slope=-1 / _EDGE**2)


def f_sft_reverse_kl(
    policy_logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, "*shape"]:
    """Supervised loss from the reverse KL divergence: exponential in the shortfall.

    `L = exp(-(u + 1))`, with `u = beta (policy_logps - ref_logps)`. Its gradient is SFT's times `beta L`.

    Args:
        policy_logps: any shape, log-probabilities of demonstrations under the policy, in nats: one per token, or sums
            over responses.
        ref_logps: the same shape, under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        The shape of the arguments; above 0, and 1/e where the policy equals the reference. Nothing is reduced.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number that is not finite and above 0.

    References:
        After "Implicit Reward as the Bridge", arXiv 2507.00018; see the module's first line.

    Notes:
        At the reference the gradient is SFT's times beta / e, not times beta as for the other divergences without an
        edge there. Below u + 1 = -70, where float32 is about to overflow, the loss is its tangent.

    Examples:
        u = 0.1 * 10 = 1: exp(-2) = 0.1353.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.losses import experimental
        >>> print(np.asarray(experimental.f_sft_reverse_kl(jnp.array([-10.0]), jnp.array([-20.0]), beta=0.1)).round(4))
        [0.1353]
    """
    exponent = _rewards("f_sft_reverse_kl", policy_logps, ref_logps, beta) + 1
    slope = -jnp.exp(jnp.asarray(-_LOWEST_EXPONENT, exponent.dtype))
    return _with_tangent(lambda exponent: jnp.exp(-exponent), exponent, lowest=_LOWEST_EXPONENT, slope=slope)


def f_sft_forward_kl(
    policy_logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, "*shape"]:
    """Supervised loss from the forward KL divergence: logarithmic in the implicit reward.

    `L = -1 - log u`, with `u = beta (policy_logps - ref_logps)`. Its gradient is SFT's times `beta / u`.

    Args:
        policy_logps: any shape, log-probabilities of demonstrations under the policy, in nats: one per token, or sums
            over responses.
        ref_logps: the same shape, under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        The shape of the arguments; falls without bound, ever more slowly. log 10 = 2.3026 where the policy equals the
        reference, which is on the tangent. Nothing is reduced.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number that is not finite and above 0.

    References:
        After "Implicit Reward as the Bridge", arXiv 2507.00018; see the module's first line.

    Notes:
        The formula ends at u = 0, where training starts: below u = 0.1 the loss is its tangent, of slope -10. So it
        begins as SFT with 10 times the pull of the chi-squared loss, until u has passed 0.1.

    Examples:
        u = 0.1 * 10 = 1: -1. At u = 0.1 it is -1 + log 10 = 1.3026, and at u = 0 on the tangent 1 more.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.losses import experimental
        >>> policy = jnp.array([-10.0, -19.0, -20.0])
        >>> print(np.asarray(experimental.f_sft_forward_kl(policy, jnp.full(3, -20.0), beta=0.1)).round(4))
        [-1.      1.3026  2.3026]
    """
    u = _rewards("f_sft_forward_kl", policy_logps, ref_logps, beta)
    return _with_tangent(lambda u: -1 - jnp.log(u), u, lowest=_EDGE, slope=-1 / _EDGE)


def f_sft_js(
    policy_logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, "*shape"]:
    """Supervised loss from the Jensen-Shannon divergence: gains fade exponentially.

    `L = -log(2 - exp(-u))`, with `u = beta (policy_logps - ref_logps)`. Its gradient is SFT's times
    `beta / (2 exp(u) - 1)`.

    Args:
        policy_logps: any shape, log-probabilities of demonstrations under the policy, in nats: one per token, or sums
            over responses.
        ref_logps: the same shape, under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        The shape of the arguments; above -log 2, and 0 where the policy equals the reference. Nothing is reduced.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number that is not finite and above 0.

    References:
        After "Implicit Reward as the Bridge", arXiv 2507.00018; see the module's first line.

    Notes:
        The formula ends at u = -log 2. Below u = 0.1 - log 2 = -0.5931 the loss is its tangent, of slope
        -1 / (exp(0.1) - 1) = -9.508.

    Examples:
        u = 0.1 * 10 = 1: -log(2 - 0.3679) = -0.4899.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.losses import experimental
        >>> print(np.asarray(experimental.f_sft_js(jnp.array([-10.0]), jnp.array([-20.0]), beta=0.1)).round(4))
        [-0.4899]
    """
    u = _rewards("f_sft_js", policy_logps, ref_logps, beta)
    lowest, slope = _EDGE - math.log(2), -1 / math.expm1(_EDGE)
    return _with_tangent(lambda u: -jnp.log1p(-jnp.expm1(-u)), u, lowest=lowest, slope=slope)


def _rewards(loss: str, policy_logps: Array, ref_logps: Array, beta: float | Array) -> Float[Array, "*shape"]:
    """Return the implicit rewards `u` of checked arguments."""
    check_same_shape(loss, policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive(loss, beta=beta)
    return beta * log_ratios(policy_logps, ref_logps)


def _with_tangent(
    loss: Callable[[Array], Array], u: Float[Array, "*shape"], *, lowest: float, slope: float | Float[Array, ""]
) -> Float[Array, "*shape"]:
    """Return `loss(u)` down to `lowest`, and below the line of that slope which meets it there."""
    return loss(jnp.maximum(u, lowest)) + slope * jnp.minimum(u - lowest, 0.0)
