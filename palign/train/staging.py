"""Directories that are whole or not there."""

import contextlib
from collections.abc import Iterator

from etils import epath

from palign.sharding.processes import is_main, wait_for_all


@contextlib.contextmanager
def staged(place: epath.Path, flag: str) -> Iterator[epath.Path]:
    """A directory that becomes `place` when all is written, for all processes before any goes on.

    Args:
        place: the directory, not there yet or empty.
        flag: of the command line that names it, for the message.

    Yields:
        The directory to write to; it is removed if anything goes wrong, or by the next attempt.

    Raises:
        ValueError: `place` holds something.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{flag}={place}: is there already; name a directory that is not")
    stage = place.parent / f".{place.name}.partial"
    if is_main():
        stage.rmtree(missing_ok=True)  # of an attempt that was stopped
        stage.mkdir(parents=True)
    wait_for_all(f"begins {place}")
    try:
        yield stage
        wait_for_all(f"ends {place}")
        if is_main():
            stage.rename(place)
        wait_for_all(f"{place} is there")
    finally:
        if is_main():
            stage.rmtree(missing_ok=True)
