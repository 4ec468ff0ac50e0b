"""Paths of workdirs and data: local, or in a bucket (`gs://...`), through `etils.epath` alike."""

import os

from etils import epath


def is_local(path: epath.PathLike) -> bool:
    """Whether a path lies on a file system of this machine."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root; a bucket's stays as it is, which epath's own `absolute` would break."""
    return epath.Path(path).absolute() if is_local(path) else epath.Path(path)
