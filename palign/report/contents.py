"""What a report shows, as plain values: nothing here knows a model, an array or a run directory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# A learning curve: steps and values of the same length.
Curve = tuple[Sequence[float], Sequence[float]]
# How often values fall between two edges: the edges, and one count fewer.
Histogram = tuple[Sequence[float], Sequence[float]]


def is_number(value: float | None) -> bool:
    """Says whether a figure can be drawn: neither missing nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


@dataclass(frozen=True)
class Cell:
    """A figure of the table, with its interval where it has one.

    Attributes:
        value: The figure, a text, or None where it does not apply.
        low: Lower end of the interval.
        high: Upper end of the interval.
        digits: Digits after the decimal point.
        percent: Shows fractions in per cent.
    """

    value: float | str | None
    low: float | None = None
    high: float | None = None
    digits: int = 2
    percent: bool = False

    @property
    def text(self) -> str:
        """The figure without its interval."""
        if isinstance(self.value, str):
            return self.value
        if not is_number(self.value):
            return "–" if self.value is None else str(self.value)
        return self._number(self.value) + ("%" if self.percent else "")

    @property
    def interval(self) -> str:
        """The interval as "[low, high]", or nothing."""
        if not (is_number(self.low) and is_number(self.high)):
            return ""
        return f"[{self._number(self.low)}, {self._number(self.high)}]"

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".strip()

    def _number(self, value: Any) -> str:
        text = f"{value * (100 if self.percent else 1):,.{self.digits}f}"
        # No minus sign before zero.
        return text.removeprefix("-") if not text.strip("-0.,") else text


@dataclass(frozen=True)
class Row:
    """A line of the table: a label and one cell per column."""

    label: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """A table whose first column is the label.

    Attributes:
        columns: Names of the columns after the label.
        rows: The lines.
        label: Heading of the first column.
        caption: A sentence under the table.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    label: str = "model"
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"row {row.label!r} has {len(row.cells)} cells for {len(self.columns)} columns")


@dataclass(frozen=True)
class FrontierPoint:
    """A model in the picture of gold reward against KL, with the way that training took there.

    Attributes:
        label: The model's name.
        kl: KL to the reference, nats per response.
        gold: Mean gold reward.
        kl_interval: (low, high) of the KL.
        gold_interval: (low, high) of the gold reward.
        trajectory: (kl, gold) during training, in order.
    """

    label: str
    kl: float
    gold: float
    kl_interval: tuple[float, float] | None = None
    gold_interval: tuple[float, float] | None = None
    trajectory: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class WinRate:
    """A bar: how often a model beats the baseline, in [0, 1].

    Attributes:
        label: The model's name.
        value: The win rate.
        low: Lower end of its interval.
        high: Upper end of its interval.
        control: True for the baseline against a second sample of itself, which is drawn in grey.
    """

    label: str
    value: float
    low: float
    high: float
    control: bool = False


@dataclass(frozen=True)
class Bar:
    """A horizontal bar.

    Attributes:
        label: What is measured.
        value: The figure.
        low: Lower end of its interval, or None.
        high: Upper end of its interval, or None.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Claim:
    """A statement, what became of it, and the numbers.

    Attributes:
        statement: In a sentence.
        verdict: In a word or two.
        numbers: The sentences that the verdict rests on, the deciding one first.
        remark: What a reader should know besides.
    """

    statement: str
    verdict: str
    numbers: Sequence[str]
    remark: str = ""


@dataclass(frozen=True)
class Output:
    """What one model answered, with its gold reward and validity where they are known."""

    text: str
    gold: float | None = None
    valid: bool | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt with the answers of several models, side by side."""

    prompt: str
    outputs: Mapping[str, Output]


@dataclass(frozen=True)
class Token:
    """A piece of a text as a model sees it.

    Attributes:
        text: The characters that it stands for, or the name of a control token.
        target: Whether it is learned.
        special: Whether it is no text: a control token, or a byte of a character.
    """

    text: str
    target: bool = False
    special: bool = False


@dataclass(frozen=True)
class TokenSample:
    """An example as a model sees it: heading -> tokens, the prompt first."""

    title: str
    parts: Mapping[str, Sequence[Token]]


@dataclass(frozen=True)
class RunReport:
    """Everything on the page; a part that is empty is left out.

    Attributes:
        title: Heading.
        facts: Short facts under the heading, name to value.
        table: The main table.
        tables: Heading -> further tables, in order.
        histograms: Panel title -> series name -> (edges, counts).
        curves: Panel title -> series name -> (steps, values).
        bands: Panel title -> series name -> (lower, upper ends), for those curves that have a band around them.
        frontier: Models in the picture of gold reward against KL.
        frontiers: Panel title -> models, where there are too many for one such picture.
        win_rates: Bars, in order.
        bars: Panel title -> bars, in order.
        claims: Statements with their verdicts.
        samples: Prompts with answers.
        token_samples: Examples, token by token.
        notes: Sentences that a reader of the figures should know.
        config: The run's settings, shown as JSON.
    """

    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    table: Table | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    histograms: Mapping[str, Mapping[str, Histogram]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    bands: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    frontier: Sequence[FrontierPoint] = ()
    frontiers: Mapping[str, Sequence[FrontierPoint]] = field(default_factory=dict)
    win_rates: Sequence[WinRate] = ()
    bars: Mapping[str, Sequence[Bar]] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    samples: Sequence[Sample] = ()
    token_samples: Sequence[TokenSample] = ()
    notes: Sequence[str] = ()
    config: Any = None
