"""Tokens per second of sampling K continuations of every prompt: palign against `transformers.generate`.

    python -m benchmarks.sampling --peers-python=.venv-peers/bin/python

The same weights, prompts of 64 to 256 tokens and as many new tokens (nothing ends a sample early). Round 0 is greedy on
both sides, and its ids must be equal to the letter, or no figure is printed. *greedy* goes on so; *drawn* draws from
the whole distribution at temperature 1 after it, as on-policy methods do. palign sums log-probabilities besides. Its
`recompilations` are counted in every round.
"""

from benchmarks import cases
from benchmarks.contestants.prompts import draw_prompts
from benchmarks.driver import SECONDS, Goal, Race, contestant, parse, run

PROMPTS = 8  # of a batch
SAMPLES = (1, 4, 8)
TEMPERATURES = {"greedy": 0.0, "drawn": 1.0}


def races(flags, case) -> list[Race]:
    new_tokens = 4 if flags.tiny else 64

    def race(how: str, samples: int) -> Race:
        arguments = [f"--case={case}", f"--samples={samples}", f"--new-tokens={new_tokens}"]
        arguments.append(f"--temperature={TEMPERATURES[how]}")
        sides = (
            contestant("palign", "sample_palign", *arguments),
            contestant("transformers", "sample_transformers", *arguments, python=flags.peers_python),
        )
        goal = Goal("sampling", SECONDS, ("transformers",), "palign", at_least=1.0)
        compared = 1 if TEMPERATURES[how] else None
        title = f"{how}, K {samples}, {new_tokens} new tokens"
        return Race(title, sides, flags.rounds, (goal,), unit="tokens", compared=compared, tolerances={})

    return [race(how, samples) for how in TEMPERATURES for samples in SAMPLES]


def main() -> None:
    flags = parse(__doc__, rounds=5)
    geometry, sizes = (cases.TINY, (4, 9)) if flags.tiny else (cases.Geometry(), (64, 256))
    prompts = draw_prompts(PROMPTS, sizes, vocabulary=geometry.vocabulary, rounds=flags.rounds + 1, seed=flags.seed)
    with cases.written(geometry, prompts) as case:
        run("sampling", races(flags, case), flags)


if __name__ == "__main__":
    main()
