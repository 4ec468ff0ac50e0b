"""JSON read strictly: what Python's `json` lets pass, and others read differently, is refused."""

import json
from collections import Counter
from typing import Any

from palign.data.records import RecordError

MAX_LINE_BYTES = 1 << 24
MAX_DEPTH = 64
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")

Row = dict[str, Any]


def parse_row(raw: bytes, where: str) -> Row:
    """Parses one line of JSON into a dict.

    Args:
        raw: the line, UTF-8.
        where: "file:line".

    Returns:
        The object.

    Raises:
        RecordError: for a line beyond `MAX_LINE_BYTES`, bytes that are not UTF-8, a byte-order mark, NaN and
            infinities, a key given twice, nesting beyond `MAX_DEPTH`, numbers beyond Python's limits, malformed JSON,
            or anything but an object.
    """
    if len(raw) > MAX_LINE_BYTES:
        raise RecordError("line_too_long", f"{where}: longer than {MAX_LINE_BYTES} bytes; expected one record a line")
    return as_object(_parse(raw, where, "one whole object on each line"), where)


def as_object(value: Any, where: str) -> Row:
    """Returns a row that is an object.

    Raises:
        RecordError: it is something else.
    """
    if not isinstance(value, dict):
        found = f"the row is a {type(value).__name__}"
        raise RecordError("not_an_object", f"{where}: {found}; expected a JSON object {{...}}")
    return value


def parse_list(raw: bytes, where: str) -> list[Any]:
    """Parses a file that is one JSON list, as strictly as `parse_row`.

    Args:
        raw: the file, UTF-8.
        where: the file.

    Returns:
        The list's items; what they are is not checked.

    Raises:
        ValueError: as `parse_row`, without its limit on length.
    """
    items = _parse(raw, where, "one whole list of objects")
    if not isinstance(items, list):
        raise ValueError(f"{where}: the file holds a {type(items).__name__}; expected a list of objects [...]")
    return items


def _parse(raw: bytes, where: str, expected: str) -> Any:
    if raw.startswith(BYTE_ORDER_MARKS):
        found = "begins with a byte-order mark"
        raise RecordError("byte_order_mark", f"{where}: {found}; save the file as plain UTF-8 without one")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
            _check_depth(value, MAX_DEPTH)
    except UnicodeDecodeError as error:
        bad = f"byte {raw[error.start]:#04x} at {error.start}"
        raise RecordError("not_utf8", f"{where}: {bad} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        found = f"the JSON is nested too deeply, beyond {MAX_DEPTH} levels"
        raise RecordError("nested_too_deeply", f"{where}: {found}; expected a flat one") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        what = f"not JSON at {place} ({error.msg})"
        raise RecordError("not_json", f"{where}: {what}; expected {expected}") from None
    except RecordError as error:
        raise RecordError(error.reason, f"{where}: {error}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RecordError("huge_integer", f"{where}: {error}") from None
    return value


def _check_depth(value: Any, room: int) -> None:
    if not room:
        raise RecursionError
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            _check_depth(item, room - 1)


def _unique(items: list[tuple[str, Any]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        twice = next(name for name, count in Counter(name for name, _ in items).items() if count > 1)
        raise RecordError("duplicate_key", f"key {twice[:60]!r} is given twice in one object; remove one")
    return row


def _refuse_constant(name: str) -> None:
    raise RecordError("not_finite", f"{name} is not JSON; write a finite number or remove the record")
