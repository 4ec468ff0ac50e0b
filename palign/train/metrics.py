"""Metrics on their way out: means divided once, a JSON line per log, TensorBoard, and progress on the terminal."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from palign.types import Mean

FILE = "metrics.jsonl"
QUIET_SECONDS = 10.0  # between lines where the output is not a terminal


def to_floats(metrics: Mapping[str, Mean], *, prefix: str = "") -> dict[str, float]:
    """Divides the means, on the host; a mean over nothing is left out."""
    host = jax.device_get(metrics)
    return {prefix + name: float(np.float64(m.sum) / m.count) for name, m in host.items() if m.count > 0}


def add(total: Mapping[str, Mean] | None, more: Mapping[str, Mean]) -> dict[str, Mean]:
    """Adds undivided means."""
    return (
        dict(more)
        if total is None
        else {k: Mean(total[k].sum + m.sum, total[k].count + m.count) for k, m in more.items()}
    )


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The logged lines of a run, oldest first; a last line that was cut off is left out."""
    file = workdir / FILE
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricWriter:
    """Appends to `metrics.jsonl` and to TensorBoard's event file."""

    def __init__(self, workdir: pathlib.Path, *, start_step: int):
        """Opens both; lines of steps after `start_step`, which a resumed run takes again, are removed."""
        kept = [line for line in read_metrics(workdir) if line["step"] <= start_step]
        temporary = workdir / f"{FILE}.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(workdir / FILE)  # whole at any instant
        self._file = (workdir / FILE).open("a", buffering=1)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line and one event per value; JSON has no NaN, so a value that is not finite becomes null."""
        finite = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._events.close()


class Reporter:
    """Progress of long work: a bar on a terminal, else a line every few seconds; both with what is left and a rate."""

    def __init__(self, title: str, total: int, *, start: int = 0, unit: str = "tok/s", console: Console | None = None):
        """Starts at `start` of `total` steps."""
        self._console = console or Console(stderr=True)
        self._title, self._total, self._unit = title, total, unit
        self._begin = self._spoken = time.monotonic()
        self._start, self._done, self._amount = start, start, 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> "Reporter":
        """Shows the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the bar and prints what was done in one line."""
        self._bar.stop()
        seconds = time.monotonic() - self._begin
        self.say(f"{self._title}: {self._done}/{self._total} in {seconds:.1f} s, {self.rate:,.0f} {self._unit}")

    @property
    def rate(self) -> float:
        """Amount (tokens, say) per second so far."""
        return self._amount / max(time.monotonic() - self._begin, 1e-9)

    def advance(self, done: int, amount: float, **values: float) -> None:
        """Sets how far the work is, adds what was worked off, and shows a few values."""
        self._done, self._amount = done, self._amount + amount
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        note = f"{self.rate:,.0f} {self._unit}  {shown}"
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if self._bar.disable and now - self._spoken > QUIET_SECONDS:
            self._spoken = now
            left = (now - self._begin) * (self._total - done) / max(done - self._start, 1)
            self.say(f"{self._title}: {done}/{self._total}, {left:.0f} s left, {note}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints a line to standard error."""
    print(text, file=sys.stderr, flush=True)
