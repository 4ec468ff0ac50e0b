"""The report's table in a terminal."""

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from palign.report.contents import Table

# What rich spends on a column beside its text, and on the frame.
_GUTTER = 2


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints a table with cells "value [low, high]"; one too wide for the terminal goes on below, labels repeated.

    Args:
        table: What to print.
        console: A rich console; standard output if None.
    """
    console = console or Console()
    label_width = max([len(table.label), *(len(row.label) for row in table.rows)]) + _GUTTER
    for columns in _fitting(_widths(table), console.width - label_width):
        console.print(_render(table, columns))
    if table.caption:
        console.print(Text(table.caption, style="dim"))


def _widths(table: Table) -> list[int]:
    return [
        max([len(name), *(len(str(row.cells[i])) for row in table.rows)]) + _GUTTER
        for i, name in enumerate(table.columns)
    ]


def _fitting(widths: list[int], room: int) -> list[list[int]]:
    """Groups of neighbouring columns that fit into the room, at least one column each."""
    groups: list[list[int]] = [[]]
    used = 0
    for i, width in enumerate(widths):
        if groups[-1] and used + width > room:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += width
    return groups


def _render(table: Table, columns: list[int]) -> RichTable:
    rendered = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, _GUTTER, 0, 0))
    rendered.add_column(Text(table.label), no_wrap=True)
    for i in columns:
        rendered.add_column(Text(table.columns[i]), justify="right", no_wrap=True)
    for row in table.rows:
        cells = []
        for i in columns:
            cell = row.cells[i]
            text = Text(cell.text)
            if cell.interval:
                text.append(f" {cell.interval}", style="dim")
            cells.append(text)
        rendered.add_row(Text(row.label), *cells)
    return rendered
