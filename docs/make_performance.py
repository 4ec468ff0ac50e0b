"""Writes the figures and pictures of docs/performance.md from benchmarks/results: `python docs/make_performance.py`.

The results come from `make bench`, `make bench-peers` and `make bench-gpu` (`benchmarks/results/gpu`). What has no
result is said to be not measured; a goal that is missed stays, with its figure and the reason that stands in `REASONS`.
"""

import functools
import importlib
import itertools
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # `benchmarks` is not installed

from benchmarks import driver  # noqa: E402
from benchmarks.driver import MEMORY, SECONDS  # noqa: E402

PAGE, IMAGES, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "images" / "performance", driver.RESULTS
BLOCK = re.compile(r"(<!-- docs/make_performance\.py writes (\w+) -->\n).*?(<!-- up to here -->\n)", re.DOTALL)
MEBI, GIBI = 2**20, 2**30
PALIGN = "palign"
STEPS = ("equal_shapes", "realistic", "gpu/large_step", "gpu/realistic")  # questions whose races are training steps
Result = Mapping[str, Any]

# Why a goal is missed, by its id; a goal that is met needs none.
REASONS: dict[str, str] = {
    "C2": "the products are the same, and palign makes one more: it computes the logits again in the backward, to save "
    "memory (C6), which in a trace of the step is the largest part that the loop does not have",
    "C9": "XLA compiles the step's fusions one by one, and those of the optimizer, three for each array of parameters, "
    "are a good part of them; from the second start on the cache has them",
}


class Line(NamedTuple):
    """What was found for a goal."""

    what: str
    figure: str
    bound: str
    met: bool


class Picture(NamedTuple):
    """What a picture shows, in words, and what draws it as SVG."""

    caption: str
    draw: Callable[[], str]


class Aim(NamedTuple):
    """A goal, and where its figures are.

    Attributes:
        asked: in words.
        sources: question -> from its result to lines.
    """

    asked: str
    sources: Mapping[str, Callable[[Result], list[Line]]]


def spread(ratio: Mapping[str, float]) -> str:
    """A ratio over the rounds."""
    return f"{ratio['min']:.2f} - **{ratio['median']:.2f}** - {ratio['max']:.2f}"


def bound_of(goal: Mapping[str, Any]) -> str:
    """`at least 2.2`, `at most 0.35`, or nothing."""
    bounds = (("at least", "at_least"), ("at most", "at_most"))
    return ", ".join(f"{words} {goal[key]:g}" for words, key in bounds if goal.get(key) is not None)


def judged(result: Result, name: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The races' goals of a name, `C4` or `C4, precomputed`, that have a ratio and a bound."""
    for race in result["races"]:
        for goal in race["goals"]:
            if goal["id"] == name and goal["ratio"] and bound_of(goal):
                yield race, goal


def from_races(*names: str) -> Callable[[Result], list[Line]]:
    """A line for every ratio of these goals."""

    def find(result: Result) -> list[Line]:
        found = itertools.chain.from_iterable(judged(result, name) for name in names)
        return [
            Line(
                f"{race['title']}: {goal['measure']}, {goal['against']} / {goal['under']}",
                spread(goal["ratio"]),
                bound_of(goal),
                goal["met"],
            )
            for race, goal in found
        ]

    return find


def all_of(name: str) -> Callable[[Result], list[Line]]:
    """One line for all ratios of a goal that many races have."""

    def find(result: Result) -> list[Line]:
        found = list(judged(result, name))
        missed = [
            f"{race['title']}: {goal['ratio']['median']:.2f} of {goal['at_least']:.2f}"
            for race, goal in found
            if not goal["met"]
        ]
        told = f"{len(found) - len(missed)} of {len(found)}" + (f" (not {'; '.join(missed)})" if missed else "")
        return [Line(f"{name.partition(', ')[2]} reached", told, "all", not missed)] if found else []

    return find


def from_memory(result: Result) -> list[Line]:
    """The plain JAX step's temporaries over palign's, at the large vocabulary."""
    (row,) = [row for row in result["pairs"] if row["vocabulary"] == 128000]
    ratio = row["plain JAX"] / row["palign, unshared"]
    return [
        Line("plain JAX / palign, unshared, by the compiler's plan", f"**{ratio:.1f}**", "at least 12", ratio >= 12)
    ]


def from_plans(result: Result) -> list[Line]:
    """Temporaries and gradients of AlignDistil's head, as the compiler plans them, at each vocabulary."""
    lines = []
    for race in result["races"]:
        plans = {name: side["rounds"][0]["work"] for name, side in race["contestants"].items()}
        sizes = {
            name: plan["planned_temporary"] + plan["planned_results"]
            for name, plan in plans.items()
            if "planned_temporary" in plan
        }
        against = min(sizes.keys() - {"fused"}, key=sizes.__getitem__)
        ratio = sizes[against] / sizes["fused"]
        lines.append(
            Line(f"{race['title']}: planned memory, {against} / fused", f"**{ratio:.1f}**", "at least 3", ratio >= 3)
        )
    return lines


def from_compiling(result: Result) -> list[Line]:
    """Seconds of both ways, and compilations in an epoch."""
    lines = []
    for goal in result["goals"]:
        seconds = "seconds" in goal
        figure = f"**{goal['seconds']:.2f}** s" if seconds else f"**{goal['compilations']}** compilations"
        bound = f"at most {goal['at_most']:g} s" if seconds else "0"
        lines.append(Line(goal["id"].partition(", ")[2], figure, bound, goal["met"]))
    return lines


def from_profile(result: Result) -> list[Line]:
    """The share that stands in the result."""
    (goal,) = result["goals"]
    figure, bound = f"**{goal['share']:.0%}**", f"at least {goal['at_least']:.0%}"
    return [Line("useful FLOPs a second / those of the step's own matrix products", figure, bound, goal["met"])]


def from_peak(result: Result) -> list[Line]:
    """Useful FLOPs a second of the step against the chip's peak in bfloat16."""
    from palign.plan.topology import CHIPS

    (peak,) = [chip.flops for name, chip in CHIPS.items() if name.upper() in result["device"].upper()]
    share = result["flops"]["step"] / statistics.median(result["seconds"]["step"]) / peak
    return [
        Line(f"useful FLOPs a second / peak of {result['device']}", f"**{share:.0%}**", "at least 40%", share >= 0.4)
    ]


def within(title: str, milliseconds: float, gibibytes: float) -> Callable[[Result], list[Line]]:
    """The time and memory of palign itself, in the race whose title starts so."""

    def find(result: Result) -> list[Line]:
        (race,) = [race for race in result["races"] if race["title"].startswith(title)]
        side = race["contestants"][PALIGN]
        taken = 1e3 * statistics.median(each["wall"] for each in side["rounds"][1:])
        peak = side["device_peak"] / GIBI
        return [
            Line(race["title"], f"**{taken:.1f}** ms", f"at most {milliseconds:g} ms", taken <= milliseconds),
            Line(race["title"], f"**{peak:.1f}** GiB", f"at most {gibibytes:g} GiB", peak <= gibibytes),
        ]

    return find


def from_prediction(result: Result) -> list[Line]:
    """Memory of the compiled step against what the device's allocator saw."""
    lines = []
    for race in result["races"]:
        for name, side in race["contestants"].items():
            planned = side["rounds"][-1]["work"].get("planned_bytes")
            if planned and side["device_peak"]:
                ratio = planned / side["device_peak"]
                what = f"{race['title']}: {name}: planned / peak memory"
                lines.append(Line(what, f"**{ratio:.3f}**", "0.95 to 1.05", abs(ratio - 1) <= 0.05))
    return lines


AIMS = {
    "C1": Aim("a DPO step on the very same tokens, against TRL", {"equal_shapes": from_races("C1")}),
    "C2": Aim("the same, against the best PyTorch loop", {"equal_shapes": from_races("C2")}),
    "C3": Aim("the same with the reference computed before, against TRL", {"equal_shapes": from_races("C3")}),
    "C4": Aim(
        "pairs of realistic lengths, end to end, against TRL", {"realistic": from_races("C4", "C4, precomputed")}
    ),
    "C5": Aim(
        "lists with one prompt, against the prompt repeated",
        {"lists": lambda r: from_races("C5")(r) + all_of("C5, token ratio")(r)},
    ),
    "C6": Aim("peak memory of a step on 8 pairs", {"equal_shapes": from_races("C6", "C6, PyTorch")}),
    "C7": Aim("temporary memory of a step at V = 128,000", {"memory": from_memory}),
    "C8": Aim(
        "AlignDistil's head, against full logits", {"distill_head": lambda r: from_races("C8")(r) + from_plans(r)}
    ),
    "C9": Aim("compiling the step, and an epoch of varied lengths", {"compile_time": from_compiling}),
    "C10": Aim("useful FLOPs of a step, float32", {"profile_step": from_profile}),
    "H1": Aim(
        "log-probability head, 8192 targets, width 4096, V = 151,936, bfloat16",
        {"gpu/loss_head": lambda r: within("log-probabilities", 80, 5)(r) + from_races("H1")(r)},
    ),
    "H2": Aim(
        "a DPO step of a model of 1.5 billion parameters",
        {"gpu/profile_step": lambda r: from_peak(r) + from_profile(r), "gpu/large_step": from_races("H2")},
    ),
    "H3": Aim("pairs of realistic lengths, end to end, against TRL", {"gpu/realistic": from_races("H3")}),
    "H4": Aim("peak memory of the DPO step", {"gpu/large_step": lambda r: from_races("H4")(r) + from_prediction(r)}),
    "H5": Aim("a step of AlignDistil", {"gpu/large_step": from_races("H5"), "gpu/distill_head": from_plans}),
    "H6": Aim(
        "divergence head, 8192 targets, width 4096, V = 128,256, bfloat16",
        {"gpu/loss_head": lambda r: within("divergence", 60, 8)(r) + from_races("H6")(r)},
    ),
}
QUESTIONS = (
    *(
        "equal_shapes",
        "realistic",
        "lists",
        "memory",
        "distill_head",
        "compile_time",
        "profile_step",
        "growth",
        "sampling",
        "loss_head",
    ),
    *("gpu/loss_head", "gpu/large_step", "gpu/realistic", "gpu/profile_step", "gpu/distill_head"),
)


def read_results(folder: pathlib.Path = RESULTS) -> dict[str, Result]:
    """What was measured, by question; `gpu/` in front of what ran on a GPU.

    Raises:
        ValueError: a result is of sizes at which figures mean nothing, or of no question.
    """
    found = {}
    for file in sorted(folder.rglob("*.json")):
        name, result = str(file.relative_to(folder).with_suffix("")), json.loads(file.read_text(encoding="utf-8"))
        if name not in QUESTIONS:
            raise ValueError(f"{file}: expected one of {', '.join(QUESTIONS)}")
        if result["flags"]["tiny"]:
            raise ValueError(f"{file}: made with --tiny; its figures mean nothing, run it without")
        found[name] = result
    return found


def with_figures(page: str, results: Mapping[str, Result]) -> str:
    """The page with each of its blocks written anew."""

    def write(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]](results).strip()}\n\n{match[3]}"

    return BLOCK.sub(write, page)


def table(*columns: str, rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("|".join(("", *cells, "")) for cells in (columns, ("---",) * len(columns), *rows))


def answer(results: Mapping[str, Result]) -> str:
    """How many times as fast palign trains, and what memory it takes, against everybody else, race by race."""
    rows = []
    for race in training_races(results):
        for name, other in race["contestants"].items():
            if not name.startswith(PALIGN):
                speed = driver.judge(driver.Goal("", SECONDS, (name,), PALIGN), race["contestants"], race["unit"])
                memory = driver.judge(driver.Goal("", MEMORY, (PALIGN,), name), race["contestants"], race["unit"])
                memory = f"{memory['ratio']['median']:.2f}" if memory["ratio"] else "-"
                rows.append((race["title"], name, other["device"], spread(speed["ratio"]), memory))
    columns = ("a DPO step on", "palign against", "on", "times as fast: min - **median** - max", "times its memory")
    return table(*columns, rows=rows) if rows else "Not measured yet."


def training_races(results: Mapping[str, Result]) -> list[Mapping[str, Any]]:
    """Those in which palign trains beside somebody else."""
    races = itertools.chain.from_iterable(results[name]["races"] for name in STEPS if name in results)
    return [race for race in races if PALIGN in race["contestants"] and len(race["contestants"]) > 1]


def goals(results: Mapping[str, Result]) -> str:
    """Every goal with its figures; one that is missed with the reason."""
    rows = []
    for name, aim in AIMS.items():
        lines = [
            line for question, find in aim.sources.items() if question in results for line in find(results[question])
        ]
        for i, line in enumerate(lines):
            rows.append((*(("", "") if i else (name, aim.asked)), *line[:3], verdict(name, line.met)))
        if not lines:
            rows.append((name, aim.asked, "", "not measured", "", ""))
    return table("goal", "what", "measured", "figure", "asked for", "", rows=rows)


def verdict(name: str, met: bool) -> str:
    """Met, or missed and why."""
    return "met" if met else f"missed: {REASONS.get(name, 'not explained yet')}"


def races_of(*questions: str, results: Mapping[str, Result]) -> str:
    """The tables that these questions print."""
    shown = [
        "\n\n".join(driver.race_table(race) for race in results[name]["races"]) for name in questions if name in results
    ]
    return "\n\n".join(shown) or "Not measured yet."


def single(name: str, show: Callable[[Any, Result], str], results: Mapping[str, Result]) -> str:
    """The table of a question that is no race, made by the question's own function."""
    if name not in results:
        return "Not measured yet."
    return show(importlib.import_module(f"benchmarks.{name.removeprefix('gpu/')}"), results[name])


def profile_table(profile: Any, result: Result) -> str:
    """What the step is of, the table of its parts, and how long it waits for rows."""
    amounts = {
        name: profile.Part(lambda: None, result["flops"].get(name, 0.0), result["bytes"].get(name, 0.0))
        for name in (*result["seconds"],)
    }
    counted = ", ".join(f"{value:,} {name}" for name, value in result["counts"].items())
    parts = profile.tabulate(amounts, result["seconds"])[0]
    return f"{result['device']}: {counted}.\n\n{parts}\n\n{profile.describe_waits(result['waits'])}"


def pictures(*names: str, results: Mapping[str, Result]) -> str:
    """Those that there are data for, two side by side, each under what it shows."""
    kept = [(name, picture.caption) for name, picture in drawings(results).items() if name.startswith(names)]
    rows: list[tuple[str, ...]] = []
    for pair in (kept[i : i + 2] for i in range(0, len(kept), 2)):
        rows.append(tuple(caption for _, caption in pair))
        rows.append(tuple(f'<img src="images/performance/{name}.svg" width="400" alt="{text}">' for name, text in pair))
    return table("", "", rows=rows) if rows else ""


def with_pictures(block: Callable[..., str], *names: str) -> Callable[..., str]:
    """A block with pictures below it."""
    return lambda results: f"{block(results=results)}\n\n{pictures(*names, results=results)}"


def machines(results: Mapping[str, Result]) -> str:
    """The command, machine, versions and load of every result."""
    rows = []
    for result in results.values():
        versions: dict[str, str] = dict(result.get("versions", {}))
        for side in itertools.chain.from_iterable(race["contestants"].values() for race in result.get("races", ())):
            versions |= side["versions"]
        machine, cores = result["machine"], ", ".join(map(str, result["cores"])) or "any"
        load = ", ".join(" ".join(f"{x:.1f}" for x in result[key]) for key in ("load_before", "load_after"))
        packages = ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))
        of = f"{machine['processor']}, core {cores} of {machine['cores']}, {machine['memory'] / GIBI:.0f} GiB"
        rows.append((f"`{result['command']}`", result["time"][:16], result["commit"], of, load, packages))
    columns = ("command", "at (UTC)", "commit", "machine", "load before, after", "versions")
    return table(*columns, rows=rows) if rows else "Nothing was measured yet."


def unmeasured(results: Mapping[str, Result]) -> str:
    """Questions without a result, contestants that were left out, and goals without a figure."""
    lines = [f"- `{name}`: no result." for name in QUESTIONS if name not in results]
    for name, result in results.items():
        out = sorted({side for race in result.get("races", ()) for side in race["left_out"]})
        lines += [f"- `{name}`: without {', '.join(out)}."] if out else []
    if not any(name.startswith("gpu/") for name in results):
        lines.append("- No accelerator: H1 to H6 were never run; the files of that set run on a CPU, with small sizes.")
    return "\n".join(lines)


def drawings(results: Mapping[str, Result]) -> dict[str, Picture]:
    """Pictures by name: of the races that a goal is held against, and of growth."""
    found: dict[str, Picture] = {}
    for measure, bars in ((SECONDS, speed_bars), (MEMORY, memory_bars)):
        for i, race in enumerate(training_races(results)):
            if any(goal["measure"] == measure and goal["ratio"] and bound_of(goal) for goal in race["goals"]):
                caption, values = bars(race)
                found[f"{measure}_{i}"] = Picture(f"{race['title']}: {caption}", functools.partial(draw_bars, values))
    if "growth" in results:
        for name, sweep in results["growth"]["sweeps"].items():
            found[f"growth_{name}"] = Picture(sweep["label"], functools.partial(draw_growth, results["growth"], name))
        caption = "the head's memory by vocabulary"
        found["growth_head"] = Picture(caption, functools.partial(draw_growth, results["growth"], "head"))
    return found


def speed_bars(race: Mapping[str, Any]) -> tuple[str, dict[str, tuple[float, ...]]]:
    """What bars of speed show, and everybody's: median, least, most."""
    taken = {name: driver.costs(side, SECONDS, race["unit"]) for name, side in race["contestants"].items()}
    on_cpu = all(side["device"] == "cpu" for side in race["contestants"].values())
    values = {name: (1 / statistics.median(t), 1 / max(t), 1 / min(t)) for name, t in taken.items()}
    return f"{race['unit']} a second{' of CPU' if on_cpu else ''}", values


def memory_bars(race: Mapping[str, Any]) -> tuple[str, dict[str, tuple[float, ...]]]:
    """The same of memory."""
    taken = {name: driver.costs(side, MEMORY, race["unit"]) for name, side in race["contestants"].items()}
    return "peak memory, GiB", {name: (peak[0] / GIBI,) for name, peak in taken.items() if peak}


def draw_bars(values: Mapping[str, tuple[float, ...]]) -> str:
    """Bars of one race, palign's in colour."""
    from palign.report.contents import Bar
    from palign.report.plots import bar_charts
    from palign.report.svg import SERIES

    palette = {name: SERIES[0] for name in values if name.startswith(PALIGN)}
    return bar_charts({"": [Bar(name, *each) for name, each in values.items()]}, palette)[""]


def draw_growth(result: Result, name: str) -> str:
    """A picture of the question's own."""
    return importlib.import_module("benchmarks.growth").draw(result["sweeps"], result["head"])[name]


def as_file(svg: str) -> str:
    """An SVG of a report as a file of its own: with a size, on white."""
    width, height = (float(x) * 1.3 for x in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())  # type: ignore[union-attr]
    return svg.replace('style="', f'width="{width:.0f}" height="{height:.0f}" style="background:#fff; ', 1) + "\n"


BLOCKS: dict[str, Callable[[Mapping[str, Result]], str]] = {
    "answer": with_pictures(answer, SECONDS, MEMORY),
    "goals": goals,
    "equal": lambda results: races_of("equal_shapes", results=results),
    "realistic": lambda results: races_of("realistic", "gpu/realistic", results=results),
    "lists": lambda results: races_of("lists", results=results),
    "sampling": lambda results: races_of("sampling", results=results),
    "distill": lambda results: (
        races_of("distill_head", "gpu/distill_head", results=results)
        + "\n\n"
        + single("distill_head", lambda m, r: m.planned_table(r["races"]), results)
    ),
    "heads": lambda results: races_of("loss_head", results=results),
    "gpu": lambda results: races_of("gpu/loss_head", "gpu/large_step", results=results),
    "profile": functools.partial(single, "profile_step", profile_table),
    "gpu_profile": functools.partial(single, "gpu/profile_step", profile_table),
    "compiling": functools.partial(
        single, "compile_time", lambda m, r: m.tabulate(r["rounds"], r["goals"], r["epoch"])
    ),
    "memory": functools.partial(single, "memory", lambda m, r: m.tables(r["settings"], r["pairs"])),
    "growth": with_pictures(
        functools.partial(single, "growth", lambda m, r: m.tables(r["sweeps"], r["head"])), "growth"
    ),
    "machines": machines,
    "unmeasured": unmeasured,
}


def main() -> None:
    """Writes the page and its pictures; pictures without a result go."""
    results = read_results()
    PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    IMAGES.mkdir(parents=True, exist_ok=True)
    drawn = {IMAGES / f"{name}.svg": as_file(picture.draw()) for name, picture in drawings(results).items()}
    for old in set(IMAGES.glob("*.svg")) - drawn.keys():
        old.unlink()
    for file, svg in drawn.items():
        file.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
