"""How good the quick start's models are: gold reward, win rate, KL, grammar, ranking, on held-out prompts."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from palign.data import world
from palign.data.tokenize import TokenTree
from palign.eval.score import as_dataset, ranked_right, sequence_kl, sequence_logps
from palign.eval.winrate import Interval, mean_interval, ranking_accuracy, wilson_interval, win_rate
from palign.generate.texts import Generation, generate
from palign.sharding.mesh import make_mesh
from palign.train.checkpoint import FOLDER
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
    pair_gold: list[list[float]]
    max_new_tokens: int


def score_models(
    workdir: pathlib.Path, places: Mapping[str, pathlib.Path], prompts: Sequence[str], max_new_tokens: int
) -> dict[str, Scores]:
    """Scores SFT, SFT against itself, and every method; keeps the numbers in `scores.json`."""
    sft = load_run(str(places["sft"]))
    checkpoints = sum(len(_steps(place)) for name, place in places.items() if name != "sft")
    total = (len(places) + 2) * len(prompts) + checkpoints * min(TRAJECTORY_PROMPTS, len(prompts))
    with Reporter("evaluation", total) as progress:
        ticker = _Ticker(progress)
        first = _draw(sft, prompts, 1, 10, max_new_tokens, ticker)
        two = _draw(sft, prompts, 2, 11, max_new_tokens, ticker)
        trees = [_tree(sft, p, row, i) for i, (p, row) in enumerate(zip(prompts, two, strict=True))]
        held = _Held(prompts, sft, _gold(prompts, first), _dataset(trees), _golds(prompts, two), max_new_tokens)
        scores = {"sft": _score(held, sft, places["sft"], first)}
        again = _draw(sft, prompts, 1, 12, max_new_tokens, ticker)
        scores[CONTROL] = _score(held, sft, places["sft"], again)
        for name, place in places.items():
            if name != "sft":
                loaded = load_run(str(place))
                drawn = _draw(loaded, prompts, 1, 13, max_new_tokens, ticker)
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


def _draw(loaded, prompts, samples, seed, max_new_tokens, ticker) -> list[list[Generation]]:
    return generate(
        loaded.lm,
        loaded.params,
        loaded.tokenizer,
        prompts,
        samples=samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=128,
        progress=ticker.over(len(prompts)),
    )


def _score(held: _Held, loaded: Loaded, place: pathlib.Path, drawn: list[list[Generation]]) -> Scores:
    gold = _gold(held.prompts, drawn)
    texts = tuple(row[0].text.strip() for row in drawn)
    logps = sequence_logps(loaded.lm, loaded.params, held.pairs, _mesh())
    valid = sum(world.is_grammatical(text) for text in texts)
    rates = [line["tokens_per_second"] for line in read_metrics(place) if "tokens_per_second" in line]
    return Scores(
        gold=mean_interval(gold),
        win_rate=win_rate(gold, held.baseline),
        kl=mean_interval(_kl(held, loaded, held.prompts, drawn)),
        valid=wilson_interval(valid, len(texts)),
        length=mean_interval([len(text.split()) for text in texts]),
        distinct=len(set(texts)) / len(texts),
        ranking=ranking_accuracy(*ranked_right(logps, held.pair_gold)),
        tokens_per_second=rates[-1] if rates else float("nan"),
        trajectory=(),
        texts=texts,
    )


def _trajectory(held: _Held, place: pathlib.Path, ticker) -> tuple[tuple[float, float], ...]:
    """(KL, gold) of the checkpoints on the way, from the SFT model on."""
    prompts = held.prompts[:TRAJECTORY_PROMPTS]
    points = [(0.0, float(held.baseline.mean()))]
    for step in _steps(place):
        loaded = load_run(f"{place}@{step}")
        drawn = _draw(loaded, prompts, 1, 13, held.max_new_tokens, ticker)
        points.append((float(np.mean(_kl(held, loaded, prompts, drawn))), float(_gold(prompts, drawn).mean())))
    return tuple(points)


def _steps(place: pathlib.Path) -> list[int]:
    return sorted(int(d.name) for d in (place / FOLDER).iterdir() if d.name.isdigit())


def _kl(held: _Held, loaded: Loaded, prompts, drawn) -> np.ndarray:
    trees = [_tree(loaded, p, row, i) for i, (p, row) in enumerate(zip(prompts, drawn, strict=True))]
    sums = sequence_kl(loaded.lm, loaded.params, held.sft.params, _dataset(trees), _mesh())
    return np.asarray([values[0] for values in sums])


def _tree(loaded: Loaded, prompt: str, row: list[Generation], index: int) -> TokenTree:
    """The ids as they were drawn: never decoded and tokenised again."""
    start = [] if loaded.tokenizer.bos_id is None else [loaded.tokenizer.bos_id]
    ids = np.asarray(start + loaded.tokenizer.encode(prompt), np.int32)
    return TokenTree(ids, tuple(sample.ids for sample in row), (0.0,) * len(row), index)


def _dataset(trees):
    return as_dataset(trees, row_length=512, rows_per_step=8, block=32)


def _mesh():
    import jax

    return make_mesh(data=1, devices=jax.devices()[:1])


def _golds(prompts, drawn) -> list[list[float]]:
    return [[world.gold_reward(p, s.text.strip()) for s in row] for p, row in zip(prompts, drawn, strict=True)]


def _gold(prompts, drawn) -> np.ndarray:
    return np.asarray([row[0] for row in _golds(prompts, drawn)])
