"""Reads preference data from JSON lines, strictly: what cannot be understood stops with its file and line.

The format of a row is told by its columns; `FORMATS` is the whole table. Other columns are ignored and counted.
"""

import contextlib
import difflib
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from palign.data.records import Record, make_record, number

ASSISTANT = "\n\nAssistant:"
MAX_LINE_BYTES = 1 << 24

Row = dict[str, Any]


class Fields(NamedTuple):
    """What a format's converter takes out of a row, not checked yet."""

    prompt: Any
    responses: Any
    scores: Any


def _from_pair(row: Row, where: str) -> Fields:
    return Fields(row["prompt"], [row["chosen"], row["rejected"]], [1.0, 0.0])


def _from_implicit_pair(row: Row, where: str) -> Fields:
    chosen, rejected = row["chosen"], row["rejected"]
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return Fields("", [chosen, rejected], [1.0, 0.0])  # make_record says what is wrong
    end = _last_common_end(chosen, rejected, ASSISTANT)
    if end < 0:
        raise ValueError(
            f"{where}: chosen and rejected share no turn that begins with {ASSISTANT!r}, so their prompt cannot be "
            "told; expected '\\n\\nHuman: ...\\n\\nAssistant: ...' dialogues of one history: else add a 'prompt' column"
        )
    return Fields(chosen[:end], [chosen[end:], rejected[end:]], [1.0, 0.0])


def _from_scored_list(row: Row, where: str) -> Fields:
    return Fields(row["prompt"], row["responses"], row["scores"])


def _from_ranked_list(row: Row, where: str) -> Fields:
    ranks = row["rank"]
    if isinstance(ranks, list):
        ranks = [-number(rank, f"rank {k}", where) for k, rank in enumerate(ranks, 1)]
    return Fields(row["prompt"], row["responses"], ranks)


def _from_labelled(row: Row, where: str) -> Fields:
    label = row["label"]
    if not (isinstance(label, bool) or label in (0, 1)) or isinstance(label, float):
        raise ValueError(f"{where}: label is {str(label)[:60]!r}; expected true or false")
    return Fields(row["prompt"], [row["completion"]], [1.0 if label else -1.0])


def _from_completion(row: Row, where: str) -> Fields:
    return Fields(row["prompt"], [row["completion"]], [0.0])


def _from_text(row: Row, where: str) -> Fields:
    return Fields("", [row["text"]], [0.0])


FORMATS: dict[tuple[str, ...], Callable[[Row, str], Fields]] = {
    ("prompt", "chosen", "rejected"): _from_pair,
    ("chosen", "rejected"): _from_implicit_pair,
    ("prompt", "responses", "scores"): _from_scored_list,  # higher is better
    ("prompt", "responses", "rank"): _from_ranked_list,  # lower is better
    ("prompt", "completion", "label"): _from_labelled,
    ("prompt", "completion"): _from_completion,
    ("text",): _from_text,
}


def read_records(path: epath.PathLike, *, limit: int | None = None) -> tuple[list[Record], dict[str, int]]:
    """Reads a `.jsonl` or `.jsonl.gz` file of preference data.

    Record ids are line numbers counted from 0, so they do not move when other lines are dropped.

    Args:
        path: the file.
        limit: read at most this many records; None = all.

    Returns:
        The records in the file's order, and the counts: `lines` read, `records` returned, `blank_lines` skipped,
        `identical` pairs dropped because both responses are the same text and so carry no preference, `responses` in
        all, and `ignored_column/NAME` rows that had a column nobody reads.

    Raises:
        ValueError: one line with file and line number, what was found, what was expected and what to do.
    """
    path = epath.Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected a positive number of records, or None for all")
    records: list[Record] = []
    counts: Counter[str] = Counter(lines=0, records=0, blank_lines=0, identical=0, responses=0)
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for line, raw in _lines(path):
        counts["lines"] += 1
        if not raw.strip():
            counts["blank_lines"] += 1
            continue
        where = f"{path}:{line}"
        row = parse_row(raw, where)
        columns = frozenset(row)
        if columns not in found:
            found[columns] = find_format(columns, where)
        counts.update(f"ignored_column/{name}" for name in columns.difference(found[columns]))
        fields = FORMATS[found[columns]](row, where)
        record = make_record(*fields, id=line - 1, where=where)
        if _is_identical_pair(record):
            counts["identical"] += 1
            continue
        records.append(record)
        counts["responses"] += len(record.responses)
        if len(records) == limit:
            break
    if not records:
        raise ValueError(f"{path}: no record in {counts['lines']} lines; expected one JSON object on each line")
    counts["records"] = len(records)
    return records, dict(counts)


def find_format(columns: frozenset[str], where: str) -> tuple[str, ...]:
    """Returns the format (a key of `FORMATS`) that a row with these columns has.

    Args:
        columns: the row's column names.
        where: "file:line".

    Returns:
        The format that uses the most of the columns.

    Raises:
        ValueError: if no format fits, with the nearest one, or if two fit and neither contains the other.
    """
    fitting = [names for names in FORMATS if columns.issuperset(names)]
    widest = [names for names in fitting if not any(set(names) < set(other) for other in fitting)]
    if len(widest) == 1:
        return widest[0]
    shown = ", ".join(sorted(columns)[:12]) or "none"
    if widest:
        both = " and ".join("+".join(names) for names in widest)
        raise ValueError(f"{where}: columns {shown} fit two formats, {both}; remove the columns of one of them")
    nearest = max(FORMATS, key=lambda names: (_likeness(names, columns), -len(names)))
    missing = [name for name in nearest if name not in columns]
    hints = [(name, difflib.get_close_matches(name, columns, 1)) for name in missing]
    renames = [f"rename {close[0]!r} to {name!r}" for name, close in hints if close]
    advice = "; ".join(renames) or f"add {', '.join(map(repr, missing))}"
    accepted = ", ".join("+".join(names) for names in FORMATS)
    raise ValueError(
        f"{where}: columns found: {shown}; formats accepted: {accepted}; the nearest is {'+'.join(nearest)}: {advice}"
    )


def parse_row(raw: bytes, where: str) -> Row:
    """Parses one line of JSON into a dict, refusing what `json` lets pass.

    Args:
        raw: the line, UTF-8.
        where: "file:line".

    Returns:
        The object.

    Raises:
        ValueError: for bytes that are not UTF-8, a byte-order mark, NaN and infinities, a key given twice, nesting or
            numbers beyond Python's limits, malformed JSON, or anything but an object.
    """
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{where}: the line begins with a byte-order mark; save the file as plain UTF-8 without one")
    try:
        row = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        bad = raw[error.start]
        raise ValueError(f"{where}: byte {bad:#04x} at {error.start} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply; expected a flat object") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON at column {error.colno} ({error.msg}); expected one whole object on each line"
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: the line holds a {type(row).__name__}; expected a JSON object {{...}}")
    return row


def _unique(items: list[tuple[str, Any]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        twice = next(name for name, count in Counter(name for name, _ in items).items() if count > 1)
        raise ValueError(f"key {twice[:60]!r} is given twice in one object; remove one")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write a finite number or remove the record")


@contextlib.contextmanager
def open_data(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a data file for reading, `.gz` unpacked."""
    with path.open("rb") as file:
        yield gzip.open(file) if path.name.endswith(".gz") else io.BufferedReader(file)  # type: ignore[misc]


def _lines(path: epath.Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, bytes); only a line feed ends a line, unlike in `str.splitlines`."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: expected a file named *.jsonl or *.jsonl.gz with one JSON object on each line")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.jsonl*")], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path}: there is no such file{hint}")
    line = 0
    try:
        with open_data(path) as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                line += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise ValueError(f"{path}:{line}: longer than {MAX_LINE_BYTES} bytes; expected one record a line")
                yield line, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{line + 1}: damaged or cut-off gzip file ({error}); fetch it again") from None


def _last_common_end(one: str, other: str, marker: str) -> int:
    """Returns where the last `marker` that both texts share, with everything before it, ends; -1 if there is none."""
    limit = min(len(one), len(other))
    differ = next((i for i in range(limit) if one[i] != other[i]), limit) if one[:limit] != other[:limit] else limit
    start = one.rfind(marker, 0, differ)
    return -1 if start < 0 else start + len(marker)


def _is_identical_pair(record: Record) -> bool:
    return len(record.responses) == 2 and record.responses[0] == record.responses[1]


def _likeness(names: tuple[str, ...], columns: frozenset[str]) -> float:
    """Returns how much of a format the columns cover, near misses counting half."""
    score = sum(1.0 if n in columns else 0.5 * bool(difflib.get_close_matches(n, columns, 1)) for n in names)
    return score / len(names)
