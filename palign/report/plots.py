"""The pictures of a report, as strings of inline SVG.

Pictures are drawn small (a phone's width) so that their text stays legible when they shrink. A label has the same
colour in every picture of a report when the same `palette` is passed.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox

from palign.report.contents import Bar, Curve, FrontierPoint, Histogram, WinRate, is_number
from palign.report.svg import INK, MUTED, STYLE, colours, inline_svg, new_figure

_WIDTH = 5.0  # inches
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.6)))


def learning_curves(
    panels: Mapping[str, Mapping[str, Curve]],
    palette: Mapping[str, str] | None = None,
    bands: Mapping[str, Mapping[str, Curve]] | None = None,
) -> dict[str, str]:
    """Draws one small picture per panel, all against steps.

    Args:
        panels: Panel title -> series name -> (steps, values). Values that are not finite leave gaps.
        palette: Series name -> colour; by order of appearance over all panels if None.
        bands: Panel title -> series name -> (lower, upper ends) at the same steps, for the series that have them.

    Returns:
        Panel title -> SVG, in the same order.
    """
    names = list(itertools.chain.from_iterable(panels.values()))
    palette = palette or colours(names)
    dashes = _dashes(names, palette)
    rows = max(map(_legend_rows, map(list, panels.values())), default=0)
    drawn = {}
    for i, (title, series) in enumerate(panels.items()):
        with matplotlib.rc_context(STYLE):
            figure, axes = _axes(_WIDTH * 0.84, 2.5 + 0.22 * rows, legend_rows=_legend_rows(list(series)))
            for name, (steps, values) in series.items():
                marker = "o" if sum(map(is_number, values)) == 1 else None
                style = {"linestyle": dashes[name], "marker": marker, "markersize": 4}
                axes.plot(list(steps), list(values), color=palette.get(name, INK), **style)
                if name in (band := (bands or {}).get(title, {})):
                    axes.fill_between(list(steps), *band[name], color=palette.get(name, INK), alpha=0.12, linewidth=0)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.margins(x=0.02)
            _legend(axes, list(series), palette, dashes)
            description = f"{title} by step, for {', '.join(series)}"
            drawn[title] = inline_svg(figure, f"curve-{i}", description)
    return drawn


def histograms(
    panels: Mapping[str, Mapping[str, Histogram]], palette: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Draws one small picture per panel: which share of the values falls between two edges.

    Args:
        panels: Panel title -> series name -> (edges, counts).
        palette: Series name -> colour; by order of appearance over all panels if None.

    Returns:
        Panel title -> SVG, in the same order.
    """
    palette = palette or colours(list(itertools.chain.from_iterable(panels.values())))
    drawn = {}
    for i, (title, series) in enumerate(panels.items()):
        rows = _legend_rows(list(series))
        with matplotlib.rc_context(STYLE):
            figure, axes = _axes(_WIDTH * 0.84, 2.3 + 0.22 * rows, legend_rows=rows)
            for name, (edges, counts) in series.items():
                share = [count / max(sum(counts), 1) for count in counts]
                axes.stairs(share, list(edges), fill=True, color=palette.get(name, INK), alpha=0.2)
                axes.stairs(share, list(edges), color=palette.get(name, INK), linewidth=1.4)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.margins(x=0.02)
            _legend(axes, list(series), palette, dict.fromkeys(series, "-"))
            drawn[title] = inline_svg(figure, f"histogram-{i}", f"Histogram of {title}, for {', '.join(series)}")
    return drawn


def frontier(points: Sequence[FrontierPoint], palette: Mapping[str, str] | None = None, name: str = "frontier") -> str:
    """Draws gold reward against KL: a dot with its intervals per model, and the way that training took to it.

    Args:
        points: The models. Those without a finite KL and gold reward are left out.
        palette: Label -> colour; by order if None.
        name: Of the picture; unique on the page.

    Returns:
        The SVG.
    """
    palette = palette or colours([point.label for point in points])
    points = [point for point in points if is_number(point.kl) and is_number(point.gold)]
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(_WIDTH * 1.05, 3.9)
        for point in points:
            colour = palette.get(point.label, INK)
            if point.trajectory:
                path = list(zip(*point.trajectory, strict=True))
                axes.plot(*path, color=colour, linewidth=1.2, alpha=0.55, marker=".", markersize=4, zorder=2)
            errors: dict[str, Any] = {
                "xerr": _errors(point.kl, point.kl_interval),
                "yerr": _errors(point.gold, point.gold_interval),
            }
            axes.errorbar(point.kl, point.gold, **errors, fmt="o", markersize=7, color=colour, elinewidth=1.4, zorder=3)
        axes.set_xlabel("KL to the reference, nats per response")
        axes.set_ylabel("gold reward")
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        _label_points(axes, points, palette)
        description = "Gold reward against KL to the reference for " + ", ".join(point.label for point in points)
        return inline_svg(figure, name, description)


def win_rates(bars: Sequence[WinRate], palette: Mapping[str, str] | None = None, baseline: str = "SFT") -> str:
    """Draws win rates as horizontal bars with intervals and a line at one half.

    Args:
        bars: From top to bottom; a control is grey. A bar without a finite value keeps its line and says so.
        palette: Label -> colour; by order if None.
        baseline: The name of the model that is beaten, for the axis.

    Returns:
        The SVG.
    """
    palette = palette or colours([bar.label for bar in bars])
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(_WIDTH, 0.5 * max(len(bars), 1) + 0.82, left=0.2, right=0.28)
        for y, bar in enumerate(bars):
            _bar(axes, y, bar, MUTED if bar.control else palette.get(bar.label, INK))
        axes.axvline(0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=4)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(bars) - 0.25, -0.65)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel(f"win rate against {baseline}, with 95% interval")
        description = f"Win rates against {baseline}: " + ", ".join(f"{b.label} {b.value:.1%}" for b in bars)
        return inline_svg(figure, "winrates", description)


def bar_charts(panels: Mapping[str, Sequence[Bar]], palette: Mapping[str, str] | None = None) -> dict[str, str]:
    """Draws one picture per panel: horizontal bars from 0, with intervals, each with its name and figures above it.

    Args:
        panels: Panel title -> bars, from top to bottom. A bar without a finite value keeps its line and says so.
        palette: Label -> colour; labels without one are drawn in the ink of text.

    Returns:
        Panel title -> SVG, in the same order.
    """
    drawn = {}
    for i, (title, bars) in enumerate(panels.items()):
        with matplotlib.rc_context(STYLE):
            figure, axes = _axes(_WIDTH * 0.84, 0.34 * max(len(bars), 1) + 0.7, left=0.2, right=0.2)
            ends = [x for bar in bars for x in (0.0, bar.value, bar.low, bar.high) if x is not None and is_number(x)]
            axes.set_xlim(min(ends, default=0.0), max(ends, default=0.0) or 1.0)
            axes.set_ylim(len(bars) - 0.25, -0.65)
            for y, bar in enumerate(bars):
                _bar_from_zero(axes, y, bar, (palette or {}).get(bar.label, MUTED))
            axes.axvline(0, color=INK, linewidth=1, zorder=4)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            description = f"{title}: " + ", ".join(f"{bar.label} {bar.value:.3g}" for bar in bars)
            drawn[title] = inline_svg(figure, f"bars-{i}", description)
    return drawn


def _bar_from_zero(axes: Axes, y: int, bar: Bar, colour: str) -> None:
    left, right = axes.get_xlim()
    axes.text(left, y - 0.28, bar.label, va="center", ha="left", fontsize=10)
    if not is_number(bar.value):
        axes.text(right, y - 0.28, "not measured", va="center", ha="right", fontsize=9, color=MUTED)
        return
    axes.barh(y + 0.15, bar.value, height=0.26, color=colour, alpha=0.85, zorder=2)
    figures = f"{bar.value:.2f}"
    if is_number(bar.low) and is_number(bar.high):
        ends: Any = (bar.low, bar.high)
        axes.plot(ends, [y + 0.15] * 2, color=INK, linewidth=1.4, marker="|", markersize=5, zorder=3)
        figures += f"  [{bar.low:.2f}, {bar.high:.2f}]"
    axes.text(right, y - 0.28, figures, va="center", ha="right", fontsize=9, color=MUTED)


def _bar(axes: Axes, y: int, bar: WinRate, colour: str) -> None:
    """One bar with its label and figures on a line of their own above it, so that no label needs a margin."""
    axes.text(0, y - 0.28, bar.label, va="center", ha="left", fontsize=11)
    if not is_number(bar.value):
        axes.text(1, y - 0.28, "not measured", va="center", ha="right", fontsize=10, color=MUTED)
        return
    axes.barh(y + 0.12, bar.value, height=0.3, color=colour, alpha=0.4 if bar.control else 0.85, zorder=2)
    figures = f"{bar.value:.1%}"
    if is_number(bar.low) and is_number(bar.high):
        axes.plot([bar.low, bar.high], [y + 0.12] * 2, color=INK, linewidth=1.6, marker="|", markersize=6, zorder=3)
        figures += f"  [{100 * bar.low:.1f}, {100 * bar.high:.1f}]"
    axes.text(1, y - 0.28, figures, va="center", ha="right", fontsize=10, color=MUTED)


def _axes(
    width: float, height: float, legend_rows: int = 0, left: float = 0.62, right: float = 0.12
) -> tuple[Figure, Axes]:
    """A figure with one axes: room on the left for tick labels, below for the axis label, above for the legend."""
    above = 0.1 + 0.22 * legend_rows
    figure = new_figure(width, height)
    box = (left / width, 0.5 / height, 1 - (left + right) / width, 1 - (0.5 + above) / height)
    return figure, figure.add_axes(box)


def _dashes(names: Sequence[str], palette: Mapping[str, str]) -> dict[str, Any]:
    """Solid for the first name of a colour, dashed for the second, dotted for others; grey is always dashed."""
    seen: dict[str, int] = {MUTED: 1}
    dashes = {}
    for name in dict.fromkeys(names):
        colour = palette.get(name, INK)
        dashes[name] = _DASHES[min(seen.get(colour, 0), 2)]
        seen[colour] = seen.get(colour, 0) + 1
    return dashes


def _legend_columns(names: Sequence[str]) -> int:
    # A column holds its swatch and about seven points per letter; the axes is about 255 points wide.
    widest = max(map(len, names), default=1)
    return max(1, min(4, 255 // (36 + 6 * widest)))


def _legend_rows(names: Sequence[str]) -> int:
    return -(-len(names) // _legend_columns(names)) if len(names) > 1 else 0


def _legend(axes: Axes, names: Sequence[str], palette: Mapping[str, str], dashes: Mapping[str, Any]) -> None:
    """Lines up the names above the axes; a single series is named by the panel's title."""
    if len(names) < 2:
        return
    handles = [Line2D([], [], color=palette.get(name, INK), linestyle=dashes[name]) for name in names]
    axes.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=_legend_columns(names),
        handlelength=1.4,
        columnspacing=1.2,
        borderpad=0,
        fontsize=10,
    )


def _errors(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    if interval is None or not all(map(is_number, interval)):
        return None
    return [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]


def _label_points(axes: Axes, points: Sequence[FrontierPoint], palette: Mapping[str, str]) -> None:
    """Writes each name beside its dot, at whichever of several places covers least of what is already there."""
    axes.axis(axes.axis())  # the limits must be settled before positions are read
    transform, frame = axes.transData.transform, axes.get_window_extent()
    taken = list(itertools.chain.from_iterable(_ink(point, axes) for point in points))
    for point in points:
        x, y = transform((point.kl, point.gold))
        boxes = _places(x, y, width=7.4 * len(point.label), height=13)
        best = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken) + 10 * _outside(box, frame))
        taken.append(best)
        colour, back = palette.get(point.label, INK), axes.transData.inverted().transform
        left, middle = back((best.x0, (best.y0 + best.y1) / 2))
        near = min(max(x, best.x0), best.x1), min(max(y, best.y0), best.y1)
        if math.dist(near, (x, y)) > 14:  # a thread to the dot
            thread_x, thread_y = zip((point.kl, point.gold), back(near), strict=True)
            axes.plot(thread_x, thread_y, color=colour, linewidth=0.7, alpha=0.7, zorder=1)
        axes.text(left, middle, point.label, va="center", ha="left", color=colour, fontweight="bold", zorder=5)


def _places(x: float, y: float, width: float, height: float) -> list[Bbox]:
    """Boxes of a label around a dot, the preferred ones first: beside its corners, above, below, then further out."""
    boxes = []
    for gap in (8, 15, 24, 34, 46, 60, 76, 94):
        # (right, up, share of the label that lies to the left of there)
        sides = [(gap, gap, 0.0), (gap, -gap, 0.0), (-gap, gap, 1.0), (-gap, -gap, 1.0)]
        sides += [(0, gap + 4, 0.5), (0, -gap - 4, 0.5), (gap + 2, 0, 0.0), (-gap - 2, 0, 1.0)]
        for right, up, share in sides:
            boxes.append(Bbox.from_bounds(x + right - share * width, y + up - height / 2, width, height))
    return boxes


def _ink(point: FrontierPoint, axes: Axes) -> list[Bbox]:
    """Boxes around what is drawn for a point: the dot, its error bars, and its way in short pieces."""
    transform = axes.transData.transform
    centre = transform((point.kl, point.gold))
    boxes = [Bbox.from_extents(*(centre - 5), *(centre + 5))]
    for interval, axis in ((point.kl_interval, 0), (point.gold_interval, 1)):
        if interval is not None and all(map(is_number, interval)):
            ends = [list((point.kl, point.gold)) for _ in range(2)]
            ends[0][axis], ends[1][axis] = interval
            low, high = transform(ends)
            boxes.append(Bbox.from_extents(*(low - 2), *(high + 2)))
    way: Any = transform(list(point.trajectory)) if point.trajectory else []
    for start, end in itertools.pairwise(way):
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            at = start + share * (end - start)
            boxes.append(Bbox.from_extents(*(at - 2), *(at + 2)))
    return boxes


def _overlap(box: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(box, other)
    return 0.0 if common is None else (common.width + 1) * (common.height + 1)


def _outside(box: Bbox, frame: Bbox) -> float:
    common = Bbox.intersection(box, frame)
    return box.width * box.height - (0.0 if common is None else common.width * common.height)
