"""The report as one HTML page that needs nothing but itself: no script, no font, no request."""

import json
import math
import os
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from palign.report import plots
from palign.report.contents import (
    Bar,
    Cell,
    Claim,
    Curve,
    FrontierPoint,
    Output,
    Row,
    RunReport,
    Sample,
    Table,
    WinRate,
)
from palign.report.svg import INK, MUTED, VARIABLES, colours, css_colour

__all__ = [
    "Bar",
    "Cell",
    "Claim",
    "Curve",
    "FrontierPoint",
    "Output",
    "Row",
    "RunReport",
    "Sample",
    "Table",
    "WinRate",
    "render",
    "write_report",
]


def render(report: RunReport) -> str:
    """Renders a report as HTML; every text in it is escaped.

    Args:
        report: What to show.

    Returns:
        The page.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("palign.report", package_path="."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["columns"] = lambda count, most: math.ceil(count / math.ceil(count / most)) if count else 1
    environment.filters["figure"] = lambda value: Cell(value).text
    palette = _palette(report)
    return environment.get_template("report.html").render(
        report=report,
        curves={t: Markup(svg) for t, svg in plots.learning_curves(report.curves, palette, report.bands).items()},
        histograms={t: Markup(svg) for t, svg in plots.histograms(report.histograms, palette).items()},
        bars={title: Markup(svg) for title, svg in plots.bar_charts(report.bars, palette).items()},
        frontier=Markup(plots.frontier(report.frontier, palette)) if report.frontier else "",
        frontiers={
            title: Markup(plots.frontier(points, palette, f"frontier-{i}"))
            for i, (title, points) in enumerate(report.frontiers.items())
        },
        win_rates=Markup(plots.win_rates(report.win_rates, palette)) if report.win_rates else "",
        tones={label: css_colour(colour) for label, colour in palette.items()},
        light={name: colour for colour, name in VARIABLES.items()},
        config=json.dumps(report.config, indent=2, default=str, ensure_ascii=False) if report.config else "",
    )


def write_report(path: epath.PathLike, report: RunReport) -> epath.Path:
    """Writes the page, whole or not at all, and makes its folder if need be.

    Args:
        path: Where to write it.
        report: What to show.

    Returns:
        The path.
    """
    path = epath.Path(path)
    page = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_text(page)
    return part.replace(path)


def _palette(report: RunReport) -> dict[str, str]:
    """One colour per name on the whole page: models are coloured, and series that are no model (train, held-out) grey.

    A report that compares no models has its series coloured instead.
    """
    points = [*report.frontier, *(point for panel in report.frontiers.values() for point in panel)]
    models: list[Any] = [*points, *(bar for bar in report.win_rates if not bar.control)]
    answers = [name for sample in report.samples for name in sample.outputs]
    named = [*(model.label for model in models), *answers]
    panels = [*report.histograms.values(), *report.curves.values()]
    series = [name for panel in panels for name in panel if name not in set(named)]
    if not named:
        return colours(series)
    neutral = dict(zip(dict.fromkeys(series), (INK, MUTED), strict=False))
    return colours([*named, *(name for name in series if name not in neutral)]) | neutral
