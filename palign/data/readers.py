"""Reads preference data strictly: what cannot be understood stops with its file and line, or is skipped and counted.

Where rows come from is the business of `sources`, what their columns mean that of `formats`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from palign.data.formats import PROMPT_ONLY, REFUSED, Fields, Format, find_format, weigh
from palign.data.records import Record, RecordError, Text, make_record, short
from palign.data.sources import open_source
from palign.data.strict_json import Row, as_object, parse_row

BAD_RECORDS = ("error", "skip")
COUNTS = ("rows", "records", "blank_lines", "identical", "responses")  # said even where they are 0


# Role -> the roles that may speak next; "" is the beginning.
FOLLOWS: dict[str, tuple[str, ...]] = {
    "": ("system", "developer", "user"),
    "system": ("user", "assistant"),
    "developer": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class Columns(NamedTuple):
    """What is known of all rows with the same columns."""

    format: Format
    ignored: frozenset[str]


def read_records(
    path: epath.PathLike,
    *,
    limit: int | None = None,
    bad_records: str = "error",
    score_weights: Mapping[str, float] | None = None,
    first_id: int = 0,
) -> tuple[list[Record], dict[str, int]]:
    """Reads preference data from a file, a directory, a glob or a named data set (see `open_source`).

    Record ids are row numbers counted from `first_id`, so they do not move when other rows are dropped.

    Args:
        path: where the data is.
        limit: read at most this many records; None = all.
        bad_records: `error`, or `skip`: records that cannot be used are dropped and counted.
        score_weights: attribute -> weight of the ratings that make up a score, in place of the format's own.
        first_id: the first row's id.

    Returns:
        The records in order, and the counts: `rows` read, `records` returned, `blank_lines` skipped, `identical` pairs
        dropped because both responses are the same text, `ties` dropped because a comparison ended in one,
        `blank_responses` kept beside others that say something, `responses` in all, `format/NAME` rows of each format,
        `ignored_column/NAME` rows that had a column nobody reads, `ignored_file/NAME`, and `skipped/REASON` records.

    Raises:
        ValueError: one line with file and line number, what was found, what was expected and what to do.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected a positive number of records, or None for all")
    if bad_records not in BAD_RECORDS:
        raise ValueError(f"bad_records is {bad_records!r}; expected one of {', '.join(BAD_RECORDS)}")
    source, reader = open_source(path), _Reader(score_weights)
    reader.counts.update(f"ignored_file/{short(name)}" for name in source.ignored)
    for id, (where, raw) in enumerate(source.rows, first_id):
        reader.counts["rows"] += 1
        if isinstance(raw, bytes) and not raw.strip():
            reader.counts["blank_lines"] += 1
            continue
        try:
            if not reader.take(raw, where, id, limit):
                break
        except RecordError as error:
            if bad_records == "error":
                raise
            reader.counts[f"skipped/{error.reason}"] += 1
    records, counts = reader.records[:limit], reader.counts
    if not records:
        found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)
        raise ValueError(f"{path}: no record is left ({found}); expected at least one that can be learned from")
    responses = sum(len(record.responses) for record in records)
    return records, dict(counts) | {"records": len(records), "responses": responses}


class _Reader:
    """Turns rows into records, and counts."""

    def __init__(self, score_weights: Mapping[str, float] | None):
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        self.records: list[Record] = []
        self._weights = score_weights
        self._columns: dict[frozenset[str], Columns] = {}
        self._ids: dict[str, str] = {}  # the column `id` -> where it was
        self._lists: dict[Text, int] = {}  # prompt -> the record that collects its rated responses

    def take(self, raw: Any, where: str, id: int, limit: int | None) -> bool:
        """Takes a row in; False where no more are wanted."""
        row = parse_row(raw, where) if isinstance(raw, bytes) else as_object(raw, where)
        _refuse_columns(row, where)
        format, ignored = self._columns_of(row, where)
        self._check_id(row, where)
        fields = format.convert(row, where)
        record = fields and make_record(*self._weighed(fields, format, where), id=id, where=where)
        if record:
            _check_turns(record, where)
            self._check_blank(record, format, where)
        kind = "" if record is None or isinstance(record.prompt, str) else " in messages"
        self.counts[f"format/{format.name}{kind}"] += 1
        self.counts.update(f"ignored_column/{short(name)}" for name in ignored)
        if record is None:
            self.counts["ties"] += 1
        elif len(record.responses) == 2 and record.responses[0] == record.responses[1]:
            self.counts["identical"] += 1
        elif format.one_response:
            return self._collect(record, limit)
        else:
            self.records.append(record)
        return limit is None or format.one_response or len(self.records) < limit

    def _collect(self, record: Record, limit: int | None) -> bool:
        """Adds a rated response to the list of its prompt."""
        if record.prompt not in self._lists:
            self._lists[record.prompt] = len(self.records)
            self.records.append(record)
            return limit is None or len(self.records) <= limit
        place = self._lists[record.prompt]
        known = self.records[place]
        responses, scores = known.responses + record.responses, known.scores + record.scores
        self.records[place] = known._replace(responses=responses, scores=scores)
        return True

    def _columns_of(self, row: Row, where: str) -> Columns:
        names = frozenset(row)
        if names not in self._columns:
            format = find_format(names, where)
            self._columns[names] = Columns(format, names.difference(format.columns, format.extra))
        return self._columns[names]

    def _check_id(self, row: Row, where: str) -> None:
        given = row.get("id")
        if given is None:
            return
        before = self._ids.setdefault(repr(given), where)
        if before != where:
            advice = "give each record an id of its own, or remove the column"
            raise RecordError("duplicate_id", f"{where}: id {repr(given)[:60]} is that of {before} too; {advice}")

    def _weighed(self, fields: Fields, format: Format, where: str) -> Fields:
        if not format.weights:
            return fields
        weights = self._weights or format.weights
        scores = [weigh(r, weights, f"response {k}", where) for k, r in enumerate(fields.scores, 1)]
        return fields._replace(scores=scores)

    def _check_blank(self, record: Record, format: Format, where: str) -> None:
        if not _says_something(record.prompt) and "text" not in format.columns:
            advice = "write it, or give a text without a prompt in the column 'text'"
            raise RecordError("blank_prompt", f"{where}: the prompt is blank; {advice}")
        blank = sum(not _says_something(response) for response in record.responses)
        if blank == len(record.responses) and format != PROMPT_ONLY:
            advice = "there is nothing to learn: remove the record"
            raise RecordError("blank_response", f"{where}: no response says anything; {advice}")
        elif blank and format != PROMPT_ONLY:
            self.counts["blank_responses"] += blank


def _check_turns(record: Record, where: str) -> None:
    """Refuses a conversation that templates do not agree on, or whose response is none of the assistant's."""
    for k, response in enumerate(record.responses, 1):
        if isinstance(response, str):
            return
        place, before = f"{where}: response {k}", ""
        for n, turn in enumerate((*record.prompt, *response), 1):
            if turn.role not in FOLLOWS[before]:  # type: ignore[union-attr]
                found = f"message {n} of the conversation is {turn.role} " + (
                    f"after {before}" if before else "at first"
                )
                raise RecordError("roles", f"{place}: {found}; expected {' or '.join(FOLLOWS[before])}")
            before = turn.role
        if not response or response[0].role != "assistant" or before != "assistant":
            shown = ", ".join(turn.role for turn in response[:6]) or "no message"
            raise RecordError("roles", f"{place} is {shown}; expected it to begin and to end with the assistant")


def _refuse_columns(row: Row, where: str) -> None:
    for name in row.keys() & REFUSED.keys():
        if row[name] not in (None, "", [], {}):
            raise RecordError("refused_column", f"{where}: column {name!r} cannot be honoured; {REFUSED[name]}")


def _says_something(text: Text) -> bool:
    return bool(text.strip()) if isinstance(text, str) else any(turn.content.strip() for turn in text)
