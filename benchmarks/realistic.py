"""Pairs of realistic lengths, end to end: the same pairs for everybody, batched by each as it does, collation included.

    python -m benchmarks.realistic                                      # plain JAX and palign
    python -m benchmarks.realistic --peers-python=.venv-peers/bin/python --seed=1

Lengths are log-normal (sigma 0.8) around the medians of UltraFeedback (107 / 272 / 239) and HH (119 / 49 / 49); a
prompt and one response are cut to 1024 tokens together. A round is a set of pairs. TRL and the PyTorch loop take 8
pairs a batch, as they come, padded to the longest of the batch; plain JAX takes 4, because of its logits, padded
further to a multiple of 128, each length compiled before; palign packs whole trees into rows of 2048. Round 0 is one
batch for everybody, and loss and gradient norm are compared there; later everybody has batches of its own. Without
peers it takes HH-like lengths alone: plain JAX needs minutes for the others.

On a GPU this is H3: a model of 1.5 billion parameters in bfloat16 against TRL, whose batches are of 4 pairs and which
computes its layers again in the backward, as palign does, so that both fit.
"""

import contextlib
from typing import NamedTuple

from benchmarks import cases, driver
from benchmarks.driver import MEMORY, SECONDS, Contestant, Goal, Race, contestant

TRL, EAGER, PLAIN, PALIGN = "TRL", "PyTorch loop", "plain JAX", "palign"
BATCHES = {TRL: 8, EAGER: 8, PLAIN: 4}  # pairs
NAMES = {"uf": "UltraFeedback-like", "hh": "HH-like"}


class Sizes(NamedTuple):
    """Of a round and of palign's batches."""

    pairs: int
    rows: int


# Rows of a step so that all take about as many steps, and so optimizer updates, for a round.
SIZES = {"uf": Sizes(pairs=16, rows=4), "hh": Sizes(pairs=32, rows=1)}
TINY = {"uf": Sizes(pairs=4, rows=2), "hh": Sizes(pairs=4, rows=1)}
SPEED = {"uf": 4.5, "hh": 5.0}  # goal C4: how many times TRL's pairs per second
PRECOMPUTED = 3.5  # where both compute the reference before


def main() -> None:
    flags = driver.parse(__doc__, 3, lambda parser: parser.add_argument("--lengths", choices=SIZES, help="only these"))
    scale = cases.choose_scale(tiny=flags.tiny)
    longest, tokens = (64, 128) if flags.tiny else (1024, 2048)
    chosen = SIZES if flags.peers_python else ["hh"]
    with contextlib.ExitStack() as stack:
        races = []
        for lengths in [flags.lengths] if flags.lengths else chosen:
            sizes = (TINY if flags.tiny else SIZES)[lengths]
            drawn = cases.realistic(
                lengths,
                sizes.pairs,
                longest=longest,
                first=(min(BATCHES.values()), tokens),
                vocabulary=scale.geometry.vocabulary,
                rounds=flags.rounds + 1,
                seed=flags.seed,
            )
            case = stack.enter_context(cases.written(scale.geometry, drawn, dtype=scale.dtype))
            of_case = on_gpu if scale == cases.BIG else races_of
            races += of_case(lengths, f"--case={case}", tokens, sizes, flags)
        driver.run("realistic", races, flags)


def races_of(lengths: str, case: str, tokens: int, sizes: Sizes, flags) -> list[Race]:
    """Three races, so that not everybody's memory is taken at once; the last needs no peers."""

    def peer(name: str, module: str, *more: str) -> Contestant:
        return contestant(name, module, case, f"--batch={BATCHES[name]}", *more, python=flags.peers_python)

    def palign(*more: str) -> Contestant:
        return contestant(PALIGN, "palign_step", case, f"--tokens={tokens}", f"--rows={sizes.rows}", *more)

    def race(title: str, *entered: Contestant, goals: tuple[Goal, ...]) -> Race:
        return Race(f"{NAMES[lengths]}, {title}", entered, flags.rounds, goals, compared=1)

    live = race(
        "the reference computed in every step",
        peer(TRL, "trl_trainer"),
        peer(EAGER, "torch_loop"),
        palign(),
        goals=(
            Goal("C4", SECONDS, (TRL,), PALIGN, at_least=SPEED[lengths]),
            Goal("PyTorch", SECONDS, (EAGER,), PALIGN),
            Goal("memory", MEMORY, (PALIGN,), TRL),
        ),
    )
    cached = race(
        "the reference computed before",
        peer(TRL, "trl_trainer", "--reference=cached"),
        palign("--reference=cached"),
        goals=(Goal("C4, precomputed", SECONDS, (TRL,), PALIGN, at_least=PRECOMPUTED),),
    )
    plain = race(
        "against plain JAX",
        contestant(PLAIN, "plain_jax", case, f"--batch={BATCHES[PLAIN]}", "--multiple=128"),
        palign(),
        goals=(Goal("plain JAX", SECONDS, (PLAIN,), PALIGN), Goal("memory", MEMORY, (PALIGN,), PLAIN)),
    )
    return [live, cached, plain] if flags.peers_python else [plain]


def on_gpu(lengths: str, case: str, tokens: int, sizes: Sizes, flags) -> list[Race]:
    """H3, with a live and with a cached reference."""
    races = []
    for reference in ("live", "cached"):
        shared = (case, f"--reference={reference}")
        trl = contestant(TRL, "trl_trainer", *shared, "--batch=4", "--checkpointing", python=flags.peers_python)
        palign = contestant(PALIGN, "palign_step", *shared, f"--tokens={tokens}", f"--rows={sizes.rows}", "--block=128")
        goals = (Goal("H3", SECONDS, (TRL,), PALIGN, at_least=3.0), Goal("memory", MEMORY, (PALIGN,), TRL))
        title = f"{NAMES[lengths]}, 1.5 billion parameters, bfloat16, {reference} reference"
        entered, tolerances = (trl, palign), cases.BIG.tolerances
        races.append(Race(title, entered, flags.rounds, goals, compared=1, tolerances=tolerances))
    return races


if __name__ == "__main__":
    main()
