"""The DPO step on pairs of one shape: what each trainer takes for the very same tokens, and what it keeps in memory.

    python -m benchmarks.equal_shapes                                   # plain JAX and palign
    python -m benchmarks.equal_shapes --peers-python=.venv-peers/bin/python

Two pairs of a prompt of 256 and responses of 256 tokens; eight for the memory. "palign, unshared" has the prompt again
before every response, so all compute the very same; "palign" has it once.

Nobody computes layers again in the backward of two pairs, where memory is no concern (palign: `model.remat=dots`);
with eight, palign has its default, which does.
"""

import functools

from benchmarks import cases, driver
from benchmarks.driver import MEMORY, SECONDS, Contestant, Goal, Race, contestant

TRL = "TRL"
EAGER, COMPILED = "PyTorch loop", "PyTorch loop, compiled"
PLAIN, UNSHARED, PALIGN = "plain JAX", "palign, unshared", "palign"


def main() -> None:
    flags = driver.parse(__doc__, rounds=7)
    geometry = cases.TINY if flags.tiny else cases.Geometry()
    length = 16 if flags.tiny else 256  # of a prompt, and of a response
    few = min(flags.rounds, 2)
    draw = functools.partial(
        cases.equal, prompt=length, response=length, vocabulary=geometry.vocabulary, seed=flags.seed
    )
    two, eight = draw(2, rounds=flags.rounds + 1), draw(8, rounds=few + 1)
    with cases.written(geometry, two) as of_two, cases.written(geometry, eight) as of_eight:
        make = functools.partial(contestants, length=length, peers=flags.peers_python)
        races = [
            live(make(f"--case={of_two}", pairs=2, remat="dots"), flags.rounds),
            cached(make(f"--case={of_two}", "--reference=cached", pairs=2, remat="dots"), flags.rounds),
            memory(make(f"--case={of_eight}", pairs=8, remat="full"), few),
        ]
        driver.run("equal_shapes", races, flags)


def contestants(*flags: str, pairs: int, remat: str, length: int, peers: str | None) -> dict[str, Contestant]:
    """All of them, by name, at one shape and with the same flags."""

    def palign(name: str, layout: str, tokens: int) -> Contestant:
        sizes = (f"--tokens={-(-tokens // 64) * 64}", f"--rows={pairs}", f"--remat={remat}")
        return contestant(name, "palign_step", *flags, f"--layout={layout}", *sizes)

    batch = f"--batch={pairs}"
    return {
        TRL: contestant(TRL, "trl_trainer", *flags, batch, python=peers),
        EAGER: contestant(EAGER, "torch_loop", *flags, batch, python=peers),
        COMPILED: contestant(COMPILED, "torch_loop", *flags, batch, "--compile", python=peers),
        PLAIN: contestant(PLAIN, "plain_jax", *flags, batch),
        UNSHARED: palign(UNSHARED, "unshared", 4 * length),
        PALIGN: palign(PALIGN, "packed", 3 * length),
    }


def live(sides: dict[str, Contestant], rounds: int) -> Race:
    goals = (
        Goal("C1", SECONDS, (TRL,), UNSHARED, at_least=2.2),
        Goal("C2", SECONDS, (EAGER, COMPILED), UNSHARED, at_least=1.15),
        Goal("prompt shared", SECONDS, (TRL,), PALIGN),
        Goal("prompt shared", SECONDS, (EAGER, COMPILED), PALIGN),
        Goal("prompt shared", SECONDS, (UNSHARED,), PALIGN),
        Goal("plain JAX", SECONDS, (PLAIN,), UNSHARED),
        Goal("peak memory", MEMORY, (UNSHARED,), PLAIN),
    )
    return Race("2 pairs, the reference computed in every step", tuple(sides.values()), rounds, goals)


def cached(sides: dict[str, Contestant], rounds: int) -> Race:
    entered = tuple(sides[name] for name in (TRL, EAGER, UNSHARED, PALIGN))
    goals = (
        Goal("C3", SECONDS, (TRL,), UNSHARED, at_least=2.1),
        Goal("prompt shared", SECONDS, (TRL,), PALIGN),
        Goal("prompt shared", SECONDS, (EAGER,), PALIGN),
    )
    return Race("2 pairs, the reference computed before", entered, rounds, goals)


def memory(sides: dict[str, Contestant], rounds: int) -> Race:
    entered = tuple(sides[name] for name in (TRL, EAGER, UNSHARED, PALIGN))
    goals = (
        Goal("C6", MEMORY, (UNSHARED,), TRL, at_most=0.35),
        Goal("C6, PyTorch", MEMORY, (UNSHARED,), EAGER, at_most=0.5),
        Goal("prompt shared", MEMORY, (PALIGN,), TRL),
        Goal("speed", SECONDS, (TRL,), UNSHARED),
        Goal("speed", SECONDS, (EAGER,), UNSHARED),
    )
    return Race("8 pairs, for the memory", entered, rounds, goals)


if __name__ == "__main__":
    main()
