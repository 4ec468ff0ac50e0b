"""What both samplers share: their flags, prompts as one array, and the step. A case's pairs have empty responses."""

import argparse
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import cases
from benchmarks.worker import Done

NOTHING = np.zeros(0, np.int32)


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--case", type=pathlib.Path, required=True)
    parser.add_argument("--samples", type=int, required=True, help="K, of every prompt")
    parser.add_argument("--new-tokens", type=int, required=True, help="of every sample; none ends before")
    parser.add_argument("--temperature", type=float, default=0.0, help="from round 1 on; round 0 is greedy")
    return parser.parse_args()


def draw_prompts(number: int, sizes: tuple[int, int], *, vocabulary: int, rounds: int, seed: int) -> cases.Rounds:
    """Prompts of random lengths from `sizes[0]` to `sizes[1]`; every round has a longest one."""
    rng = np.random.default_rng(seed)

    def draw(size: int) -> cases.Pair:
        return cases.Pair(rng.integers(1, vocabulary, size=size, dtype=np.int32), NOTHING, NOTHING)

    lengths = [[sizes[1], *rng.integers(sizes[0], sizes[1], size=number - 1, endpoint=True)] for _ in range(rounds)]
    return [[draw(int(size)) for size in each] for each in lengths]


def pad(pairs: Sequence[cases.Pair], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[B, P]` with zeros on the `side` "left" or "right", and which are real."""
    longest = max(pair.prompt.size for pair in pairs)
    token, real = np.zeros((len(pairs), longest), np.int32), np.zeros((len(pairs), longest), bool)
    for row, (prompt, *_) in enumerate(pairs):
        place = slice(longest - prompt.size, None) if side == "left" else slice(prompt.size)
        token[row, place], real[row, place] = prompt, True
    return token, real


def make_step(
    flags: argparse.Namespace, draw: Callable[[int, float], np.ndarray], count: Callable[[], dict[str, float]] = dict
) -> Callable[[int], Done]:
    """A contestant's step: `draw(round, temperature)` gives ids `[B, K, N]`; `count()` is reported beside them."""
    rounds = cases.read_rounds(flags.case)

    def take(index: int) -> Done:
        ids = draw(index, flags.temperature if index else 0.0)
        work = {"tokens": ids.size, "samples": len(rounds[index]) * flags.samples}
        drawn = cases.digest([cases.Pair(row, NOTHING, NOTHING) for row in ids.reshape(-1, flags.new_tokens)])
        return Done({}, work | count(), {"prompts": cases.digest(rounds[index]), "ids": drawn})

    return take
