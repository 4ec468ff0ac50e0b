"""A command as several processes of this machine, on CPU devices."""

import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

GRACE_SECONDS = 10.0  # for the others to end by themselves when one has failed


def launch(command: Sequence[str], *, processes: int, devices: int) -> int:
    """Runs the processes to their end; SIGTERM and SIGINT go to all of them.

    Args:
        command: is given `--coordinator`, `--processes` and `--process` besides.
        processes: how many.
        devices: CPU devices of each.

    Returns:
        The exit code of the first that failed, which ends the others; 0 where none did.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    flags = [f"--coordinator={coordinator}", f"--processes={processes}"]
    start = functools.partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = [start([*command, *flags, f"--process={i}"], env=environment) for i in range(processes)]

    def pass_on(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    readers = [threading.Thread(target=_forward, args=(i, child.stdout)) for i, child in enumerate(children)]
    for reader in readers:
        reader.start()
    failed = _wait(children)
    for reader in readers:
        reader.join()
    return failed if failed >= 0 else 128 - failed  # a signal's number, as shells say it


def _wait(children: Sequence[subprocess.Popen]) -> int:
    failed, deadline = 0, float("inf")
    while None in [child.poll() for child in children]:
        failed = failed or _worst(children)
        deadline = min(deadline, time.monotonic() + GRACE_SECONDS) if failed else deadline
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)
    return failed or _worst(children)


def _worst(children: Sequence[subprocess.Popen]) -> int:
    """The code of one that failed: rather of a cause than of one that lost another (70, or aborted by JAX)."""
    codes = [child.returncode for child in children if child.returncode]
    return min(codes, key=lambda code: code in (70, -signal.SIGABRT), default=0)


def _forward(process: int, lines: IO[str] | None) -> None:
    for line in lines or ():
        sys.stderr.write(f"[{process}] {line}")
        sys.stderr.flush()
