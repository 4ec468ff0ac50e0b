"""What a range of quantiles keeps: ends, ties, values that are missing."""

import doctest
import math

import numpy as np
import pytest

from palign.data import quantile_filter
from palign.data.quantile_filter import QuantileRange, keep_quantiles, parse_quantile_range


def kept(values, low, high):
    return keep_quantiles(np.array(values, float), low=low, high=high).mask.tolist()


def test_the_tail_is_dropped_and_the_rest_kept_in_place():
    values = np.random.default_rng(0).permutation(100).astype(float)
    np.testing.assert_array_equal(keep_quantiles(values, low=0.0, high=0.95).mask, values < 95)
    np.testing.assert_array_equal(keep_quantiles(values, low=0.05, high=1.0).mask, values >= 5)
    found = keep_quantiles(values, low=0.1, high=0.9)
    np.testing.assert_array_equal(found.mask, (values >= 10) & (values <= 89))
    assert (found.lower, found.upper) == (10.0, 89.0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 101, 1000])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.95), (0.05, 1.0), (0.25, 0.75), (0.0, 0.29), (0.29, 1.0)])
def test_the_kept_are_those_between_numpy_s_quantiles(size, low, high):
    values = np.random.default_rng(size).permutation(size) * 4.0
    low_end, high_end = np.quantile(values, [low, high])
    expected = (values >= low_end - 1e-6) & (values <= high_end + 1e-6)
    np.testing.assert_array_equal(keep_quantiles(values, low=low, high=high).mask, expected)


def test_the_whole_range_keeps_everything_that_has_a_value():
    assert kept([3, math.nan, 1, math.inf, 2, -math.inf], 0, 1) == [True, False, True, False, True, False]


def test_missing_values_do_not_move_the_quantiles():
    values = np.arange(21.0)
    with_missing = np.concatenate([[math.nan] * 50, values, [math.inf]])
    expected = keep_quantiles(values, low=0.1, high=0.9)
    found = keep_quantiles(with_missing, low=0.1, high=0.9)
    assert found[1:] == expected[1:] == (2.0, 18.0)
    np.testing.assert_array_equal(found.mask[50:71], expected.mask)
    assert found.mask.sum() == expected.mask.sum() == 17


def test_equal_values_are_kept_or_dropped_together():
    assert kept([5, 5, 5, 5], 0, 0.5) == [True] * 4
    assert kept([1, 2, 2, 2, 2], 0, 0.3) == [True] * 5  # the end lies among the ties
    assert kept([1, 1, 1, 2, 3], 0, 0.5) == [True, True, True, False, False]
    assert kept([1, 1, 1, 2, 3], 0.75, 1) == [False, False, False, True, True]


def test_nothing_given_or_nothing_finite_keeps_nothing():
    for values in ([], [math.nan, math.inf]):
        found = keep_quantiles(np.array(values), low=0.0, high=0.5)
        assert found.mask.tolist() == [False] * len(values) and math.isnan(found.lower) and math.isnan(found.upper)


def test_one_value_is_always_kept_and_between_two_lies_nothing():
    assert kept([7], 0.4, 0.6) == [True]
    assert kept([7, 8], 0.4, 0.6) == [False, False]


def test_an_index_that_rounding_puts_below_a_whole_number_is_the_whole_number():
    assert 0.29 * 100 < 29
    assert keep_quantiles(np.arange(101.0), low=0.0, high=0.29).upper == 29.0
    assert 0.55 * 100 > 55
    assert keep_quantiles(np.arange(101.0), low=0.55, high=1.0).lower == 55.0


def test_a_range_is_read_from_text():
    assert parse_quantile_range("ches_normalised:0:0.95") == QuantileRange("ches_normalised", 0.0, 0.95)
    for text in ("ches", "ches:0", "ches:0:1:2", "ches:a:b", "ches:0.1:", ""):
        with pytest.raises(ValueError, match=r"expected NAME:LOW:HIGH, such as ches_normalised:0:0.95"):
            parse_quantile_range(text)
    for text in ("ches:0.5:0.5", "ches:0.9:0.1", "ches:-0.1:1", "ches:0:1.5", "ches:nan:1", "ches:0:nan"):
        with pytest.raises(ValueError, match="expected 0 <= low < high <= 1"):
            parse_quantile_range(text)


def test_wrong_arguments_are_answered():
    with pytest.raises(ValueError, match=r"values has shape \[2, 2\]; expected \[n\]"):
        keep_quantiles(np.zeros((2, 2)), low=0.0, high=1.0)
    with pytest.raises(ValueError, match=r"quantiles 0.9 and 0.1"):
        keep_quantiles(np.zeros(3), low=0.9, high=0.1)


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(quantile_filter)
    assert result.attempted and not result.failed
