"""Preference learning from labels that the model gave itself (SPA): pairs with a small margin are taken for noise.

The threshold is a quantile of the margins of past steps. What is remembered of them is a value, `SpaHistory`, that goes
in and comes out: keep it in the train state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from palign.losses.checks import (
    as_float,
    check_between,
    check_pairs,
    check_positive,
    check_scalars,
    log_ratios,
    margins,
)

_REMEMBERED = 50


class SpaHistory(NamedTuple):
    """Mean margins of the last 50 steps, in a ring, and how many steps there have been."""

    margins: Float[Array, " 50"]
    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count, which nobody needs


def spa(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    detection_logps: Float[Array, "B 2"],
    threshold: Float[Array, ""],
    *,
    beta: float | Float[Array, ""] = 0.1,
    alpha: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """Self-refinement of spread preference annotation: DPO, with smoothed labels where the label looks like noise.

    `L = -(1 - a) log sigmoid(beta h) - a log sigmoid(-beta h)`, where `a = alpha` if `m <= threshold` and 0 otherwise,
    with `rho = policy_logps - ref_logps`, `h = rho_w - rho_l`, and the margin of detection
    `m = beta ((detection_w - ref_w) - (detection_l - ref_l))`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        detection_logps: `[B, 2]`, the same under what detects the noise: the policy itself, or in the paper's
            de-coupled form a model extrapolated beyond it (`losses.dense.extrapolated_sequence_logps`). Receives no
            gradient.
        threshold: `[]`, in units of beta times nats, from `spa_threshold`; minus infinity finds no noise. Receives no
            gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        alpha: the probability that a label taken for noise is wrong, from 0, which is `dpo`, to 1/2.

    Returns:
        `[B]` losses in nats, at least 0; log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, `threshold` is not a scalar, `beta` is a plain number that is not finite
            and above 0, or `alpha` is a plain number outside [0, 1/2].

    References:
        Kim et al., "Spread Preference Annotation: Direct Preference Judgment for Efficient LLM Alignment",
        arXiv 2406.04412, section 4 (self-refinement, de-coupled noise detection).

    Notes:
        If all pairs are below the threshold this is conservative DPO with alpha. TRL, tunix and EasyDeL do not have it.

    Examples:
        Both pairs have h = 4 and a loss of 0.5130; the second is detected at 0.1 * 1 <= 0.2:
        0.9 * 0.5130 + 0.1 * 0.9130 = 0.5530.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.full((2, 2), -12.0), jnp.array([[-10.0, -14.0], [-10.0, -14.0]])
        >>> detection = jnp.array([[-10.0, -14.0], [-12.0, -13.0]])
        >>> print(np.asarray(losses.spa(policy, reference, detection, jnp.array(0.2))).round(4))
        [0.513 0.553]
    """
    check_pairs("spa", policy_logps=policy_logps, ref_logps=ref_logps, detection_logps=detection_logps)
    check_scalars("spa", threshold=threshold)
    check_positive("spa", beta=beta)
    check_between("spa", 0.0, 0.5, alpha=alpha)
    gaps = beta * margins(log_ratios(policy_logps, ref_logps))
    detected = jax.lax.stop_gradient(beta * margins(log_ratios(detection_logps, ref_logps)))
    smoothing = jnp.where(detected <= as_float(threshold).astype(detected.dtype), alpha, 0.0)
    return (1 - smoothing) * jax.nn.softplus(-gaps) + smoothing * jax.nn.softplus(gaps)


def spa_history() -> SpaHistory:
    """Empty memory of margins, for the start of a training.

    Args:
        None: the memory holds 50 steps, as that of the authors' code.

    Returns:
        SpaHistory with a count of 0.

    References:
        Kim et al., arXiv 2406.04412, and the authors' code.

    Examples:
        >>> from palign import losses
        >>> history = losses.spa_history()
        >>> print(history.margins.shape, history.count)
        (50,) 0
    """
    return SpaHistory(jnp.zeros(_REMEMBERED, jnp.float32), jnp.zeros((), jnp.int32))


def spa_remember(history: SpaHistory, mean_margin: Float[Array, ""]) -> SpaHistory:
    """Memory with one more step in it; the 51st overwrites the first.

    Args:
        history: the memory so far.
        mean_margin: `[]`, mean over the pairs of the global batch of the margin of detection
            `beta ((detection_w - ref_w) - (detection_l - ref_l))`, in units of beta times nats. Receives no gradient.

    Returns:
        SpaHistory, one step longer.

    Raises:
        ValueError: `mean_margin` is not a scalar.

    References:
        Kim et al., arXiv 2406.04412, and the authors' code.

    Notes:
        The authors' code remembers a mean per micro-batch and per process.

    Examples:
        >>> from palign import losses
        >>> history = losses.spa_remember(losses.spa_history(), 0.25)
        >>> print(history.margins[:2], history.count)
        [0.25 0.  ] 1
    """
    check_scalars("spa_remember", mean_margin=mean_margin)
    latest = jax.lax.stop_gradient(as_float(mean_margin)).astype(history.margins.dtype)
    return SpaHistory(history.margins.at[history.count % _REMEMBERED].set(latest), history.count + 1)


def spa_threshold(
    history: SpaHistory,
    *,
    quantile: float | Float[Array, ""] = 0.1,
    start: float | Float[Array, ""] = 0.0,
) -> Float[Array, ""]:
    """Margin at or below which a pair is taken for noise: a quantile of the remembered step means.

    Args:
        history: the memory, of which only the steps that there have been count.
        quantile: between 0, the smallest remembered margin, and 1, the largest.
        start: number of steps to be remembered before any pair is taken for noise, at least 0; the authors wait for
            20% of the training.

    Returns:
        `[]` in units of beta times nats, without gradient; minus infinity, at which `spa` is `dpo`, before `start`
        steps have been remembered and while none has.

    Raises:
        ValueError: `quantile` is a plain number outside [0, 1], or `start` one that is not finite and at least 0.

    References:
        Kim et al., arXiv 2406.04412, and the authors' code.

    Notes:
        The quantile is that of `numpy.quantile`, linear between neighbours: with 50 steps and 0.1 it lies at 4.9, near
        the sixth smallest margin. The authors' code takes the mean of `sorted[5]` and `sorted[6]`, counted from 0: a
        little higher.

    Examples:
        Steps of 0.1, 0.5 and 0.2: the middle one at 0.5, a fifth of the way from 0.1 to 0.2 at 0.1.

        >>> from palign import losses
        >>> history = losses.spa_history()
        >>> print(losses.spa_threshold(history))
        -inf
        >>> for margin in (0.1, 0.5, 0.2):
        ...     history = losses.spa_remember(history, margin)
        >>> print(losses.spa_threshold(history, quantile=0.5), losses.spa_threshold(history, quantile=0.1).round(4))
        0.2 0.12
        >>> print(losses.spa_threshold(history, start=4))
        -inf
    """
    check_between("spa_threshold", 0.0, 1.0, quantile=quantile)
    check_between("spa_threshold", 0.0, float("inf"), start=start)
    filled = jnp.minimum(history.count, _REMEMBERED)
    places = jnp.arange(_REMEMBERED, dtype=filled.dtype)
    ascending = jnp.sort(jnp.where(places < filled, history.margins, jnp.inf))
    # So that nothing is NaN while nothing is remembered.
    ascending = jnp.where(places < filled, ascending, 0.0)
    last = jnp.maximum(filled - 1, 0)
    share, first = (as_float(jnp.asarray(number)).astype(ascending.dtype) for number in (quantile, start))
    position = share * last.astype(ascending.dtype)
    below = jnp.floor(position).astype(jnp.int32)
    low, high = ascending[below], ascending[jnp.minimum(below + 1, last)]
    value = low + (position - jnp.floor(position)) * (high - low)
    known = (filled > 0) & (history.count.astype(ascending.dtype) >= first)
    return jax.lax.stop_gradient(jnp.where(known, value, -jnp.inf))
