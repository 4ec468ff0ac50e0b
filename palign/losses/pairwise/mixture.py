"""Bias-variance optimised preference optimisation (BVPO): the loss with a sampled reasoning trace and that without."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_between, check_same_shape, check_scalars, check_shape


def bvpo(
    trace_losses: Float[Array, "*shape"],
    empty_losses: Float[Array, "*shape"],
    *,
    alpha: float | Float[Array, ""] = 0.5,
) -> Float[Array, "*shape"]:
    """Bias-variance optimised preference optimisation: mixes a loss on sampled traces with one on empty traces.

    `L = alpha L_t + (1 - alpha) L_e`, so that the gradients are mixed in the same way.

    Args:
        trace_losses: losses of pairs whose responses are trace and answer, by any pairwise loss on the joint
            log-probabilities, the trace's tokens included. An unbiased look at reasoning, but noisy.
        empty_losses: the same shape, the same loss on pairs with an empty trace, from a preference set of their own.
        alpha: the weight of the trace, from 0 to 1. The default is ours.

    Returns:
        The shape of the arguments, in their unit; `trace_losses` at alpha = 1, `empty_losses` at 0.

    Raises:
        ValueError: the shapes differ, or `alpha` is a plain number outside [0, 1].

    References:
        Zhu et al., "From Noisy Traces to Stable Gradients: Bias-Variance Optimized Preference Optimization for Aligning
        Large Reasoning Models", arXiv 2510.05095.

    Notes:
        The alpha of the paper's experiments is not known to us. `bvpo_weight` has its optimum, for those who can
        estimate the moments. TRL, tunix and EasyDeL do not have it.

    Examples:
        A quarter of 0.8 and three quarters of 0.4.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.bvpo(jnp.array([0.8]), jnp.array([0.4]), alpha=0.25)).round(4))
        [0.5]
    """
    check_same_shape("bvpo", trace_losses=trace_losses, empty_losses=empty_losses)
    check_between("bvpo", 0.0, 1.0, alpha=alpha)
    return alpha * as_float(trace_losses) + (1 - alpha) * as_float(empty_losses)


def bvpo_weight(
    trace_bias: Float[Array, " D"],
    empty_bias: Float[Array, " D"],
    trace_variance: Float[Array, ""],
    empty_variance: Float[Array, ""],
    covariance: Float[Array, ""],
) -> Float[Array, ""]:
    """Alpha at which the mixed gradient has the smallest mean squared error.

    `alpha* = clip((b_e . (b_e - b_t) + S_e - S_te) / (|b_t - b_e|^2 + S_t + S_e - 2 S_te), 0, 1)`, the minimum of
    `MSE(alpha) = |alpha b_t + (1 - alpha) b_e|^2 + alpha^2 S_t + (1 - alpha)^2 S_e + 2 alpha (1 - alpha) S_te`.

    Args:
        trace_bias: `[D]`, b_t, the mean of the trace-based gradient less the gradient of the marginal objective.
        empty_bias: `[D]`, b_e, the same for the empty-trace gradient.
        trace_variance: `[]`, S_t, trace of the covariance matrix of the trace-based gradient, at least 0.
        empty_variance: `[]`, S_e, the same for the empty-trace gradient.
        covariance: `[]`, S_te, trace of the covariance matrix between the two.

    Returns:
        `[]` between 0 and 1, without gradient; 1/2 where both gradients are the same, and every alpha as good.

    Raises:
        ValueError: the biases are not vectors of one length, or another argument is not a scalar.

    References:
        Zhu et al., arXiv 2510.05095, the closed form of the weight; here derived from its definition.

    Notes:
        The biases are against a gradient that cannot be computed for a language model: the formula is for theory and
        for toys. If the empty trace has no bias and no covariance it is `S_e / (|b_t|^2 + S_t + S_e)`.

    Examples:
        b_t = 0, |b_e|^2 = 4, S_t = 4 and no other variance: 4 / (4 + 4) = 1/2.

        >>> import jax.numpy as jnp
        >>> from palign import losses
        >>> print(losses.bvpo_weight(jnp.zeros(2), jnp.array([2.0, 0.0]), 4.0, 0.0, 0.0))
        0.5
    """
    check_same_shape("bvpo_weight", trace_bias=trace_bias, empty_bias=empty_bias)
    check_shape("bvpo_weight", "a vector, [D]", (None,), trace_bias=trace_bias)
    check_scalars("bvpo_weight", trace_variance=trace_variance, empty_variance=empty_variance, covariance=covariance)
    of_trace, of_empty = as_float(trace_bias), as_float(empty_bias)
    between = of_empty - of_trace
    s_t, s_e, s_te = (as_float(v).astype(between.dtype) for v in (trace_variance, empty_variance, covariance))
    numerator = jnp.sum(of_empty * between) + s_e - s_te
    denominator = jnp.sum(between**2) + s_t + s_e - 2 * s_te
    same = denominator <= 0
    ratio = jnp.where(same, 0.5, numerator / jnp.where(same, 1.0, denominator))
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1.0))
