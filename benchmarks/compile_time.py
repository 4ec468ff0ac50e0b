"""What compiling the DPO step takes, from nothing and from the persistent cache, and whether an epoch ever compiles.

    python -m benchmarks.compile_time

Every figure is of a process of its own: in each round one with an empty cache directory, then one that finds there what
the first has left. CPU seconds on a pinned core. The last process goes on through an epoch of rows of realistic
lengths, the last step filled with empty rows, and counts the programs that JAX compiles on the way.

C9: 4 s from nothing, 0.3 s from the cache, 0 compilations after the first step.
"""

import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import cases, driver, single

COLD, WARM = "nothing", "the cache"
GOALS = {COLD: 4.0, WARM: 0.3}  # seconds


def main() -> None:
    flags = driver.parse(__doc__, rounds=3)
    before, cores = os.getloadavg(), driver.choose_cores(flags.cores)
    rounds = []
    for r in range(flags.rounds):
        with tempfile.TemporaryDirectory(prefix="palign-compiled-") as cache:
            rounds.append({name: first_step(name, contestant(flags, cache), cores) for name in (COLD, WARM)})
            if r == flags.rounds - 1:
                epoch = walk(contestant(flags, cache), cores)
    goals = [judge(name, rounds) for name in GOALS]
    goals.append({"id": "C9, an epoch", "compilations": epoch["compilations"], "met": epoch["compilations"] == 0})
    tables = tabulate(rounds, goals, epoch)
    single.write("compile_time", flags, cores, before, tables, rounds=rounds, epoch=epoch, goals=goals)


def contestant(flags: Any, cache: str) -> driver.Contestant:
    geometry, tokens, pairs = (cases.TINY, 128, 6) if flags.tiny else (cases.Geometry(), 1024, 24)
    sizes = ("--geometry", *map(str, geometry), f"--tokens={tokens}", "--rows=2", f"--pairs={pairs}")
    return driver.contestant("palign", "compile_step", f"--cache={cache}", f"--seed={flags.seed}", *sizes)


def first_step(name: str, contestant: driver.Contestant, cores: Sequence[int]) -> dict[str, float]:
    """Compiles the step in a new process; CPU and wall seconds, tracing apart."""
    with driver.start(contestant, cores) as worker:
        worker.read()
        return worker.step(0)["values"]


def walk(contestant: driver.Contestant, cores: Sequence[int]) -> dict[str, Any]:
    """An epoch in a new process: what each step holds, and how often something was compiled after the first."""
    with driver.start(contestant, cores) as worker:
        worker.read()
        steps = int(worker.step(0)["values"]["steps"])
        answers = [worker.step(i) for i in range(steps, 2 * steps)]  # the plan's steps 0, 1, ...
    compiled = [answer["values"]["compiled"] for answer in answers]
    return {
        "steps": steps,
        "targets": [answer["work"]["targets"] for answer in answers],
        "compilations": compiled[-1] - compiled[0],
    }


def judge(name: str, rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """C9's bound on compiling, by the median of the rounds."""
    taken = statistics.median(each[name]["compile_cpu"] for each in rounds)
    return {"id": f"C9, from {name}", "seconds": taken, "at_most": GOALS[name], "met": taken <= GOALS[name]}


def tabulate(rounds: Sequence[Mapping[str, Mapping[str, float]]], goals: Sequence[Any], epoch: Mapping) -> str:
    lines = [f"**The DPO step compiled** (medians of {len(rounds)} rounds, seconds)", ""]
    lines += ["| from | tracing, CPU | compiling, CPU | compiling, wall | bound | met |", "|---|---|---|---|---|---|"]
    for name, goal in zip(GOALS, goals, strict=False):
        keys = ("trace_cpu", "compile_cpu", "compile_wall")
        cells = [f"{statistics.median(each[name][key] for each in rounds):.2f}" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} | {goal['at_most']} | {'yes' if goal['met'] else 'no'} |")
    fewest, most = min(epoch["targets"]), max(epoch["targets"])
    lines += ["", f"C9, {epoch['steps']} steps of {fewest:,} to {most:,} targets: {epoch['compilations']} compilations"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
