"""What the papers say of their methods, held against the study's numbers.

A claim is a difference of two measures, taken seed by seed and signed so that above 0 is what the paper says. Its
verdict is read off Student's 95% interval over seeds alone: above 0 it holds here, below 0 it does not, else the seeds
leave it undecided.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from palign.eval.winrate import Interval
from palign.recipes.study_config import DPO, REVERSE_DPO
from palign.recipes.study_measures import Result
from palign.recipes.study_summary import BySeed, Outcomes, mean_gold, over_optimisation, over_seeds, steps_to_best

HOLDS, FAILS, OPEN, MISSING = "holds here", "does not hold here", "undecided", "not measured"
Values = Mapping[int, float | None]


class Finding(NamedTuple):
    """Two measures and their difference over seeds."""

    what: str
    first: Interval | None
    second: Interval | None
    difference: Interval | None  # above 0: as claimed
    digits: int = 2

    @property
    def verdict(self) -> str:
        """What the interval says."""
        return verdict(self.difference)

    @property
    def text(self) -> str:
        """The numbers in a sentence."""
        if self.difference is None or self.first is None or self.second is None:
            return f"{self.what}: not measured"
        d, n = self.digits, self.difference.n
        interval = f" [{self.difference.low:.{d}f}, {self.difference.high:.{d}f}]" if n > 1 else ""
        levels = f"{self.first.mean:.{d}f} against {self.second.mean:.{d}f}"
        return f"{self.what}: {levels}, difference {self.difference.mean:.{d}f}{interval} over {n} seed{'s' * (n > 1)}"


class Claim(NamedTuple):
    """A paper's statement, the finding that decides it here, and others beside it."""

    title: str
    source: str
    main: Finding
    others: tuple[Finding, ...] = ()
    remark: str = ""

    @property
    def verdict(self) -> str:
        """That of the main finding."""
        return self.main.verdict

    @property
    def numbers(self) -> list[str]:
        """Every finding that was measured, in sentences, the main one first."""
        return [finding.text for finding in (self.main, *self.others) if finding.difference is not None]


def verdict(difference: Interval | None) -> str:
    """Reads an interval.

    Example:
        >>> verdict(Interval(0.3, 0.1, 0.5, 3)), verdict(Interval(0.3, -0.1, 0.7, 3))
        ('holds here', 'undecided')
    """
    if difference is None:
        return MISSING
    return HOLDS if difference.low > 0 else FAILS if difference.high < 0 else OPEN


def compare(what: str, more: Values, less: Values, *, digits: int = 2) -> Finding:
    """A finding that the first measure is larger.

    Args:
        what: is compared, and how.
        more: seed -> value, claimed to be the larger.
        less: seed -> value, claimed to be the smaller.
        digits: of the numbers when they are shown.
    """
    pairs = [(a, b) for s, a in more.items() if a is not None and (b := less.get(s)) is not None]
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    return Finding(what, over_seeds(first), over_seeds(second), over_seeds([a - b for a, b in pairs]), digits)


def all_claims(outcomes: Outcomes) -> list[Claim]:
    """Every claim, in the order of the page."""
    return [claim(outcomes) for claim in CLAIMS]


def faster_convergence(outcomes: Outcomes) -> Claim:
    """Token-level distillation reaches its reward in fewer steps."""
    dpo = _values(outcomes.best(DPO), lambda r: steps_to_best(r.curve))

    def against(name: str, what: str) -> Finding:
        ours = _values(outcomes.best(name), lambda r: steps_to_best(r.curve))
        return compare(f"steps to 90% of its own best improvement, DPO against {what}", dpo, ours, digits=0)

    return Claim(
        "Token-level distillation converges faster",
        "AlignDistil, arXiv 2503.02832",
        against("aligndistil", "off-policy AlignDistil"),
        (against("aligndistil_on_policy", "on-policy AlignDistil"),),
        f"The two teachers of AlignDistil take {2 * outcomes.config.steps} steps before, which are not counted.",
    )


def lists_gain_with_length(outcomes: Outcomes) -> Claim:
    """LiPO-lambda's lead over DPO grows with the number of responses."""
    lengths = {2: "_k2", 4: "", 8: "_k8"}
    runs = {
        K: [_values(outcomes.middle(f"{n}{end}"), mean_gold) for n in ("lipo_lambda", DPO)]
        for K, end in lengths.items()
    }
    leads: dict[int, BySeed] = {K: _difference(lipo, dpo) for K, (lipo, dpo) in runs.items()}
    return Claim(
        "LiPO-λ gains on DPO as lists grow",
        "LiPO, arXiv 2402.01878",
        compare("lead of LiPO-λ over DPO in gold reward, K = 8 against K = 2", leads[8], leads[2]),
        tuple(compare(f"gold reward at K = {K}, LiPO-λ against DPO", *runs[K]) for K in lengths),
        "DPO sees the best and the worst of K. Steps are equal, so longer lists are seen less often.",
    )


def normalised_is_shorter(outcomes: Outcomes) -> Claim:
    """Length-normalised DPO writes shorter responses."""
    ours, dpo = outcomes.best("ln_dpo"), outcomes.best(DPO)
    return Claim(
        "Length-normalised DPO writes shorter responses",
        "Tülu 3, arXiv 2411.15124",
        compare("words of DPO against those of LN-DPO", _values(dpo, _words), _values(ours, _words)),
        (compare("gold reward of LN-DPO against DPO", _values(ours, mean_gold), _values(dpo, mean_gold)),),
    )


def adaptive_beats_constant(outcomes: Outcomes) -> Claim:
    """The token-adaptive ratio is better than a constant one."""

    def against(end: str, other: str, what: str) -> tuple[Finding, ...]:
        ours, theirs = outcomes.best(f"aligndistil{end}"), outcomes.best(f"{other}{end}")
        return (
            compare(f"gold reward, adaptive against {what}", _values(ours, mean_gold), _values(theirs, mean_gold)),
            compare(f"KL to SFT, {what} against adaptive", _values(theirs, _kl), _values(ours, _kl)),
            compare(f"grammatical, adaptive against {what}", _values(ours, _valid), _values(theirs, _valid)),
        )

    off = against("", "aligndistil_contrastive", "ratios around 0.5")
    return Claim(
        "Token-adaptive extrapolation beats a constant ratio",
        "AlignDistil, arXiv 2503.02832",
        off[0],
        (
            *off[1:],
            *against("", "aligndistil_ratio", "ratios around 1"),
            *against("_on_policy", "aligndistil_contrastive", "ratios around 0.5, on-policy"),
        ),
        "Each at the best setting of its grid." if outcomes.is_whole else "Each at the middle of its grid.",
    )


def rpo_over_optimises_less(outcomes: Outcomes) -> Claim:
    """RPO loses less of its best reward than DPO."""

    def mean_of(method: str, value: Callable[[Result], float]) -> BySeed:
        both = outcomes.over_settings(method, value, like="rpo" if method == DPO else DPO)
        return {s: sum(values) / len(values) for s, values in both.items() if values}

    def over(method: str) -> BySeed:
        return mean_of(method, lambda r: over_optimisation(r.curve))

    return Claim(
        "RPO over-optimises less than DPO",
        "RPO, arXiv 2405.16436",
        compare("gold reward lost after the best checkpoint, DPO against RPO", over(DPO), over("rpo"), digits=3),
        (
            compare("grammatical, RPO against DPO", mean_of("rpo", _valid), mean_of(DPO, _valid)),
            compare("KL to SFT, DPO against RPO", mean_of(DPO, _kl), mean_of("rpo", _kl)),
            compare("gold reward, RPO against DPO", mean_of("rpo", mean_gold), mean_of(DPO, mean_gold)),
        ),
        "Means over the settings that both were run with. A best of several noisy checkpoints lies a little "
        "above the last one even where nothing is lost, for both alike.",
    )


def ches_filter_displaces_less(outcomes: Outcomes) -> Claim:
    """Training on pairs of low CHES lowers the preferred responses less."""
    kept, lot, whole = (outcomes.middle(name) for name in ("dpo_ches", "dpo_random", DPO))
    change, displaced = (lambda r: r.chosen_change), (lambda r: r.displaced)
    title = "log-probability change of better responses, nats, CHES filter against"
    return Claim(
        "The CHES filter reduces likelihood displacement",
        "Razin et al., arXiv 2410.08847",
        compare(f"{title} as many pairs by lot", _values(kept, change), _values(lot, change)),
        (
            compare(f"{title} all pairs", _values(kept, change), _values(whole, change)),
            compare(
                "share displaced, pairs by lot against CHES filter", _values(lot, displaced), _values(kept, displaced)
            ),
            compare("gold reward, CHES filter against pairs by lot", _values(kept, mean_gold), _values(lot, mean_gold)),
        ),
        f"The filter keeps the {outcomes.config.ches_keep:.0%} of pairs with the lowest length-normalised score; what "
        "happens to likelihoods is measured on held-out pairs.",
    )


def observed_below_idealised(outcomes: Outcomes) -> Claim:
    """DPO ranks fewer pairs right than its minimiser would."""

    def against(name: str, what: str, ideal: Callable[[Result], float | None]) -> Finding:
        runs = outcomes.middle(name)
        return compare(f"held-out pairs ranked right, {what}", _values(runs, ideal), _values(runs, lambda r: r.ranking))

    name = f"{DPO}_k2" if outcomes.middle(f"{DPO}_k2") else DPO
    K = outcomes.config.methods[name].responses
    return Claim(
        "The observed ranking accuracy is below the idealised one",
        "Chen et al., arXiv 2405.19534",
        against(name, f"ideal DPO against DPO trained at K = {K}", lambda r: r.idealised),
        (
            against(name, "ideal DPO, had all labels been certain, against the same", lambda r: r.idealised_certain),
            *([against(DPO, "ideal DPO against DPO trained at K = 4", lambda r: r.idealised)] * (name != DPO)),
        ),
        "The ideal takes each pair's true probability of being preferred, which this world knows. It is that of labels "
        "at K = 2; the best and the worst of more samples are told apart more surely than any two.",
    )


def contrastive_is_more_accurate(outcomes: Outcomes) -> Claim:
    """The log-ratio of DPO to reverse DPO orders responses better than that of DPO to the reference."""
    plain, both = outcomes.middle(DPO), outcomes.middle(REVERSE_DPO)
    return Claim(
        "The contrastive DPO reward is more accurate than the plain one",
        "AlignDistil, arXiv 2503.02832",
        compare(
            "held-out pairs in the order of their gold reward, contrastive against plain",
            _values(both, lambda r: r.contrastive and r.contrastive.accuracy),
            _values(plain, lambda r: r.rewards and r.rewards.accuracy),
            digits=3,
        ),
        (
            compare(
                "correlation with the true token credit, contrastive against plain",
                _values(both, lambda r: r.contrastive and r.contrastive.pearson),
                _values(plain, lambda r: r.rewards and r.rewards.pearson),
                digits=3,
            ),
        ),
    )


CLAIMS = (
    faster_convergence,
    lists_gain_with_length,
    normalised_is_shorter,
    adaptive_beats_constant,
    rpo_over_optimises_less,
    ches_filter_displaces_less,
    observed_below_idealised,
    contrastive_is_more_accurate,
)


def _values(runs: Mapping[int, Result], value: Callable[[Result], float | None]) -> Values:
    return {seed: value(result) for seed, result in runs.items()}


def _difference(more: Values, less: Values) -> BySeed:
    return {s: a - b for s, a in more.items() if a is not None and (b := less.get(s)) is not None}


def _kl(result: Result) -> float:
    return result.kl


def _valid(result: Result) -> float:
    return result.valid


def _words(result: Result) -> float:
    return result.words
