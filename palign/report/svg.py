"""From a matplotlib figure to an SVG that lives inside a page: deterministic, and coloured by its style sheet."""

import html
import io
import re
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# matplotlib draws with these; in the SVG they become CSS variables, so that a page can choose other tones when dark.
# The series are colour-blind safe (after Okabe and Ito, the yellow darkened to be legible on white).
SERIES = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#56b4e9", "#7a5195", "#8c564b")
INK, MUTED, GRID = "#1f2428", "#6a737d", "#d9dde1"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", **{colour: f"series-{i}" for i, colour in enumerate(SERIES)}}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "palign",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": True,
}


def colours(labels: list[str]) -> dict[str, str]:
    """Gives each label a colour by order of first appearance; the ninth label shares the first's colour.

    Args:
        labels: Names of models or series; repeated names count once.

    Returns:
        label -> one of `SERIES`.
    """
    distinct = dict.fromkeys(labels)
    return {label: SERIES[i % len(SERIES)] for i, label in enumerate(distinct)}


def css_colour(colour: str) -> str:
    """Names the CSS variable of a drawing colour, with the colour itself as the fallback outside a page."""
    return f"var(--{VARIABLES[colour]}, {colour})" if colour in VARIABLES else colour


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure of a size in inches (72 units each in the SVG), without pyplot's global state.

    Call it, draw, and call `inline_svg` inside one `matplotlib.rc_context(STYLE)`.
    """
    figure = Figure(figsize=(width, height), dpi=72)
    FigureCanvasSVG(figure)
    return figure


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Writes a figure as an `<svg>` element.

    The element has no fixed size (its view box scales to its container), no ids that could meet another figure's on the
    page, no date and no version, and text stays text.

    Args:
        figure: The figure.
        name: Prefix of the ids inside; unique on the page. Letters, digits and hyphens.
        description: What the picture shows, for readers who cannot see it.

    Returns:
        The element as a string.
    """
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=metadata)
    body = buffer.getvalue()
    body = body[body.index("<svg") :].strip()
    width, height = (float(x) for x in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body).groups())  # type: ignore[union-attr]
    # A style element inside an inline SVG would reach the whole page; its one rule moves to the opening tag.
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', body)
    body = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour in VARIABLES:
        body = re.sub(rf"(?<=: ){colour}(?=[;\"])", css_colour(colour), body)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width * 1.45:.0f}px; stroke-linejoin:round" role="img" '
        f'aria-label="{html.escape(description)}">'
    )
    return opening + body[body.index(">") + 1 :]
