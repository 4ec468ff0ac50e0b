"""Metrics on their way out: means divided once, a JSON line per log, TensorBoard, and progress on the terminal."""

import contextlib
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from palign.sharding.processes import is_main
from palign.train.paths import is_local
from palign.types import Mean

FILE = "metrics.jsonl"
EVENTS = "tensorboard"
COPY_SECONDS = 60.0
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


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The logged lines of a run, oldest first; a last line that was cut off is left out."""
    file = workdir / FILE
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricWriter:
    """Appends to `metrics.jsonl` and to TensorBoard's event file; in process 0, in the others nothing is written.

    Files in a bucket cannot be appended to: there both are written on this machine and copied as a whole, at every
    `flush` and else about once a minute.
    """

    def __init__(self, workdir: epath.Path, *, start_step: int):
        """Opens both; lines of steps after `start_step`, which a resumed run takes again, are removed."""
        self._closing = contextlib.ExitStack()
        self._workdir, self._copied = workdir, time.monotonic()
        self._writes = is_main()
        if not self._writes:
            return
        local = workdir if is_local(workdir) else self._closing.enter_context(tempfile.TemporaryDirectory())
        self._local = pathlib.Path(local)
        kept = [line for line in read_metrics(workdir) if line["step"] <= start_step]
        temporary = self._local / f"{FILE}.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self._local / FILE)  # whole at any instant
        self._file = (self._local / FILE).open("a", buffering=1)
        self._events = SummaryWriter(str(self._local / EVENTS), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line and one event per value; JSON has no NaN, so a value that is not finite becomes null."""
        if not self._writes:
            return
        finite = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if time.monotonic() - self._copied > COPY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Copies both to the workdir, where that is in a bucket."""
        self._copied = time.monotonic()
        if not self._writes or is_local(self._workdir):
            return
        self._events.flush()
        (self._workdir / EVENTS).mkdir(parents=True, exist_ok=True)
        for file in [self._local / FILE, *(self._local / EVENTS).iterdir()]:
            epath.Path(file).copy(self._workdir / file.relative_to(self._local), overwrite=True)

    def close(self) -> None:
        """Ends both files."""
        if self._writes:
            self.flush()
            self._file.close()
            self._events.close()
        self._closing.close()


class Reporter:
    """Progress of long work: a bar on a terminal, else a line every few seconds; both with what is left and a rate."""

    def __init__(self, title: str, total: int, *, start: int = 0, unit: str = "tok/s", console: Console | None = None):
        """Starts at `start` of `total` steps."""
        self._console = console or Console(stderr=True, quiet=not is_main())
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
    """Prints a line to standard error, in process 0."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def counted(counts: Mapping[str, int]) -> str:
    """Counts as a part of such a line."""
    return ", ".join(f"{count:,} {shown(name)}" for name, count in counts.items())


def shown(counter: str) -> str:
    """The name of a counter as it is printed; a file's or a column's in it as it stands."""
    what, slash, name = counter.partition("/")
    return what.replace("_", " ") + slash + (name if what.startswith("ignored") else name.replace("_", " "))
