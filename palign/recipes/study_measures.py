"""What is measured of every run of the study, once, on held-out prompts."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array
from scipy import stats

from palign.data import world
from palign.data.loader import Dataset
from palign.data.world_credit import token_credit
from palign.eval.displacement import displacement
from palign.eval.ranking import idealised_ranking_accuracy, implicit_reward_accuracy, ranking_accuracy
from palign.eval.score import token_logps
from palign.generate.texts import Generation
from palign.recipes.study_config import StudyConfig
from palign.recipes.world_runs import as_rows, draw, golds, kl_of_samples, one_device, trees
from palign.train.sources import Loaded, load_run

CURVE_SEED, PAIR_SEED = 13, 1000  # of the sampler; all checkpoints draw with the same numbers, which steadies curves

# For each prompt, one array [tokens] for each of its samples.
Tokens = list[tuple[np.ndarray, ...]]


class Point(NamedTuple):
    """A checkpoint on the tuning prompts."""

    step: int
    kl: float
    gold: float
    valid: float


class Rewards(NamedTuple):
    """What the log-ratios of two models say of the SFT model's samples.

    Attributes:
        accuracy: share of pairs whose order by summed log-ratio is that by gold reward.
        pearson: correlation of tokens' log-ratios with their true credit; None where no sample is a review.
        spearman: the same of their ranks.
    """

    accuracy: float
    pearson: float | None
    spearman: float | None


class Result(NamedTuple):
    """The measures of one run; means over test prompts where nothing else is said."""

    gold: tuple[float, ...]  # of each test prompt's sample
    kl: float  # to the SFT model, nats a response
    valid: float  # share of grammatical samples
    words: float
    distinct: float  # share of different texts among the samples
    curve: tuple[Point, ...]  # from the SFT model to the last checkpoint
    ranking: float  # share of pairs, ordered by gold, whose better response is at least as likely as the other
    idealised: float | None  # the same of an ideal DPO model of the run's beta, where the run is DPO
    idealised_certain: float | None  # the same if every label had been certain
    chosen_change: float  # of the better response's log-probability since SFT, nats
    rejected_change: float
    displaced: float  # share of better responses that became less likely
    rewards: Rewards | None  # against the SFT model; None for that model itself
    contrastive: Rewards | None  # of DPO against this run, where the run is reverse DPO


class Heldout(NamedTuple):
    """What all runs of a seed are measured on."""

    sft: Loaded
    test: Sequence[str]
    tuning: Sequence[str]
    start: Point  # the SFT model
    pairs: Dataset  # two samples of the SFT model for each test prompt
    gold: np.ndarray  # [test prompts, 2] of them
    credit: list[tuple[np.ndarray | None, ...]]  # of their tokens; None where it is not defined
    logps: Tokens  # of their tokens under the SFT model


def hold_out(config: StudyConfig, sft_place: epath.Path, seed: int) -> Heldout:
    """Draws from a seed's SFT model what its runs are measured on.

    Args:
        config: of the study.
        sft_place: the workdir of the seed's SFT run.
        seed: of the study.

    Raises:
        ValueError: there are fewer held-out prompts than the study wants.
    """
    _, heldout = world.split_prompts(seed=0)
    if config.test_prompts + config.tuning_prompts > len(heldout):
        raise ValueError(
            f"config.test_prompts = {config.test_prompts}, config.tuning_prompts = {config.tuning_prompts}: there are "
            f"{len(heldout)} held-out prompts; use fewer"
        )
    test, tuning = heldout[: config.test_prompts], heldout[config.test_prompts :][: config.tuning_prompts]
    sft = load_run(str(sft_place))
    drawn = draw(sft, test, samples=2, seed=PAIR_SEED + seed)
    pairs = as_rows(trees(sft, test, drawn))
    return Heldout(
        sft,
        test,
        tuning,
        _point(sft, sft, tuning, 0),
        pairs,
        golds(test, drawn),
        [tuple(_credit(prompt, sample) for sample in row) for prompt, row in zip(test, drawn, strict=True)],
        token_logps(sft.lm, sft.params, pairs, one_device()),
    )


def measure(
    place: epath.Path,
    heldout: Heldout,
    steps: Sequence[int],
    *,
    seed: int,
    beta: float | None = None,
    dpo: epath.Path | None = None,
) -> Result:
    """Measures a run.

    Args:
        place: its workdir.
        heldout: of its seed.
        steps: the checkpoints that its curve goes through.
        seed: of the test samples, its own: wins are counted between models that draw independently.
        beta: where the run is DPO, its beta: for the idealised accuracy.
        dpo: where the run is reverse DPO, the workdir of DPO: for the contrastive reward.
    """
    policy = load_run(str(place))
    drawn = draw(policy, heldout.test, samples=1, seed=seed)
    texts = [row[0].text.strip() for row in drawn]
    logps = _pair_logps(policy, heldout)
    now, before = _in_order(logps, heldout), _in_order(heldout.logps, heldout)
    ideal, certain = (
        (None, None)
        if beta is None
        else (_mean(idealised_ranking_accuracy(before, beta=beta, alpha=a)) for a in (_preferred(heldout), 1.0))
    )
    change = displacement(now, before)
    contrastive = _rewards(_pair_logps(load_run(str(dpo)), heldout), logps, heldout) if dpo else None
    return Result(
        gold=tuple(golds(heldout.test, drawn)[:, 0].round(4).tolist()),
        kl=_mean(kl_of_samples(policy, heldout.sft, heldout.test, drawn)),
        valid=_mean([world.is_grammatical(text) for text in texts]),
        words=_mean([len(text.split()) for text in texts]),
        distinct=len(set(texts)) / len(texts),
        curve=(heldout.start, *(_point(load_run(f"{place}@{s}"), heldout.sft, heldout.tuning, s) for s in steps)),
        ranking=_mean(ranking_accuracy(now)),
        idealised=ideal,
        idealised_certain=certain,
        chosen_change=_mean(change.chosen),
        rejected_change=_mean(change.rejected),
        displaced=_mean(change.displaced),
        rewards=_rewards(logps, heldout.logps, heldout),
        contrastive=contrastive,
    )


def correlations(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Pearson's and Spearman's correlation, ties with their mean rank.

    Args:
        values: `[n]`, not all equal.
        truth: `[n]`, not all equal.
    """
    return float(stats.pearsonr(values, truth).statistic), float(stats.spearmanr(values, truth).statistic)


def _point(policy: Loaded, sft: Loaded, prompts: Sequence[str], step: int) -> Point:
    drawn = draw(policy, prompts, samples=1, seed=CURVE_SEED)
    valid = [world.is_grammatical(row[0].text.strip()) for row in drawn]
    kl = 0.0 if policy is sft else _mean(kl_of_samples(policy, sft, prompts, drawn))
    return Point(step, kl, _mean(golds(prompts, drawn)), _mean(valid))


def _credit(prompt: str, sample: Generation) -> np.ndarray | None:
    """True credit of a sample's tokens; None where it is no review, was cut off, or has tokens that are no words."""
    text = sample.text.strip()
    if not sample.finished or not world.is_grammatical(text) or len(text.split()) + 1 != sample.ids.size:
        return None
    return token_credit(prompt, text)


def _pair_logps(policy: Loaded, heldout: Heldout) -> Tokens:
    return token_logps(policy.lm, policy.params, heldout.pairs, one_device())


def _in_order(tokens: Tokens, heldout: Heldout) -> Array:
    """Summed log-probabilities of the pairs that gold tells apart, the better response first: `[pairs, 2]`."""
    sums = np.asarray([[values.sum(dtype=np.float64) for values in row] for row in tokens])
    order = np.argsort(-heldout.gold, axis=1)
    return jnp.asarray(np.take_along_axis(sums, order, axis=1)[_apart(heldout)], jnp.float32)


def _preferred(heldout: Heldout) -> Array:
    """How likely a Bradley-Terry person is to prefer the better response: `[pairs]`."""
    gap = np.abs(heldout.gold[:, 0] - heldout.gold[:, 1])[_apart(heldout)]
    return jnp.asarray(1 / (1 + np.exp(-gap)), jnp.float32)


def _apart(heldout: Heldout) -> np.ndarray:
    return heldout.gold[:, 0] != heldout.gold[:, 1]


def _rewards(of: Tokens, against: Tokens, heldout: Heldout) -> Rewards | None:
    """None where the two are the same model."""
    ratios = [a - b for x, y in zip(of, against, strict=True) for a, b in zip(x, y, strict=True)]
    if not any(np.any(ratio) for ratio in ratios):
        return None
    truth = [credit for row in heldout.credit for credit in row]
    known = [(r, t) for r, t in zip(ratios, truth, strict=True) if t is not None]
    columns = [np.concatenate(column) for column in zip(*known, strict=True)]
    pearson, spearman = correlations(*columns) if columns else (None, None)
    right = implicit_reward_accuracy(_in_order(of, heldout), _in_order(against, heldout))
    return Rewards(_mean(right), pearson, spearman)


def _mean(values) -> float:
    return float(np.mean(np.asarray(values, np.float64)))
