"""Win rates, ranking accuracy and means, each with an interval.

Scores are numbers from a judge (a gold reward, a reward model), higher is better, one per prompt. A draw is half a win.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# A normal approximation of a win rate wants at least this many wins and this many losses.
_ENOUGH = 5.0


class Interval(NamedTuple):
    """An estimate with its confidence interval and the number of observations behind it."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean with Student's t interval, mean +- t(n - 1) * sd / sqrt(n).

    Args:
        values: `[n]` independent observations, one per prompt. Several samples of one prompt are not independent:
            average them first.
        level: Confidence level.

    Returns:
        The interval; unbounded for a single observation.

    Raises:
        ValueError: If there are no values, one is not finite, or the level is not between 0 and 1.
    """
    values = _checked(values, "values")
    _check_level(level)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = _t_quantile(0.5 + level / 2, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def wilson_interval(wins: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: sane for 0 or n wins, where the normal interval has no width.

    With p = wins / n and z the normal quantile, centre (p + z^2/2n) / (1 + z^2/n) and half width
    z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).

    Args:
        wins: Number of wins; draws may count one half.
        n: Number of comparisons.
        level: Confidence level.

    Returns:
        The interval, inside [0, 1]; its `mean` is wins / n, which is not the centre.

    Raises:
        ValueError: If n < 1, wins is not in [0, n], or the level is not between 0 and 1.

    Example:
        >>> print(wilson_interval(0, 10))
        0.000 [0.000, 0.278]
    """
    _check_level(level)
    if n < 1 or not 0 <= wins <= n:
        raise ValueError(f"need 0 <= wins <= n and n >= 1, got wins={wins}, n={n}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, shrink = wins / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    # At p = 0 and p = 1 the bound is p itself; rounding must not move it.
    return Interval(p, 0.0 if p == 0 else max(0.0, centre - half), 1.0 if p == 1 else min(1.0, centre + half), n)


def win_rate(scores_a: ArrayLike, scores_b: ArrayLike, level: float = 0.95) -> Interval:
    """How often A beats B on the same prompts, a draw counting one half.

    The interval comes from the standard error of the points (1, 1/2, 0), cut to [0, 1]. With fewer than five wins or
    five losses, and with nothing but draws, that error means little: there Wilson's interval is given, which is too
    wide rather than too narrow when there are draws.

    Args:
        scores_a: `[n]` scores of A's responses, one per prompt.
        scores_b: `[n]` scores of B's responses to the same prompts, in the same order.
        level: Confidence level.

    Returns:
        The win rate of A with its interval. `win_rate(b, a)` is its mirror image.

    Raises:
        ValueError: If the two differ in shape, are empty or not finite, or the level is not between 0 and 1.
    """
    a, b = _paired(scores_a, scores_b)
    points = np.where(a == b, 0.5, (a > b).astype(np.float64))
    wins, n = float(points.sum()), len(points)
    if min(wins, n - wins) < _ENOUGH or (points == 0.5).all():
        return wilson_interval(wins, n, level)
    interval = mean_interval(points, level)
    return interval._replace(low=max(0.0, interval.low), high=min(1.0, interval.high))


def ranking_accuracy(preferred: ArrayLike, other: ArrayLike, level: float = 0.95) -> Interval:
    """How often the preferred response scores strictly higher; a tie counts as wrong, as in TRL's reward accuracy.

    A policy equal to its reference gives every response an implicit reward of 0, so its accuracy is 0 here, not 1/2.

    Args:
        preferred: `[n]` scores (implicit rewards, log-probs) of the responses that the label prefers.
        other: `[n]` scores of the responses beside them.
        level: Confidence level.

    Returns:
        The accuracy with Wilson's interval.

    Raises:
        ValueError: If the two differ in shape, are empty or not finite, or the level is not between 0 and 1.
    """
    a, b = _paired(preferred, other)
    return wilson_interval(int((a > b).sum()), len(a), level)


def _checked(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be a non-empty vector, got shape {array.shape}")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(f"{bad} of {array.size} {name} are not finite")
    return array


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _checked(first, "scores"), _checked(second, "scores")
    if a.shape != b.shape:
        raise ValueError(f"scores are compared prompt by prompt, got {a.size} and {b.size} of them")
    return a, b


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def _t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t at p > 1/2: bisection on the finite sum for few degrees of freedom, else an expansion."""
    if df > 100:
        z = NormalDist().inv_cdf(p)
        return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df * df)
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, df) < 2 * p - 1 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _t_central(angle: float, df: int) -> float:
    """P(|t| < sqrt(df) tan(angle)) for whole df, the trigonometric sum of Abramowitz and Stegun 26.7.3-4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
