"""Lists of K responses: a prompt computed once against a prompt repeated before every response. C5.

    python -m benchmarks.lists

Policy, loss and gradient of DPO (K = 2) and LiPO's lambda loss, no optimizer; V = 2048, so that the layers dominate.
All sides are palign with the same weights and ids, and project response tokens only. *packed*: the prompt once.
*unshared*: the prompt before each response, the rest as in packed: what sharing alone saves. *repeated*: the same under
dense causal attention, a sequence a response and nothing padded, since all are equally long: what others do at best.

The token ratio, K (P + R) / (P + K R), is what the layers' products save. The head has as many targets either way, and
of attention's visits a shared prompt saves less than that, so *unshared / packed* lies below it.
"""

from benchmarks.driver import SECONDS, Contestant, Goal, Race, contestant, parse, run

SHAPES = [
    (128, 384, 2),
    (256, 256, 2),
    (384, 128, 2),
    (448, 64, 2),
    (128, 256, 4),
    (256, 128, 4),
    (384, 128, 4),
    (256, 128, 8),
    (256, 64, 8),
    (384, 64, 8),
]
AIMS = {(384, 128, 4): 2.3, (384, 64, 8): 4.0}
SLOTS = 4096  # tokens of a step, prompts repeated, at most
LAYOUTS = ("packed", "unshared", "repeated")


def token_ratio(prompt: int, response: int, responses: int) -> float:
    """Tokens with prompts repeated over tokens with prompts once."""
    return responses * (prompt + response) / (prompt + responses * response)


def race(shape: tuple[int, int, int], flags) -> Race:
    prompt, response, responses = shape
    ratio = token_ratio(*shape)
    rows = 1 if flags.tiny else SLOTS // (responses * (prompt + response))
    sizes = dict(prompt=prompt, response=response, responses=responses, rows=rows, seed=flags.seed)
    sizes |= dict(method="dpo" if responses == 2 else "lipo_lambda", optimizer="none")
    sizes |= dict(width=32, layers=2) if flags.tiny else {}

    def side(layout: str) -> Contestant:
        arguments = [f"--{name}={value}" for name, value in sizes.items()]
        return contestant(layout, "equal_trees", *arguments, f"--layout={layout}")

    goals = [
        Goal("C5, token ratio", SECONDS, ("repeated",), "packed", at_least=round(ratio, 2)),
        Goal("sharing alone", SECONDS, ("unshared",), "packed"),
    ]
    if shape in AIMS:
        goals.insert(1, Goal("C5", SECONDS, ("repeated",), "packed", at_least=AIMS[shape]))
    title = f"P {prompt}, R {response}, K {responses}"
    return Race(title, tuple(map(side, LAYOUTS)), flags.rounds, tuple(goals), unit="lists")


def main() -> None:
    flags = parse(__doc__, rounds=3)
    run("lists", [race(shape, flags) for shape in ([(64, 64, 2)] if flags.tiny else SHAPES)], flags)


if __name__ == "__main__":
    main()
