"""Choosing records by the quantiles of a number: what lies in the tail of an annotation is left out."""

import math
from typing import NamedTuple

import numpy as np


class QuantileRange(NamedTuple):
    """Which part of a named number's distribution is kept."""

    name: str
    low: float
    high: float


class Kept(NamedTuple):
    """Which values are kept, and the smallest and largest value that may be."""

    mask: np.ndarray  # [n] bool
    lower: float  # NaN where no value was finite
    upper: float


def parse_quantile_range(text: str) -> QuantileRange:
    """Reads `NAME:LOW:HIGH`, such as `ches_normalised:0:0.95`.

    Args:
        text: what was given on the command line.

    Returns:
        The name and the two quantiles.

    Raises:
        ValueError: not of that form, or the quantiles are not 0 <= LOW < HIGH <= 1.
    """
    name, *bounds = text.split(":")
    try:
        low, high = (float(bound) for bound in bounds)
    except ValueError:
        raise ValueError(f"{text!r}: expected NAME:LOW:HIGH, such as ches_normalised:0:0.95") from None
    _check_quantiles(low, high)
    return QuantileRange(name, low, high)


def keep_quantiles(values: np.ndarray, *, low: float, high: float) -> Kept:
    """Keeps the values between two quantiles, both ends included.

    With the n finite values in order, v[0] to v[n - 1], kept is what lies from `v[ceil(low (n - 1))]` to
    `v[floor(high (n - 1))]`. Equal values are never parted, so ties at an end keep more than their share.

    Args:
        values: `[n]` numbers; NaN and infinities stand for records without a value.
        low: the lower quantile, at least 0; 0 drops nothing at that end.
        high: the upper quantile, above `low`, at most 1; 1 drops nothing at that end.

    Returns:
        The mask, False where there is no value, and the ends. Nothing is kept where the ends cross: two quantiles that
        fall between the same two of a few values.

    Raises:
        ValueError: `values` is not `[n]`, or the quantiles are not 0 <= low < high <= 1.

    Examples:
        Of five values, 0.75 lies at the fourth: the largest is dropped, and what has no value.

        >>> import numpy as np
        >>> from palign.data.quantile_filter import keep_quantiles
        >>> kept = keep_quantiles(np.array([3.0, 9.0, np.nan, 1.0, 2.0, 4.0]), low=0.0, high=0.75)
        >>> kept.mask.tolist(), kept.lower, kept.upper
        ([True, False, False, True, True, True], 1.0, 4.0)
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise ValueError(f"keep_quantiles: values has shape {list(values.shape)}; expected [n], one for each record")
    _check_quantiles(low, high)
    present = np.isfinite(values)
    if not present.any():
        return Kept(present, math.nan, math.nan)
    order = np.sort(values[present])
    # Rounded first: 0.29 * 100 is a little below 29 and must not become 28.
    first = math.ceil(round(low * (order.size - 1), 9))
    last = math.floor(round(high * (order.size - 1), 9))
    lower, upper = float(order[first]), float(order[last])
    return Kept(present & (values >= lower) & (values <= upper), lower, upper)


def _check_quantiles(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"quantiles {low:g} and {high:g}: expected 0 <= low < high <= 1")
