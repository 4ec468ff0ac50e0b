"""The race: contestants in processes of their own, stepped in turn, compared only where they computed the same.

A question is a file beside this one. It lists `Race`s of `Contestant`s with the `Goal`s that they must meet, and calls
`run`, which prints tables and writes `results/NAME.json`. Every contestant is a worker (`benchmarks.worker`) with an
interpreter and a command line of its own; all stay alive, pinned to the same cores, and take step 0, 1, 2, ... one
after another, in alternating order, so that whatever else the machine does falls on all of them. Step 0 compiles and is
dropped. Only ratios of one round mean anything on a shared machine: their min, median and max over the rounds.

Weights, token ids, loss and gradient norm are compared in the run itself: where two contestants differ there is no
ratio, but one line that says in what, and exit code 2. Standard library only.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import pathlib
import platform
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from benchmarks.worker import PIPE

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ABSOLUTE, RELATIVE = "absolute", "relative"
TOLERANCES = {"loss": (ABSOLUTE, 1e-4), "grad_norm": (RELATIVE, 1e-3)}
SECONDS, MEMORY = "seconds", "memory"
PEAKS = ("peak", "device_peak")
LONGEST_STEP = 1800  # seconds after which a worker counts as hung
LAST_LINES = 5
PLACES = ("peers_python", "out")  # flags that say where things are on this machine
Answers = Mapping[str, Mapping[str, Any]]  # contestant -> what its worker said


@dataclass(frozen=True)
class Contestant:
    """One side of a race.

    Attributes:
        name: as tables call it.
        command: what starts its worker; None: it needs what this run was not given, and is left out.
    """

    name: str
    command: tuple[str, ...] | None


@dataclass(frozen=True)
class Goal:
    """A ratio of two contestants and where it should lie; a contestant that the run leaves out leaves the goal out.

    Attributes:
        id: its name in the table of goals.
        measure: SECONDS for a unit of work, of the CPU where contestants compute there, else of the wall; MEMORY, the
            process's or the accelerator's peak likewise; or "cpu", "wall", "peak", "device_peak" wherever they compute.
        over: whose measure is divided; of several, the best one.
        under: by whose measure.
        at_least: the ratio should not be below; None: it is shown and has no bound.
        at_most: the ratio should not be above.
    """

    id: str
    measure: str
    over: tuple[str, ...]
    under: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Race:
    """Contestants that do the same work.

    Attributes:
        title: of the table.
        contestants: at least one.
        rounds: steps that count, after the one that does not.
        goals: what is asked of their ratios.
        unit: the work (a name in `Done.work`) that seconds are divided by.
        compared: of how many rounds, from the dropped one on, `values` and `same` are compared; None: of all.
        tolerances: name in `Done.values` -> (ABSOLUTE or RELATIVE, how far apart it may be).
    """

    title: str
    contestants: tuple[Contestant, ...]
    rounds: int
    goals: tuple[Goal, ...] = ()
    unit: str = "pairs"
    compared: int | None = None
    tolerances: Mapping[str, tuple[str, float]] = field(default_factory=lambda: TOLERANCES)


def contestant(name: str, module: str, *flags: str, python: str | None = sys.executable) -> Contestant:
    """The contestant `benchmarks/contestants/MODULE.py` under an interpreter; None leaves it out (`--peers-python`)."""
    return Contestant(name, python and (python, "-m", f"benchmarks.contestants.{module}", *flags))


def parse(description: str, rounds: int, add: Any = lambda parser: None) -> argparse.Namespace:
    """The flags that all questions have; `add(parser)` adds a question's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that count (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=1, help="cores that all share; 0: no pinning (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and tokens")
    parser.add_argument("--peers-python", help="an interpreter with torch, transformers and trl; none: no peers")
    parser.add_argument("--tiny", action="store_true", help="sizes at which figures mean nothing, for tests")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result")
    add(parser)
    flags = parser.parse_args()
    if flags.rounds < 1:
        refuse(f"--rounds={flags.rounds}: expected at least 1")
    if flags.peers_python:
        flags.peers_python = os.path.abspath(flags.peers_python)
        if not os.access(flags.peers_python, os.X_OK):
            refuse(f"--peers-python={flags.peers_python}: no such interpreter; `make .venv-peers/made` makes one")
    return flags


def run(name: str, races: Sequence[Race], flags: argparse.Namespace) -> dict[str, Any]:
    """Runs races one after another, prints each one's tables, writes `NAME.json` and returns what it holds.

    Raises:
        SystemExit: exit code 2: contestants disagree, or one died: no table of that race, and nothing is written.
    """
    cores, before, held = choose_cores(flags.cores), os.getloadavg(), []
    for race in races:
        held.append(measure(race, cores))
        print(race_table(held[-1]), flush=True)
    result = describe(name, flags, cores, before) | {"races": held}
    print(describe_run(result))
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def describe(name: str, flags: argparse.Namespace, cores: Sequence[int], before: Sequence[float]) -> dict[str, Any]:
    """What every result begins with: how it was called, on what, and how busy that was before and after.

    Args:
        name: of the question.
        flags: what it was called with.
        cores: that it was pinned to.
        before: the machine's load averages when it began.
    """
    given = [flag for flag in sys.argv[1:] if not flag.startswith("--out")]
    return {
        "name": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *given]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": find_commit(),
        "machine": describe_machine(),
        "cores": list(cores),
        "load_before": list(before),
        "load_after": os.getloadavg(),
        "flags": {name: value for name, value in vars(flags).items() if name not in PLACES},
    }


def measure(race: Race, cores: Sequence[int]) -> dict[str, Any]:
    """Runs a race: its contestants' rounds, versions and peaks, and its goals' ratios."""
    entered = [each for each in race.contestants if each.command]
    hellos, rounds = take_turns(race, entered, cores) if entered else ({}, [])
    measured = {
        each.name: {
            "command": shlex.join(["python", *each.command[1:]]),
            "versions": hellos[each.name]["versions"],
            "device": hellos[each.name]["device"],
            "setup_seconds": hellos[each.name]["seconds"],
            **{peak: rounds[-1][each.name][peak] for peak in PEAKS},
            "rounds": [answers[each.name] for answers in rounds],  # the dropped one first
        }
        for each in entered
    }
    return {
        "title": race.title,
        "unit": race.unit,
        "rounds": race.rounds,
        "left_out": [each.name for each in race.contestants if not each.command],
        "contestants": measured,
        "goals": [asdict(goal) | judge(goal, measured, race.unit) for goal in race.goals],
    }


def take_turns(race: Race, entered: Sequence[Contestant], cores: Sequence[int]) -> tuple[Answers, list[Answers]]:
    """What the workers say before the first step and after every one, by contestant; refuses where they differ."""
    rounds: list[Answers] = []
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(start(each, cores)) for each in entered]
        hellos = {worker.name: worker.read() for worker in workers}
        check_same("before the first step", hellos)
        for i in range(race.rounds + 1):
            order = workers if i % 2 else workers[::-1]
            answers = {worker.name: worker.step(i) for worker in order}
            rounds.append({worker.name: answers[worker.name] for worker in workers})
            if race.compared is None or i < race.compared:
                check_same(f"round {i}", rounds[-1])
                check_alike(f"round {i}", rounds[-1], race.tolerances)
            print(f"{race.title}: round {i} of {race.rounds}{'' if i else ' (dropped)'}", file=sys.stderr, flush=True)
    return hellos, rounds


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: Contestant, log: Any):
        self.name, self.command, self.log = contestant.name, contestant.command, log
        read, write = os.pipe()
        environment = os.environ | {PIPE: str(write), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            contestant.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(write,),
            text=True,
        )
        os.close(write)
        self.answers = os.fdopen(read)

    def step(self, index: int) -> dict[str, Any]:
        """Takes a step and returns the answer."""
        with contextlib.suppress(BrokenPipeError):  # it died: reading says so
            print(index, file=self.process.stdin, flush=True)
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer, with the seconds since the worker was started."""
        ready = select.select([self.answers], [], [], LONGEST_STEP)[0]
        line = self.answers.readline() if ready else ""
        if not line:
            self.log.seek(0)
            last = " | ".join(self.log.read().strip().splitlines()[-LAST_LINES:]) or "it wrote nothing"
            state = "died" if ready else f"did not answer for {LONGEST_STEP} s"
            refuse(f"{self.name} {state}: {last}")
        return json.loads(line) | {"seconds": time.perf_counter() - self.started}


@contextlib.contextmanager
def start(contestant: Contestant, cores: Sequence[int]) -> Iterator[Worker]:
    """A worker on its cores, ended in the end. Threads of XLA and torch follow the cores that a process starts with."""
    own = os.sched_getaffinity(0)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        os.sched_setaffinity(0, cores)  # a child inherits it
        try:
            worker = Worker(contestant, log)
        finally:
            os.sched_setaffinity(0, own)
        try:
            yield worker
        finally:
            with contextlib.suppress(BrokenPipeError):
                worker.process.stdin.close()  # the end of its steps
            worker.answers.close()
            try:
                worker.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def choose_cores(number: int) -> list[int]:
    """The last `number` cores that this process may use; all of them for 0."""
    allowed = sorted(os.sched_getaffinity(0))
    if number > len(allowed):
        refuse(f"--cores={number}: this process may use {len(allowed)}; give at most that many, or 0 for all")
    return allowed[-number:]


def check_same(when: str, answers: Answers) -> None:
    """Refuses where contestants name different weights or token ids."""
    (first, expected), *others = answers.items()
    for name, answer in others:
        for key in expected["same"].keys() | answer["same"].keys():
            one, other = expected["same"].get(key), answer["same"].get(key)
            if one != other:
                refuse(f"no ratio is printed: {when}: {key} of {first} ({one}) and of {name} ({other}) differ")


def check_alike(when: str, answers: Answers, tolerances: Mapping[str, tuple[str, float]]) -> None:
    """Refuses where contestants found different losses or gradient norms."""
    (first, expected), *others = answers.items()
    for key, (kind, allowed) in tolerances.items():
        for name, answer in answers.items():
            if not math.isfinite(answer["values"].get(key, math.nan)):
                refuse(f"no ratio is printed: {when}: {name} gave {key} = {answer['values'].get(key)}, not a number")
        for name, answer in others:
            one, other = expected["values"][key], answer["values"][key]
            apart = abs(one - other) / (1.0 if kind == ABSOLUTE else max(abs(one), abs(other), sys.float_info.min))
            if apart > allowed:
                refuse(
                    f"no ratio is printed: {when}: {key} of {first} ({one:.8g}) and of {name} ({other:.8g}) are "
                    f"{apart:.1e} apart ({kind}); allowed are {allowed:.0e}"
                )


def refuse(message: str) -> NoReturn:
    """One line, and exit code 2."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(2)


def costs(measured: Mapping[str, Any], measure: str, unit: str) -> list[float]:
    """What each round that counts took of a measure, for a unit of work; a peak is one number."""
    own = ("cpu", "peak") if measured["device"] == "cpu" else ("wall", "device_peak")
    measure = {SECONDS: own[0], MEMORY: own[1]}.get(measure, measure)
    if measure in PEAKS:
        return [measured[measure]] if measured[measure] else []
    return [each[measure] / each["work"][unit] for each in measured["rounds"][1:]]


def judge(goal: Goal, measured: Mapping[str, Any], unit: str) -> dict[str, Any]:
    """A goal's ratios, round by round, and whether their median meets it; of several to divide, the best is taken."""
    taken = {name: costs(measured[name], goal.measure, unit) for name in (*goal.over, goal.under) if name in measured}
    found = [name for name in goal.over if taken.get(name)]
    if not found or not taken.get(goal.under):
        return {"against": None, "ratio": None, "met": None}
    against = min(found, key=lambda name: statistics.median(taken[name]))
    ratios = [one / other for one, other in zip(taken[against], taken[goal.under], strict=True)]
    ratio = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
    above = goal.at_least is None or ratio["median"] >= goal.at_least
    below = goal.at_most is None or ratio["median"] <= goal.at_most
    return {"against": against, "ratio": ratio, "met": above and below}


def race_table(race: Mapping[str, Any]) -> str:
    """A race's contestants and goals as Markdown."""
    unit = race["unit"]
    lines = [f"**{race['title']}** (medians of {race['rounds']} rounds)", ""]
    lines += [f"| contestant | CPU s | wall s | {unit} | ms of CPU / {unit} | {unit}/s | peak | on the device |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [row(name, measured, unit) for name, measured in race["contestants"].items()]
    lines += [f"| {name} | left out: needs `--peers-python` | | | | | | |" for name in race["left_out"]]
    if race["goals"]:
        lines += ["", "| goal | ratio | of | min - median - max | bound | met |", "|---|---|---|---|---|---|"]
        lines += [goal_row(goal) for goal in race["goals"]]
    return "\n".join([*lines, ""])


def row(name: str, measured: Mapping[str, Any], unit: str) -> str:
    rounds = measured["rounds"][1:]
    cpu, wall, work = (
        statistics.median(values)
        for values in ([r["cpu"] for r in rounds], [r["wall"] for r in rounds], [r["work"][unit] for r in rounds])
    )
    each = 1e3 * statistics.median(costs(measured, "cpu", unit))
    rate = 1 / statistics.median(costs(measured, "wall", unit))
    peaks = " | ".join(f"{measured[peak] / 2**20:,.0f} MiB" if measured[peak] else "-" for peak in PEAKS)
    return f"| {name} | {cpu:.3f} | {wall:.3f} | {work:,.0f} | {each:,.1f} | {rate:,.2f} | {peaks} |"


def goal_row(goal: Mapping[str, Any]) -> str:
    bounds = [f"{sign} {goal[key]:g}" for key, sign in (("at_least", ">="), ("at_most", "<=")) if goal[key] is not None]
    over, ratio = goal["against"] or " or ".join(goal["over"]), goal["ratio"]
    spread = " - ".join(f"{ratio[key]:.2f}" for key in ("min", "median", "max")) if ratio else "left out"
    met = {True: "yes", False: "no", None: "-"}[goal["met"] if bounds else None]
    return f"| {goal['id']} | {over} / {goal['under']} | {goal['measure']} | {spread} | {' '.join(bounds)} | {met} |"


def describe_run(result: Mapping[str, Any]) -> str:
    versions: dict[str, str] = {}
    for race in result["races"]:
        for measured in race["contestants"].values():
            versions |= measured["versions"]
    before, after = (" ".join(f"{x:.1f}" for x in result[key]) for key in ("load_before", "load_after"))
    packages = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    machine, cores = result["machine"], ", ".join(map(str, result["cores"]))
    return (
        f"`{result['command']}`\n\n"
        f"{machine['processor']}, core {cores} of {machine['cores']}, {machine['memory'] / 2**30:.0f} GiB; load "
        f"{before} before, {after} after; palign {result['commit']}; {packages}; {result['time']}"
    )


def describe_machine() -> dict[str, Any]:
    """What figures depend on besides software."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processor = names[0] if names else platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "memory": memory, "system": platform.platform()}


def find_commit() -> str:
    """The commit of this code, "-dirty" where it was changed, results apart; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
