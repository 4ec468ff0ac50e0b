"""The page: whole, escaped, self-contained and the same every time."""

import dataclasses
import html.parser
import math
import re

import pytest

from palign.report.contents import Token, TokenSample
from palign.report.page import (
    Cell,
    FrontierPoint,
    Output,
    Row,
    RunReport,
    Sample,
    Table,
    WinRate,
    render,
    write_report,
)
from palign.report.plots import histograms

EVIL = "<script>alert('x')</script> & $\\alpha$ {{ 7 * 7 }}"
VOID = {"meta", "link", "br", "img"}


@pytest.fixture
def report() -> RunReport:
    return RunReport(
        title="A run",
        facts={"parameters": "0.3 M"},
        table=Table(["gold"], [Row("SFT", [Cell(0.21, 0.15, 0.27)]), Row("DPO", [Cell(None)])], caption="brackets"),
        curves={"loss": {"train": ([0, 10], [2.0, 1.0]), "held-out": ([0, 10], [2.1, math.nan])}},
        frontier=[
            FrontierPoint("SFT", 0.0, 0.2),
            FrontierPoint("DPO", 3.0, 2.0, (2.8, 3.2), (1.9, 2.1), [(0.0, 0.2), (3.0, 2.0)]),
        ],
        win_rates=[WinRate("DPO", 0.87, 0.85, 0.89), WinRate("SFT again", 0.5, 0.46, 0.54, control=True)],
        samples=[Sample("review :", {"SFT": Output("it was good .", 0.92, True), "DPO": Output("", 0.0, False)})],
        notes=["mind the grammar"],
        config={"beta": 0.1},
    )


class Tags(html.parser.HTMLParser):
    """Checks that tags nest, and keeps ids, references and the text between tags."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.text, self.names = [], [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.handle_attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self.handle_attributes(attrs)

    def handle_attributes(self, attrs):
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.references += [value] if name in ("href", "xlink:href", "src") else []
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert not tags.open
    return tags


def test_page_is_self_contained(report):
    tags = parsed(render(report))
    assert not tags.names & {"script", "link", "img", "iframe", "object"}
    assert len(tags.ids) == len(set(tags.ids))
    assert all(reference.startswith("#") for reference in tags.references)
    assert {reference[1:] for reference in tags.references} <= set(tags.ids)
    assert "@import" not in render(report)


def test_page_shows_everything(report):
    text = " ".join(" ".join(parsed(render(report)).text).split())
    expected = [
        "A run", "parameters", "0.3 M", "SFT", "0.21", "[0.15, 0.27]", "–", "brackets", "KL to the reference", "87.0%",
        "[85.0, 89.0]", "SFT again", "loss", "held-out", "review :", "it was good .", "gold 0.92", "✓ grammatical",
        "(empty)", "✗ not grammatical", "mind the grammar", '"beta": 0.1',
    ]  # fmt: skip
    assert [word for word in expected if word not in text] == []


def test_page_is_the_same_every_time(report):
    assert render(report) == render(report)
    assert not re.search(r"20\d\d-\d\d-\d\d", render(report))


def test_texts_are_escaped_everywhere():
    report = RunReport(
        title=EVIL,
        facts={EVIL: EVIL},
        table=Table([EVIL], [Row(EVIL, [Cell(EVIL)])], label=EVIL, caption=EVIL),
        curves={EVIL: {EVIL: ([0, 1], [0.0, 1.0]), "b": ([0, 1], [1.0, 0.0])}},
        frontier=[FrontierPoint(EVIL, 1.0, 1.0)],
        win_rates=[WinRate(EVIL, 0.5, 0.4, 0.6)],
        samples=[Sample(EVIL, {EVIL: Output(EVIL)})],
        tables={EVIL: Table([EVIL], [Row(EVIL, [Cell(EVIL)])])},
        histograms={EVIL: {EVIL: ([0, 1, 2], [3, 4])}},
        token_samples=[TokenSample(EVIL, {EVIL: [Token(EVIL, target=True), Token(EVIL, special=True)]})],
        notes=[EVIL],
        config={EVIL: EVIL},
    )
    page = render(report)
    tags = parsed(page)
    assert "script" not in tags.names
    assert "<script" not in page
    # As it was written: neither a template expression nor mathematics.
    text = " ".join(tags.text)
    assert "49" not in text.split()
    assert text.count("{{ 7 * 7 }}") >= 14
    assert "$\\alpha$" in text


def test_empty_parts_are_left_out():
    page = render(RunReport("only a title"))
    assert parsed(page).text.count("only a title") == 2
    assert "<h2" not in page and "<svg" not in page


@pytest.mark.parametrize("part", ["facts", "table", "curves", "frontier", "win_rates", "samples", "notes", "config"])
def test_each_part_may_be_missing(report, part):
    default = getattr(RunReport("x"), part)
    parsed(render(dataclasses.replace(report, **{part: default})))


def test_tokens_say_whether_they_are_learned_and_stand_together_as_the_text():
    tokens = [Token("a b"), Token(" c", target=True), Token("</s>", target=True, special=True)]
    page = render(RunReport("x", token_samples=[TokenSample("Example 1", {"response 1": tokens})]))
    assert (
        '<p class="tokens"><span class="">a b</span><span class="target"> c</span>'
        '<span class="target special">&lt;/s&gt;</span></p>'
    ) in page


def test_a_histogram_shows_shares_so_that_sets_of_any_size_compare():
    few, many, other = (
        histograms({"tokens": {"best": ([0, 10, 20], counts), "worst": ([0, 10, 20], [0, 0])}})["tokens"]
        for counts in ([1, 3], [10, 30], [3, 1])
    )
    assert few == many != other and "Histogram of tokens, for best, worst" in few


def test_a_model_has_one_colour_on_the_page(report):
    page = render(report)
    assert 'style="--tone: var(--series-0, #0072b2)"' in page  # SFT's answer, the frontier's first model
    # Training curves that are no models are grey, so they cannot be taken for one.
    loss = page[page.index('aria-label="loss by step') : page.index("Samples side by side")]
    assert "--series-" not in loss
    assert "var(--ink" in loss


def test_series_are_coloured_where_no_models_are_compared(report):
    alone = RunReport("x", curves=report.curves)
    assert "stroke: var(--series-0" in render(alone)


def test_write_report_makes_folders_and_replaces(tmp_path, report):
    path = write_report(tmp_path / "a" / "b" / "report.html", report)
    assert path.read_text(encoding="utf-8") == render(report)
    write_report(path, RunReport("second"))
    assert "second" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_config_may_hold_anything():
    page = render(RunReport("x", config={"path": object, "nan": math.nan, "tuple": (1, 2)}))
    assert "NaN" in page
