"""From the results of single runs to a line for each method: means and intervals over seeds."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from palign.eval.winrate import Interval, mean_interval, win_rate
from palign.recipes.study_config import DPO, REVERSE_DPO, SFT, Job, StudyConfig, list_jobs
from palign.recipes.study_measures import Point, Result

REACHED = 0.9  # of a run's own best improvement: where its convergence is read off

Setting = Mapping[str, float]
BySeed = dict[int, float]


class Entry(NamedTuple):
    """A finished job."""

    job: Job
    result: Result | None  # None: it diverged
    train_seconds: float
    measure_seconds: float


class Line(NamedTuple):
    """A method's line of the table, at the setting that is shown."""

    name: str
    label: str
    setting: Setting
    seeds: int
    settings: int  # that were tried with every one of these seeds
    gold: Interval
    wins_over_sft: Interval | None
    wins_over_dpo: Interval | None
    kl: Interval
    valid: Interval
    words: Interval
    over_optimisation: Interval | None
    steps: Interval | None  # to 90% of its own best improvement
    spread: Interval | None  # of gold over the settings
    worst: Interval | None  # gold of the worst setting
    ranking: Interval
    chosen_change: Interval
    pearson: Interval | None
    spearman: Interval | None
    train_seconds: float  # of one run


class Outcomes:
    """The results of a study, by method, setting and seed."""

    def __init__(self, config: StudyConfig, entries: Sequence[Entry]):
        """Takes the finished jobs; those that diverged count as not there, and are in `diverged`.

        A method whose grid has been run must not be compared at its best with others whose grids wait: settings are
        chosen once the study `is_whole`, before that the middle of each grid stands for the method.
        """
        self.is_whole = len(entries) == len(list_jobs(config))
        self.config, self.entries = config, [entry for entry in entries if entry.result is not None]
        self.diverged = [entry.job.name for entry in entries if entry.result is None]

    @property
    def methods(self) -> list[str]:
        """Those with results, the SFT model first."""
        found = {entry.job.method for entry in self.entries}
        return [name for name in (SFT, *self.config.methods) if name in found]

    def label(self, method: str) -> str:
        """What a method is called."""
        return "SFT" if method == SFT else self.config.methods[method].label

    def of(self, method: str, setting: Setting) -> dict[int, Result]:
        """Seed -> result."""
        found = [e for e in self.entries if e.job.method == method and dict(e.job.setting) == dict(setting)]
        return {e.job.seed: e.result for e in found if e.result is not None}

    def settings(self, method: str) -> list[Setting]:
        """The settings that were run with as many seeds as the middle one, which comes first."""
        if method == SFT:
            return [{"learning_rate": self.config.sft_learning_rate}]
        middle, *others = self.config.methods[method].settings()
        seeds = len(self.of(method, middle))
        return [middle, *(setting for setting in others if len(self.of(method, setting)) == seeds)]

    def best_setting(self, method: str) -> Setting:
        """The one whose runs end with the most gold reward on the tuning prompts, which no table shows."""
        settings = self.settings(method) if self.is_whole else self.settings(method)[:1]
        return max(settings, key=lambda s: _mean(r.curve[-1].gold for r in self.of(method, s).values()))

    def best(self, method: str) -> dict[int, Result]:
        """Seed -> result at the best setting; empty where the method has none."""
        return self.of(method, self.best_setting(method)) if method in self.methods else {}

    def middle(self, method: str) -> dict[int, Result]:
        """Seed -> result at the middle of the grid; empty where the method has none."""
        return self.of(method, next(self.config.methods[method].settings())) if method in self.methods else {}

    def over_settings(self, method: str, value: Callable[[Result], float], *, like: str = "") -> dict[int, list[float]]:
        """Seed -> a value of each setting, over the seeds that have them all.

        Args:
            method: whose results.
            value: of a result.
            like: another method: only settings that it was run with too.
        """
        if not {method, like or method} <= set(self.methods):
            return {}
        shared = [x for x in self.settings(method) if not like or x in self.settings(like)]
        runs = [self.of(method, setting) for setting in shared]
        return {seed: [value(run[seed]) for run in runs] for seed in runs[0] if all(seed in run for run in runs)}


def mean_gold(result: Result) -> float:
    """Gold reward, mean over the test prompts."""
    return _mean(result.gold)


def over_optimisation(curve: Sequence[Point]) -> float:
    """Gold reward of the best checkpoint less that of the last one, on the tuning prompts; at least 0."""
    return max(point.gold for point in curve) - curve[-1].gold


def steps_to_best(curve: Sequence[Point]) -> float | None:
    """Steps until a run has made `REACHED` of its best improvement over where it began.

    Between two checkpoints the reward is taken to run straight.

    Args:
        curve: the first point is where it began.

    Returns:
        The steps, or None where no checkpoint is better than the start.

    Example:
        >>> steps_to_best([Point(0, 0.0, 0.0, 1.0), Point(10, 1.0, 0.5, 1.0), Point(20, 2.0, 1.0, 1.0)])
        18.0
    """
    start, best = curve[0].gold, max(point.gold for point in curve)
    if best <= start:
        return None
    wanted = start + REACHED * (best - start)
    for before, after in itertools.pairwise(curve):
        if after.gold >= wanted:
            share = (wanted - before.gold) / (after.gold - before.gold)
            return before.step + share * (after.step - before.step)
    raise AssertionError("the best checkpoint reaches what is wanted")


def over_seeds(values: Sequence[float | None], *, least: float = -math.inf, most: float = math.inf) -> Interval | None:
    """Mean with Student's interval over seeds; None where no seed has the value, unbounded where only one has.

    Args:
        values: one a seed.
        least: no value can be lower; where several seeds give an interval it ends there.
        most: no value can be higher.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    interval = mean_interval(known)
    return (
        interval._replace(low=max(least, interval.low), high=min(most, interval.high)) if interval.n > 1 else interval
    )


def make_lines(outcomes: Outcomes) -> list[Line]:
    """A line for each method that has results; reverse DPO, which only serves others, has none."""
    return [_line(outcomes, method) for method in outcomes.methods if method != REVERSE_DPO]


def wins(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> list[float]:
    """Win rate of each seed that both have, prompt by prompt."""
    return [win_rate(ours[seed].gold, theirs[seed].gold).mean for seed in ours if seed in theirs]


def _line(outcomes: Outcomes, method: str) -> Line:
    setting = outcomes.best_setting(method)
    found = outcomes.of(method, setting)
    results, trained = list(found.values()), method != SFT
    golds = list(outcomes.over_settings(method, mean_gold).values())
    several = [values for values in golds if len(values) > 1]
    seconds = [e.train_seconds for e in outcomes.entries if e.job.method == method]
    rewards = [result.rewards for result in results]
    return Line(
        name=method,
        label=outcomes.label(method),
        setting=setting,
        seeds=len(found),
        settings=len(outcomes.settings(method)),
        gold=_known(over_seeds([mean_gold(r) for r in results])),
        wins_over_sft=over_seeds(wins(found, outcomes.best(SFT)), least=0, most=1) if trained else None,
        wins_over_dpo=over_seeds(wins(found, outcomes.best(DPO)), least=0, most=1) if method != DPO else None,
        kl=_known(over_seeds([r.kl for r in results], least=0)),
        valid=_known(over_seeds([r.valid for r in results], least=0, most=1)),
        words=_known(over_seeds([r.words for r in results], least=0)),
        over_optimisation=over_seeds([over_optimisation(r.curve) for r in results], least=0) if trained else None,
        steps=over_seeds([steps_to_best(r.curve) for r in results], least=0) if trained else None,
        spread=over_seeds([max(values) - min(values) for values in several], least=0),
        worst=over_seeds([min(values) for values in several]),
        ranking=_known(over_seeds([r.ranking for r in results], least=0, most=1)),
        chosen_change=_known(over_seeds([r.chosen_change for r in results])),
        pearson=over_seeds([reward and reward.pearson for reward in rewards], least=-1, most=1),
        spearman=over_seeds([reward and reward.spearman for reward in rewards], least=-1, most=1),
        train_seconds=float(np.median(seconds)),
    )


def _known(interval: Interval | None) -> Interval:
    assert interval is not None
    return interval


def _mean(values) -> float:
    return float(np.mean(list(values)))
