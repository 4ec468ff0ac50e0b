"""Paths of workdirs and data: local, or in a bucket (`gs://...`), through `etils.epath` alike."""

import os
from collections.abc import Iterable

from etils import epath


def is_local(path: epath.PathLike) -> bool:
    """Whether a path lies on a file system of this machine."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root; a bucket's stays as it is, which epath's own `absolute` would break."""
    return epath.Path(path).absolute() if is_local(path) else epath.Path(path)


def write_lines(path: epath.PathLike, lines: Iterable[bytes]) -> None:
    """Writes a file of lines, which are given without their ends; it is whole as soon as it has its name."""
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.parent / f"{file.name}.tmp"
    try:
        with temporary.open("wb") as opened:
            opened.writelines(line + b"\n" for line in lines)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
