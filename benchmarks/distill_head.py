"""The fused divergence head against full logits: AlignDistil's loss and gradients. C8.

    python -m benchmarks.distill_head
    python -m benchmarks.distill_head --peers-python=.venv-peers/bin/python --width=1024 --vocabulary 128000

Hidden states of a student, a DPO model and a reverse DPO model at T targets, and their unembeddings, go in; the mean
loss and its gradients with respect to the student's two come out. `contestants/distill_jax.py` says what the sides are.
Temporary memory is what the compiler plans for `--plan-targets`, without running: full logits of so many targets may
not fit the machine. The peak is of `--targets`.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.driver import RELATIVE, SECONDS, Goal, Race, contestant, parse, run

FUSED, DENSE, TEXTBOOK, TORCH = "fused", "dense", "textbook", "PyTorch"
TOLERANCES = {"loss": (RELATIVE, 1e-5), "dhidden": (RELATIVE, 1e-3), "dkernel": (RELATIVE, 1e-3)}
AIM_PLANNED = 3.0  # C8: how many times less memory at least


def add_flags(parser: Any) -> None:
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32000, 128000])
    parser.add_argument("--targets", type=int, default=1024, help="targets of the timed runs")
    parser.add_argument("--plan-targets", type=int, default=8192, help="targets for which memory is planned")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=256)


def race(vocabulary: int, flags: Any) -> Race:
    targets, planned, width, chunk = flags.targets, flags.plan_targets, flags.width, flags.chunk
    if flags.tiny:
        vocabulary, targets, planned, width, chunk = 300, 64, 128, 16, 32
    shared = [f"--vocabulary={vocabulary}", f"--targets={targets}", f"--width={width}", f"--seed={flags.seed}"]
    ours = [*shared, f"--chunk={chunk}", f"--plan-targets={planned}"]
    sides = [contestant(side, "distill_jax", *ours, f"--side={side}") for side in (FUSED, DENSE, TEXTBOOK)]
    sides.append(contestant(TORCH, "distill_torch", *shared, python=flags.peers_python))
    goals = (
        Goal("C8", SECONDS, (DENSE, TEXTBOOK), FUSED, at_least=1.1),
        Goal("closed forms alone", SECONDS, (DENSE,), FUSED),
        Goal("official formulas", SECONDS, (TORCH,), FUSED),
    )
    title = f"V {vocabulary}, {targets} targets, width {width}"
    return Race(title, tuple(sides), flags.rounds, goals, unit="targets", tolerances=TOLERANCES)


def planned_table(races: list[Mapping[str, Any]]) -> str:
    """What the compiler plans, as Markdown."""
    lines = [
        "| | side | temporaries | fused's share of them | with gradients, / fused | C8 |",
        "|---|---|---|---|---|---|",
    ]
    for each in races:
        plans = {name: side["rounds"][0]["work"] for name, side in each["contestants"].items()}
        ours = plans[FUSED]
        for name in (FUSED, DENSE, TEXTBOOK):
            temporary, results = plans[name]["planned_temporary"], plans[name]["planned_results"]
            ratio = (temporary + results) / (ours["planned_temporary"] + ours["planned_results"])
            share = f"{ours['planned_temporary'] / temporary:.1%}"
            met = "-" if name == FUSED else f"at least {AIM_PLANNED:g}: {'yes' if ratio >= AIM_PLANNED else 'no'}"
            lines.append(f"| {each['title']} | {name} | {temporary / 2**20:,.0f} MiB | {share} | {ratio:.1f} | {met} |")
    return "\n".join(lines)


def main() -> None:
    flags = parse(__doc__, rounds=5, add=add_flags)
    vocabularies = flags.vocabulary[:1] if flags.tiny else flags.vocabulary
    result = run("distill_head", [race(vocabulary, flags) for vocabulary in vocabularies], flags)
    print(f"\n{planned_table(result['races'])}")


if __name__ == "__main__":
    main()
