"""The contestant's end of the driver's pipe. Standard library only: it runs in every contestant's interpreter.

A contestant makes its model ready and calls `serve`. By hand, `echo 0 | python -m benchmarks.contestants.NAME ...`
takes one step and prints what it gave.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

PIPE = "PALIGN_BENCHMARK_PIPE"  # the number of an open file that answers go to: libraries print on standard output
STATUS = pathlib.Path("/proc/self/status")


class Done(NamedTuple):
    """What a step gave.

    Attributes:
        values: name -> a number that all contestants must find alike: loss, gradient norm.
        work: name -> how much was done: pairs, tokens.
        same: name -> what must be equal to the letter on all sides: a digest of the token ids.
    """

    values: Mapping[str, float]
    work: Mapping[str, float]
    same: Mapping[str, str]


def serve(
    step: Callable[[int], Done],
    *,
    packages: Sequence[str],
    same: Mapping[str, str],
    device: str = "cpu",
    device_peak: Callable[[], int | None] = lambda: None,
) -> None:
    """Says what this is, then takes the steps that are asked for on standard input until it ends.

    Args:
        step: takes step i = 0, 1, ... and returns when its results are there; the time of the call is what is measured.
        packages: whose versions matter.
        same: what must be equal to the letter on all sides before any step: a digest of the weights.
        device: what it computes on.
        device_peak: most bytes that were in use on the accelerator so far; None where there is none.
    """
    out = os.fdopen(int(os.environ[PIPE]), "w") if PIPE in os.environ else sys.stdout

    def answer(message: Mapping[str, object]) -> None:
        print(json.dumps(message), file=out, flush=True)

    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    answer({"versions": versions, "device": device, "same": {**same, "device": device}})
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        done = step(int(line))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        answer({"wall": wall, "cpu": cpu, "peak": peak_resident(), "device_peak": device_peak(), **done._asdict()})


def peak_resident() -> int | None:
    """Most bytes of this process that were in memory so far; None where the system does not say (not Linux)."""
    if not STATUS.exists():
        return None
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])
