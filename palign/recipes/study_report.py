"""The study's table, page, pictures and numbers, from the results that there are."""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from palign.config.load import to_plain
from palign.eval.winrate import Interval
from palign.recipes.study_claims import Claim as StudyClaim
from palign.recipes.study_claims import all_claims
from palign.recipes.study_config import DPO, REVERSE_DPO, SFT, StudyConfig, list_jobs
from palign.recipes.study_summary import Entry, Line, Outcomes, make_lines, over_seeds
from palign.report import plots
from palign.report.contents import Bar, Cell, Claim, FrontierPoint, Row, RunReport, Table
from palign.report.page import write_report
from palign.report.svg import colours
from palign.report.table import print_table

VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "palign-jax")
FEW = 6  # methods that one picture can show


def write(config: StudyConfig, workdir: epath.Path, entries: Sequence[Entry], command: str) -> epath.Path:
    """Prints the table and writes `study.html`, `study.md`, `study.json` and the pictures `*.svg` into the workdir.

    Args:
        config: of the study.
        workdir: of the study.
        entries: the finished jobs; the SFT model's are among them.
        command: the command line, for the record.

    Returns:
        The page's path.
    """
    outcomes = Outcomes(config, entries)
    lines, claims = make_lines(outcomes), all_claims(outcomes)
    facts = provenance(config, entries, command)
    report = make_report(outcomes, lines, claims, facts)
    assert report.table is not None
    print_table(report.table)
    for claim in claims:
        print(f"{claim.title}: {claim.verdict}")
    page = write_report(workdir / "study.html", report)
    pictures = draw(report, workdir)
    (workdir / "study.md").write_text(markdown(report, pictures))
    numbers = {"facts": facts, "lines": [line._asdict() for line in lines], "claims": [_claim(c) for c in claims]}
    (workdir / "study.json").write_text(json.dumps(_finite(numbers), indent=1) + "\n")
    print(f"report: {page}")
    return page


def provenance(config: StudyConfig, entries: Sequence[Entry], command: str) -> dict[str, Any]:
    """Where the numbers come from."""
    versions = {name: _version(name) for name in VERSIONS}
    seconds = sum(entry.train_seconds + entry.measure_seconds for entry in entries)
    return {
        "command": command,
        "seeds": list(config.seeds),
        "jobs": f"{len(entries)} of {len(list_jobs(config))}",
        "time of all jobs": f"{seconds / 60:.1f} min",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "machine": f"Python {platform.python_version()}, {jax.default_backend()}, {os.cpu_count()} cores",
    }


def make_report(
    outcomes: Outcomes, lines: Sequence[Line], claims: Sequence[StudyClaim], facts: Mapping[str, Any]
) -> RunReport:
    """The page's contents."""
    trained, points = (
        [line for line in lines if line.name != SFT],
        {line.name: _point(outcomes, line) for line in lines},
    )
    groups = _groups(outcomes.config, [line.name for line in trained])
    curves, bands = _curves(outcomes, groups)
    return RunReport(
        title="palign study",
        facts=facts,
        table=make_table(outcomes, lines),
        claims=[Claim(f"{c.title} ({c.source})", c.verdict, c.numbers, c.remark) for c in claims],
        frontiers={group: [points[name] for name in (SFT, *names)] for group, names in groups.items()},
        curves=curves,
        bands=bands,
        bars=_bars(outcomes, trained),
        notes=_notes(outcomes),
        config=to_plain(outcomes.config),
    )


def make_table(outcomes: Outcomes, lines: Sequence[Line]) -> Table:
    """A row a method."""
    columns: dict[str, Callable[[Line], Cell]] = {
        "gold reward": lambda line: _cell(line.gold),
        "wins over SFT": lambda line: _cell(line.wins_over_sft, percent=True, digits=1),
        "wins over DPO": lambda line: _cell(line.wins_over_dpo, percent=True, digits=1),
        "KL to SFT": lambda line: _cell(line.kl),
        "grammatical": lambda line: _cell(line.valid, percent=True, digits=1),
        "words": lambda line: _cell(line.words, digits=1),
        "lost after its best": lambda line: _cell(line.over_optimisation),
        "steps to 90%": lambda line: _cell(line.steps, digits=0),
        "spread over settings": lambda line: _cell(line.spread),
        "credit, Pearson": lambda line: _cell(line.pearson),
        "credit, Spearman": lambda line: _cell(line.spearman),
        "setting": lambda line: Cell(f"{_setting(line)} of {line.settings}" if line.settings > 1 else _setting(line)),
        "seeds": lambda line: Cell(line.seeds, digits=0),
    }
    # What no line has, such as a spread over one setting, takes no column.
    columns = {name: cell for name, cell in columns.items() if any(cell(line).value is not None for line in lines)}
    rows = [Row(line.label, [cell(line) for cell in columns.values()]) for line in lines]
    config = outcomes.config
    best = f"the setting with the most gold reward on {config.tuning_prompts} other ones"
    shown = best if outcomes.is_whole else "the middle of each grid, for the study is not finished"
    caption = f"Means over seeds with Student's 95% intervals, {config.test_prompts} held-out prompts, at {shown}."
    return Table(list(columns), rows, label="method", caption=caption)


def draw(report: RunReport, workdir: epath.Path) -> dict[str, str]:
    """Writes every picture of the page as a file of its own; returns title -> file name."""
    palette = colours([point.label for points in report.frontiers.values() for point in points])
    drawn = {
        f"Gold reward against KL: {group}": plots.frontier(points, palette)
        for group, points in report.frontiers.items()
    }
    drawn |= plots.learning_curves(report.curves, palette, report.bands) | plots.bar_charts(report.bars, palette)
    names = {}
    for title, svg in drawn.items():
        names[title] = "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split()) + ".svg"
        (workdir / names[title]).write_text(_on_paper(svg))
    return names


def _on_paper(svg: str) -> str:
    """A picture that stands alone: with a size, and white behind it, for its text is dark."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    width, height = (1.45 * float(x) for x in size.groups())
    return svg.replace("<svg ", f'<svg width="{width:.0f}" height="{height:.0f}" ', 1).replace(
        'style="', 'style="background: white; ', 1
    )


def markdown(report: RunReport, pictures: Mapping[str, str]) -> str:
    """The results as Markdown: where they come from, the table, the claims, the pictures, the notes."""
    assert report.table is not None
    parts = ["\n".join(f"- {name}: {value}" for name, value in report.facts.items())]
    columns = [report.table.label, *report.table.columns]
    rows = [[row.label, *(str(cell) for cell in row.cells)] for row in report.table.rows]
    table = [columns, ["---"] * len(columns), *rows]
    parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in table) + f"\n\n{report.table.caption}")
    for claim in report.claims:
        numbers = "\n".join(f"- {text}" for text in claim.numbers)
        parts.append(
            f"**{claim.statement}: {claim.verdict}.**\n\n{numbers}" + (f"\n\n{claim.remark}" * bool(claim.remark))
        )
    parts += [f"![{title}]({name})" for title, name in pictures.items()]
    parts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def _groups(config: StudyConfig, methods: Sequence[str]) -> dict[str, list[str]]:
    """Title -> the methods of a picture, DPO first in each."""
    if len(methods) <= FEW:
        return {"All methods": list(methods)} if methods else {}
    groups: dict[str, list[str]] = {}
    for name in methods:
        if name != DPO:
            groups.setdefault(config.methods[name].group, [DPO]).append(name)
    return groups


def _curves(outcomes: Outcomes, groups: Mapping[str, Sequence[str]]) -> tuple[dict[str, dict], dict[str, dict]]:
    """Gold reward along training; the bands are intervals over seeds."""
    curves: dict[str, dict] = {group: {} for group in groups}
    bands: dict[str, dict] = {group: {} for group in groups}
    for group, names in groups.items():
        for name in names:
            runs = list(outcomes.best(name).values())
            points = [over_seeds([run.curve[i].gold for run in runs]) for i in range(len(runs[0].curve))]
            known = [point for point in points if point is not None]
            steps = [point.step for point in runs[0].curve]
            curves[group][outcomes.label(name)] = (steps, [point.mean for point in known])
            if len(runs) > 1:
                bands[group][outcomes.label(name)] = ([p.low for p in known], [p.high for p in known])
    prefix = "Gold reward on the tuning prompts: "
    return {prefix + group: x for group, x in curves.items()}, {prefix + group: x for group, x in bands.items()}


def _bars(outcomes: Outcomes, lines: Sequence[Line]) -> dict[str, list[Bar]]:
    credit = [_bar(line.label, line.pearson) for line in lines]
    both = [run.contrastive for run in outcomes.middle(REVERSE_DPO).values() if run.contrastive]
    if both:
        credit.append(_bar("DPO against reverse DPO", over_seeds([rewards.pearson for rewards in both])))
    panels = {
        "Correlation with the true token credit (Pearson)": credit,
        "Win rate over SFT": [_bar(line.label, line.wins_over_sft) for line in lines],
        "Win rate over DPO": [_bar(line.label, line.wins_over_dpo) for line in lines if line.wins_over_dpo],
        "Gold reward, most less least over settings": [_bar(line.label, line.spread) for line in lines if line.spread],
    }
    return {title: bars for title, bars in panels.items() if bars}


def _bar(label: str, interval: Interval | None) -> Bar:
    return Bar(label, float("nan")) if interval is None else Bar(label, interval.mean, interval.low, interval.high)


def _point(outcomes: Outcomes, line: Line) -> FrontierPoint:
    runs = list(outcomes.best(line.name).values())
    ways = np.asarray([[(point.kl, point.gold) for point in run.curve] for run in runs]).mean(axis=0)
    return FrontierPoint(
        line.label,
        line.kl.mean,
        line.gold.mean,
        kl_interval=(line.kl.low, line.kl.high),
        gold_interval=(line.gold.low, line.gold.high),
        trajectory=[(float(kl), float(gold)) for kl, gold in ways] if len(ways) > 1 else (),
    )


def _notes(outcomes: Outcomes) -> list[str]:
    notes = [
        "KL is the sum over a response's tokens of KL(policy ‖ SFT), exact at each token, on the policy's samples.",
        "'lost after its best' is the gold reward of the best checkpoint less that of the last, on the tuning prompts.",
        "'steps to 90%': to make 90% of its own best improvement over SFT; straight between checkpoints.",
        "The true credit of a token is the change of the gold reward that the world's writer can expect, exactly; a "
        "method's is log π(token) − log π_SFT(token). Both on samples of the SFT model that the grammar could write.",
        "A claim holds here where the whole interval of its difference over seeds lies above 0, does not hold where it "
        "lies below, and is undecided otherwise. This world is small; nothing follows for other data or larger models.",
    ]
    return notes + [f"Diverged, and left out: {', '.join(outcomes.diverged)}."] * bool(outcomes.diverged)


def _cell(interval: Interval | None, **how: Any) -> Cell:
    return Cell(None) if interval is None else Cell(interval.mean, interval.low, interval.high, **how)


def _setting(line: Line) -> str:
    return ", ".join(f"{name.replace('learning_rate', 'rate')} {value:g}" for name, value in line.setting.items())


def _claim(claim: StudyClaim) -> dict[str, Any]:
    findings = [finding._asdict() | {"verdict": finding.verdict} for finding in (claim.main, *claim.others)]
    return {"title": claim.title, "source": claim.source, "verdict": claim.verdict, "findings": findings}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "from source"


def _finite(value: Any) -> Any:
    """JSON has no infinity: the interval of a single seed has ends of null. Numbers are rounded to six digits."""
    if isinstance(value, Interval):
        return {name: _finite(x) for name, x in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
