"""Intervals against values by hand and against their own promise: to cover the truth as often as they say."""

import doctest
import math

import numpy as np
import pytest

from palign.eval import winrate
from palign.eval.winrate import Interval, mean_interval, ranking_accuracy, wilson_interval, win_rate


@pytest.mark.parametrize(
    ("df", "quantile"),  # 97.5% points from printed tables
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (29, 2.0452), (120, 1.9799)],
)
def test_t_quantiles_match_the_tables(df, quantile):
    assert winrate._t_quantile(0.975, df) == pytest.approx(quantile, abs=6e-5)


def test_t_quantile_is_continuous_where_the_method_changes():
    below, above = winrate._t_quantile(0.995, 100), winrate._t_quantile(0.995, 101)
    assert 0 < below - above < 6e-4


def test_mean_interval_by_hand():
    interval = mean_interval([1.0, 2.0, 3.0, 4.0])  # sd 1.29099, se 0.645497, t(3) 3.18245
    assert interval.mean == 2.5
    assert interval.n == 4
    assert interval.high - 2.5 == pytest.approx(3.18245 * 0.6454972, rel=1e-5)
    assert 2.5 - interval.low == pytest.approx(interval.high - 2.5)


def test_mean_interval_of_one_or_equal_values():
    assert mean_interval([3.0]) == Interval(3.0, -math.inf, math.inf, 1)
    assert mean_interval([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 3)


@pytest.mark.parametrize("n", [5, 40])
def test_mean_interval_covers_at_its_level(n):
    rng = np.random.default_rng(0)
    intervals = [mean_interval(row, level=0.9) for row in rng.normal(1.0, 3.0, (4000, n))]
    assert np.mean([i.low <= 1.0 <= i.high for i in intervals]) == pytest.approx(0.9, abs=0.015)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 263, 0.25525, 0.36615)],
)
def test_wilson_by_hand(wins, n, low, high):
    interval = wilson_interval(wins, n)
    assert interval.mean == wins / n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=2e-4)


def test_win_rate_counts_draws_as_half():
    a = np.array([1.0, 2.0, 3.0, 4.0] * 5)
    b = np.array([0.0, 2.0, 4.0, 3.0] * 5)
    interval = win_rate(a, b)
    assert interval.mean == 0.625
    sem = np.std([1, 0.5, 0, 1] * 5, ddof=1) / math.sqrt(20)
    assert interval.high - interval.mean == pytest.approx(2.093 * sem, rel=1e-4)
    mirror = win_rate(b, a)
    assert (mirror.mean, mirror.low, mirror.high) == pytest.approx((0.375, 1 - interval.high, 1 - interval.low))


def test_win_rate_at_the_edges():
    scores = np.arange(10.0)
    assert win_rate(scores + 1, scores) == wilson_interval(10, 10)
    assert win_rate(scores - 1, scores) == wilson_interval(0, 10)
    assert win_rate(scores, scores) == wilson_interval(5, 10)  # draws only: not an interval without width
    assert win_rate([1.0], [0.0]).high == 1.0


@pytest.mark.parametrize(("win", "draw"), [(0.5, 0.0), (0.8, 0.1), (0.02, 0.0), (0.2, 0.6)])
def test_win_rate_covers_at_its_level(win, draw):
    rng = np.random.default_rng(0)
    points = rng.choice([1.0, 0.0, -1.0], p=[win, draw, 1 - win - draw], size=(3000, 100))
    intervals = [win_rate(row, np.zeros(100)) for row in points]
    truth = win + draw / 2
    assert np.mean([i.low <= truth <= i.high for i in intervals]) > 0.925
    assert all(0 <= i.low <= i.mean <= i.high <= 1 for i in intervals)


def test_ranking_accuracy_is_strict():
    accuracy = ranking_accuracy([1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 1.0, 1.0])
    assert accuracy == wilson_interval(2, 4)
    assert ranking_accuracy([0.0, 0.0], [0.0, 0.0]).mean == 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="non-empty"):
        mean_interval([])
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="prompt by prompt"):
        win_rate([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="non-empty vector"):
        win_rate([[1.0]], [[1.0]])
    with pytest.raises(ValueError, match="wins"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="level"):
        mean_interval([1.0, 2.0], level=95)


def test_interval_prints_itself():
    assert str(Interval(0.5, 0.25, 0.75, 8)) == "0.500 [0.250, 0.750]"


def test_doctests():
    assert doctest.testmod(winrate).failed == 0
