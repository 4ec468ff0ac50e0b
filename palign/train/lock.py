"""One run at a time in a workdir: a file that says who is at work there, and that it still is.

The file is written again every few seconds. A run that finds one made on its own host asks the system whether that
process lives. Of another host's it waits to see whether the file changes: the run of a machine that was taken away left
one that does not.
"""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from palign.sharding.processes import is_main, wait_for_all
from palign.train.metrics import say
from palign.train.paths import is_local

FILE = "run.lock"
BEAT_SECONDS = 20.0
WAIT_SECONDS = 1.0  # between two looks at a lock that is waited for
PATIENCE_SECONDS = 3 * BEAT_SECONDS  # a lock of another host that did not change for so long is nobody's


@contextlib.contextmanager
def run_lock(workdir: epath.Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a workdir, which is made if need be; process 0 does so for all.

    On a local file system of which two runs at once ask for it, one gets it; in a bucket they must not ask within the
    same second.

    Args:
        workdir: the directory.
        wait: for a run that is at work in it, instead of refusing.

    Raises:
        ValueError: another run is at work in it, or the processes see different directories.
    """
    file, stop = workdir / FILE, threading.Event()
    if not is_main():
        wait_for_all(f"lock of {workdir}")
        if not file.is_file():
            raise ValueError(
                f"{workdir}: process {jax.process_index()} does not see what process 0 has written there; name a "
                "directory that all processes share, on a network file system or in a bucket"
            )
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    _take(file, wait)
    wait_for_all(f"lock of {workdir}")
    heart = threading.Thread(target=_beat, args=(file, stop), daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        file.unlink(missing_ok=True)


def _content(beat: int) -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "beat": beat})


def _take(file: epath.Path, wait: bool) -> None:
    for attempt in itertools.count():
        if _create(file):
            return
        owner = _read(file)
        if not owner or _is_stale(file, owner):
            if owner:
                say(f"{file.parent}: takes over from process {owner['pid']} on {owner['host']}, which is gone")
            file.unlink(missing_ok=True)
        elif wait:
            if not attempt:
                say(f"{file.parent}: waits for process {owner['pid']} on {owner['host']}, which is at work in it")
            time.sleep(WAIT_SECONDS)
        else:
            raise ValueError(
                f"{file.parent}: process {owner['pid']} on {owner['host']} is at work in it; wait for it, stop it, or "
                f"use another --workdir ({FILE} in it is its lock)"
            )


def _create(file: epath.Path) -> bool:
    if not is_local(file):  # a bucket has no exclusive creation that epath knows
        if file.exists():
            return False
        file.write_text(_content(0))
        return True
    try:
        with open(file, "x") as opened:
            opened.write(_content(0))
        return True
    except FileExistsError:
        return False


def _read(file: epath.Path) -> dict[str, Any]:
    """What a lock says; {} where it is gone, or was never written to its end."""
    for _ in range(3):
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return {}
        except json.JSONDecodeError:  # is being written
            time.sleep(0.5)
    return {}


def _is_stale(file: epath.Path, owner: dict[str, Any]) -> bool:
    if owner["host"] == socket.gethostname():
        return owner["pid"] == os.getpid() or not _is_alive(owner["pid"])
    say(f"{file.parent}: locked by {owner['host']}; waits {PATIENCE_SECONDS:.0f} s to see whether it is alive")
    time.sleep(PATIENCE_SECONDS)
    return _read(file) in (owner, {})


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _beat(file: epath.Path, stop: threading.Event) -> None:
    beats = 0
    while not stop.wait(BEAT_SECONDS):
        beats += 1
        with contextlib.suppress(OSError):  # one that fails is made up for by the next
            file.write_text(_content(beats))
