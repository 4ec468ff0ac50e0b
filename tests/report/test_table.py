"""Cells, and the table in a terminal."""

import io
import math

import pytest
from rich.console import Console

from palign.report.contents import Cell, Row, Table
from palign.report.table import print_table


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell(2.0), "2.00"),
        (Cell(2.184, 2.121, 2.246), "2.18 [2.12, 2.25]"),
        (Cell(0.875, 0.85, 0.9, digits=1, percent=True), "87.5% [85.0, 90.0]"),
        (Cell(18234.4, digits=0), "18,234"),
        (Cell(-0.001, -0.004, 0.004), "0.00 [0.00, 0.00]"),
        (Cell(-0.5), "-0.50"),
        (Cell(None), "–"),
        (Cell(math.nan), "nan"),
        (Cell(1.0, -math.inf, math.inf), "1.00"),
        (Cell("best"), "best"),
    ],
)
def test_cells(cell, text):
    assert str(cell) == text


def printed(table: Table, width: int) -> str:
    out = io.StringIO()
    print_table(table, Console(file=out, width=width))
    return out.getvalue()


@pytest.fixture
def table() -> Table:
    rows = [Row(name, [Cell(1.5, 1.25, 1.75)] * 3) for name in ("SFT", "[bold]DPO[/bold]")]
    return Table(["gold", "win rate", "[red]KL"], rows, caption="95% intervals")


def test_table_prints_on_one_screen(table):
    text = printed(table, 120)
    assert text.count("1.50 [1.25, 1.75]") == 6
    assert text.count("SFT") == 1
    # Labels are not markup.
    assert "[bold]DPO[/bold]" in text and "[red]KL" in text and "95% intervals" in text


def test_table_wider_than_the_terminal_goes_on_below(table):
    text = printed(table, 60)
    assert text.count("1.50 [1.25, 1.75]") == 6
    assert text.count("SFT") == 2
    assert max(map(len, text.splitlines())) <= 60


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="row 'a' has 1 cells for 2 columns"):
        Table(["x", "y"], [Row("a", [Cell(1.0)])])
