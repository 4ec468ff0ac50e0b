"""How good the quick start's models are: gold reward, win rate, KL, grammar, ranking, on held-out prompts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from palign.data import world
from palign.eval.score import ranked_right, sequence_logps
from palign.eval.winrate import Interval, mean_interval, ranking_accuracy, wilson_interval, win_rate
from palign.recipes.world_runs import Drawn, as_rows, checkpoint_steps, draw, golds, kl_of_samples, one_device, trees
from palign.train.metrics import Reporter, read_metrics
from palign.train.sources import Loaded, load_run

TRAJECTORY_PROMPTS = 128
CONTROL = "sft again"  # the SFT model's other samples: what no improvement looks like


class Scores(NamedTuple):
    """One model's row of the table."""

    gold: Interval
    win_rate: Interval  # over SFT's samples on the same prompts
    kl: Interval  # nats a response, to SFT
    valid: Interval
    length: Interval  # words
    distinct: float  # share of responses that nobody else got
    ranking: Interval  # held-out pairs, by gold, that the model's log-probabilities put right
    tokens_per_second: float  # of training
    trajectory: tuple[tuple[float, float], ...]  # (KL, gold) of earlier checkpoints
    texts: tuple[str, ...]


class _Held(NamedTuple):
    """What all models are measured on."""

    prompts: Sequence[str]
    sft: Loaded
    baseline: np.ndarray  # gold of SFT's samples
    pairs: Any  # two more samples of SFT for every prompt
    pair_gold: np.ndarray


def score_models(workdir: epath.Path, places: Mapping[str, epath.Path], prompts: Sequence[str]) -> dict[str, Scores]:
    """Scores SFT, SFT against itself, and every method; keeps the numbers in `scores.json`."""
    sft = load_run(str(places["sft"]))
    checkpoints = sum(len(checkpoint_steps(place)) for name, place in places.items() if name != "sft")
    total = (len(places) + 2) * len(prompts) + checkpoints * min(TRAJECTORY_PROMPTS, len(prompts))
    with Reporter("evaluation", total) as progress:
        ticker = _Ticker(progress)
        first = _draw(sft, prompts, 1, 10, ticker)
        two = _draw(sft, prompts, 2, 11, ticker)
        pairs = as_rows(trees(sft, prompts, two))
        held = _Held(prompts, sft, golds(prompts, first)[:, 0], pairs, golds(prompts, two))
        scores = {"sft": _score(held, sft, places["sft"], first)}
        again = _draw(sft, prompts, 1, 12, ticker)
        scores[CONTROL] = _score(held, sft, places["sft"], again)
        for name, place in places.items():
            if name != "sft":
                loaded = load_run(str(place))
                drawn = _draw(loaded, prompts, 1, 13, ticker)
                scores[name] = _score(held, loaded, place, drawn)._replace(trajectory=_trajectory(held, place, ticker))
    (workdir / "scores.json").write_text(json.dumps({k: v._replace(texts=()) for k, v in scores.items()}, indent=1))
    return scores


class _Ticker:
    """Several passes over prompts on one bar."""

    def __init__(self, progress: Reporter):
        self._progress, self._done = progress, 0

    def over(self, num_prompts: int) -> "_Pass":
        """The next pass; it starts where the last one ended."""
        start, self._done = self._done, self._done + num_prompts
        return _Pass(self._progress, start)


class _Pass(NamedTuple):
    progress: Reporter
    start: int

    def advance(self, done: int, amount: float) -> None:
        """What `generate` calls."""
        self.progress.advance(self.start + done, amount)


def _draw(loaded: Loaded, prompts: Sequence[str], samples: int, seed: int, ticker: _Ticker) -> Drawn:
    return draw(loaded, prompts, samples=samples, seed=seed, progress=ticker.over(len(prompts)))


def _score(held: _Held, loaded: Loaded, place: epath.Path, drawn: Drawn) -> Scores:
    gold = golds(held.prompts, drawn)[:, 0]
    texts = tuple(row[0].text.strip() for row in drawn)
    logps = sequence_logps(loaded.lm, loaded.params, held.pairs, one_device())
    valid = sum(world.is_grammatical(text) for text in texts)
    rates = [line["tokens_per_second"] for line in read_metrics(place) if "tokens_per_second" in line]
    return Scores(
        gold=mean_interval(gold),
        win_rate=win_rate(gold, held.baseline),
        kl=mean_interval(kl_of_samples(loaded, held.sft, held.prompts, drawn)),
        valid=wilson_interval(valid, len(texts)),
        length=mean_interval([len(text.split()) for text in texts]),
        distinct=len(set(texts)) / len(texts),
        ranking=ranking_accuracy(*ranked_right(logps, held.pair_gold.tolist())),
        tokens_per_second=rates[-1] if rates else float("nan"),
        trajectory=(),
        texts=texts,
    )


def _trajectory(held: _Held, place: epath.Path, ticker) -> tuple[tuple[float, float], ...]:
    """(KL, gold) of the checkpoints on the way, from the SFT model on."""
    prompts = held.prompts[:TRAJECTORY_PROMPTS]
    points = [(0.0, float(held.baseline.mean()))]
    for step in checkpoint_steps(place):
        loaded = load_run(f"{place}@{step}")
        drawn = _draw(loaded, prompts, 1, 13, ticker)
        kl = kl_of_samples(loaded, held.sft, prompts, drawn)
        points.append((float(kl.mean()), float(golds(prompts, drawn).mean())))
    return tuple(points)
