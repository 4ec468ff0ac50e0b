"""Where rows come from: files of several kinds, directories and globs of them, and data sets that have names.

What a row means is told by its columns (`formats`), wherever it comes from.
"""

import contextlib
import difflib
import functools
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from palign.data import strict_json, tables


class Located(NamedTuple):
    """A row and its place, "file:line" or "file:row n", counted from 1."""

    where: str
    row: Any  # bytes: JSON, not parsed yet


class Source(NamedTuple):
    """What a path stands for.

    Attributes:
        rows: all rows, in an order that does not change.
        files: the files that they are read from; none of a data set that has a name.
        ignored: names of files beside the data that are none.
    """

    rows: Iterator[Located]
    files: tuple[epath.Path, ...] = ()
    ignored: tuple[str, ...] = ()


def open_source(path: epath.PathLike) -> Source:
    """Finds the rows that a path stands for.

    Args:
        path: a file of a kind in `READERS`; a directory of such files; a glob; a directory that
            `datasets.Dataset.save_to_disk` wrote; `tfds:NAME[:VERSION]/SPLIT`; `hf:NAME[:CONFIG]/SPLIT`.

    Returns:
        The source; its rows are read as they are asked for.

    Raises:
        ValueError: one line with the path and what to do: nothing is there, a file is of no known kind, damaged or
            without rows, or a package is missing. Also while the rows are read.
    """
    scheme = str(path).partition(":")[0]
    if scheme in NAMED:
        return Source(_some(str(path), _located(str(path), NAMED[scheme](str(path)))))
    found = epath.Path(path)
    if found.is_dir():
        return _open_directory(found)
    files = _glob(found) if re.search(r"[*?\[]", str(path)) and not found.exists() else [found]
    for file in files:
        _check_file(file)
    return Source(itertools.chain.from_iterable(map(_read, files)), tuple(files))


def is_json_lines(path: epath.PathLike) -> bool:
    """Whether a path is one file of JSON lines by its name."""
    return str(path).endswith((".jsonl", ".jsonl.gz"))


@contextlib.contextmanager
def open_data(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a data file for reading, `.gz` unpacked."""
    with path.open("rb") as file:
        yield gzip.open(file) if path.name.endswith(".gz") else io.BufferedReader(file)  # type: ignore[misc]


def _open_directory(directory: epath.Path) -> Source:
    if (directory / "state.json").is_file():
        rows = _some(str(directory), _located(str(directory), tables.read_saved(directory)))
        return Source(rows, tuple(sorted(directory.glob("*.arrow"))))
    names = sorted(entry.name for entry in directory.iterdir())
    inside = ", ".join(name for name in names if (directory / name).is_dir())
    if "dataset_dict.json" in names:
        raise ValueError(f"{directory}: holds several data sets; name one of its directories: {inside}")
    if "features.json" in names:
        raise ValueError(f"{directory}: holds a TFDS data set; name one of its splits: tfds:{directory}/SPLIT")
    files = [name for name in names if _reader(name)]
    if not files:
        near = f"; its directories are {inside}" if inside else ""
        raise ValueError(f"{directory}: no file in it is named {_kinds()}{near}")
    rows = itertools.chain.from_iterable(_read(directory / name) for name in files)
    ignored = tuple(name for name in names if name not in files)
    return Source(rows, tuple(directory / name for name in files), ignored)


def _glob(pattern: epath.Path) -> list[epath.Path]:
    parts = pattern.parts
    fixed = next(n for n, part in enumerate(parts) if re.search(r"[*?\[]", part))
    found = sorted(epath.Path(*parts[:fixed]).glob("/".join(parts[fixed:])), key=str)
    files = [path for path in found if path.is_file()]
    if not files:
        raise ValueError(f"{pattern}: no file matches; put it in quotes where the shell would expand it")
    return files


def _check_file(path: epath.Path) -> None:
    if not path.is_file():
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, 1)
        hub = f"; one of the Hugging Face Hub is hf:{path}/SPLIT" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
        advice = f"; did you mean {near[0]!r}?" if near else "" if _reader(path.name) else hub
        raise ValueError(f"{path}: there is no such file{advice}")
    if _reader(path.name) is None:
        raise ValueError(f"{path}: expected a file named {_kinds()}, or a directory of such files")


def _read(path: epath.Path) -> Iterator[Located]:
    """The rows of one file."""
    reader = _reader(path.name)
    assert reader is not None, path
    return _some(str(path), reader(path))


def _read_lines(path: epath.Path) -> Iterator[Located]:
    """Yields lines; only a line feed ends one, unlike in `str.splitlines`."""
    line, most = 0, strict_json.MAX_LINE_BYTES + 1
    try:
        with open_data(path) as file:
            while raw := file.readline(most):
                line += 1
                yield Located(f"{path}:{line}", raw)
                while len(raw) == most and not raw.endswith(b"\n"):  # the rest of a line that is too long
                    raw = file.readline(most)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{line + 1}: damaged or cut-off gzip file ({error}); fetch it again") from None


def _read_json(path: epath.Path) -> Iterator[Located]:
    """Yields the items of a list, or lines where the file does not begin with one."""
    with open_data(path) as file:
        begins = file.read(4096).lstrip()[:1]
    if begins != b"[":
        return _read_lines(path)
    return _located(str(path), strict_json.parse_list(path.read_bytes(), str(path)))


def _located(place: str, rows: Iterable[Any]) -> Iterator[Located]:
    return (Located(f"{place}:row {n}", row) for n, row in enumerate(rows, 1))


def _some(place: str, rows: Iterator[Located]) -> Iterator[Located]:
    """Passes rows on, of which there must be one."""
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{place}: has no rows; expected at least one: make or fetch it again, or leave it out")
    yield first
    yield from rows


def _of_table(read: Callable[[epath.Path], Iterator[Any]], path: epath.Path) -> Iterator[Located]:
    return _located(str(path), read(path))


# End of a file's name -> how its rows are read.
READERS: dict[str, Callable[[epath.Path], Iterator[Located]]] = {
    ".jsonl": _read_lines,
    ".jsonl.gz": _read_lines,
    ".json": _read_json,
    ".parquet": functools.partial(_of_table, tables.read_parquet),
    ".array_record": functools.partial(_of_table, tables.read_array_record),
}
# What stands before the first colon -> how such a data set is read.
NAMED: dict[str, Callable[[str], Iterator[Any]]] = {"tfds": tables.read_tfds, "hf": tables.read_hugging_face}


def _reader(name: str) -> Callable[[epath.Path], Iterator[Located]] | None:
    name = re.sub(r"-\d+-of-\d+$", "", name)  # a shard
    return next((read for end, read in READERS.items() if name.endswith(end)), None)


def _kinds() -> str:
    return ", ".join(f"*{end}" for end in READERS)
