"""The pictures: valid SVG with its text as text, whatever the numbers."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from palign.report.contents import FrontierPoint, WinRate
from palign.report.plots import frontier, learning_curves, win_rates
from palign.report.svg import SERIES, colours

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


def box_of(svg: str) -> tuple[float, float]:
    return tuple(float(x) for x in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())


def labels_of(svg: str, labels: list[str]) -> dict[str, tuple[float, float]]:
    """Where each label's text begins, in units of the view box."""
    found = {}
    for node in ET.fromstring(svg).iter(f"{SVG}text"):
        text = "".join(node.itertext())
        if text in labels:
            found[text] = float(node.get("x")), float(node.get("y"))
    return found


def test_learning_curves_name_their_series():
    drawn = learning_curves(
        {"loss": {"train": ([0, 1, 2], [3, 2, 1]), "test": ([0, 2], [3, 2])}, "kl": {"kl": ([0], [1.0])}}
    )
    assert list(drawn) == ["loss", "kl"]
    assert {"train", "test", "step"} <= set(texts(drawn["loss"]))
    assert "kl" not in texts(drawn["kl"])  # a single series is named by the panel's title
    assert "kl" in ET.fromstring(drawn["kl"]).get("aria-label")


def test_many_series_keep_apart():
    names = [f"series {i}" for i in range(10)]
    svg = learning_curves({"p": {name: ([0, 1], [i, i + 1]) for i, name in enumerate(names)}})["p"]
    assert set(names) <= set(texts(svg))
    assert "stroke-dasharray" in svg  # the ninth shares a colour, not a dash
    assert colours(names)["series 8"] == SERIES[0]


@pytest.mark.parametrize("values", [[], [math.nan] * 3, [1.0, math.nan, math.inf], [5.0, 5.0, 5.0]])
def test_learning_curves_survive_odd_values(values):
    ET.fromstring(learning_curves({"p": {"a": (list(range(len(values))), values)}})["p"])


def test_frontier_labels_every_finite_point():
    points = [
        FrontierPoint("SFT", 0.0, 0.2, (-0.1, 0.1), (0.1, 0.3)),
        FrontierPoint("DPO", 3.0, 2.0, trajectory=[(0.0, 0.2), (1.0, 1.5), (3.0, 2.0)]),
        FrontierPoint("broken", math.nan, 1.0),
        FrontierPoint("odd interval", 2.0, 1.0, (math.nan, 3.0), (1.5, 2.0)),
    ]
    names = texts(frontier(points))
    assert {"SFT", "DPO", "odd interval", "gold reward"} <= set(names)
    assert "broken" not in names


def test_frontier_labels_do_not_cover_each_other():
    names = [f"model {i}" for i in range(7)]
    points = [FrontierPoint(name, 5 + 0.1 * i, 2 + 0.02 * i) for i, name in enumerate(names)]
    points += [FrontierPoint("far", 0.0, 0.0)]
    svg = frontier(points)
    places = labels_of(svg, [*names, "far"])
    assert len(places) == 8
    boxes = sorted(places.values())
    for i, (x, y) in enumerate(boxes):
        assert 0 <= x <= box_of(svg)[0] - 40
        for other_x, other_y in boxes[i + 1 :]:
            assert abs(x - other_x) > 7 * len("model 0") - 4 or abs(y - other_y) > 10


def test_win_rates_show_their_figures():
    svg = win_rates([WinRate("DPO", 0.875, 0.85, 0.9), WinRate("none", math.nan, math.nan, math.nan)], baseline="base")
    shown = texts(svg)
    assert {"DPO", "87.5%  [85.0, 90.0]", "none", "not measured", "50%"} <= set(shown)
    assert any("against base" in text for text in shown)


@pytest.mark.parametrize("draw", [lambda: frontier([]), lambda: win_rates([]), lambda: learning_curves({"p": {}})["p"]])
def test_nothing_to_draw_is_still_a_picture(draw):
    ET.fromstring(draw())


def test_pictures_are_deterministic_and_follow_the_page():
    points = [FrontierPoint("a & <b>", 1.0, 2.0, (0.5, 1.5), (1.8, 2.2))]
    svg = frontier(points)
    assert svg == frontier(points)
    assert "a & <b>" in texts(svg)
    root = ET.fromstring(svg)
    assert root.get("width") is None and root.get("role") == "img"
    assert "var(--series-0, #0072b2)" in svg and "var(--muted" in svg
    assert not re.search(r"[:\"] ?#(ffffff|000000)", svg)  # nothing that only suits one background
    assert "<style" not in svg and "<metadata" not in svg
    assert all(node.get("id", "frontier-").startswith("frontier-") for node in root.iter())


def test_palette_is_kept():
    svg = win_rates([WinRate("DPO", 0.9, 0.8, 1.0)], palette={"DPO": SERIES[3]})
    assert "--series-3" in svg and "--series-0" not in svg
