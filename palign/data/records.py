"""One preference example as text: a prompt, its responses, and what somebody thought of each."""

import math
from typing import Any, NamedTuple

MAX_FLOAT32 = 3.4028234663852886e38
MAX_INTEGER = 1 << 53  # doubles hold every integer up to here


ROLES = ("system", "developer", "user", "assistant", "tool")


class RecordError(ValueError):
    r"""A record that cannot be used; the message is one line that begins with its place.

    Whatever a file holds is shown in it so that it stays on that line: a newline as `\n`.

    Attributes:
        reason: what is wrong in one or two words, such as `not_json`; records that are skipped are counted by it.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(printable(message))
        self.reason = reason


def printable(text: str) -> str:
    """Returns text on one line: characters that would not show, or would end the line, as Python writes them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(name: str) -> str:
    """Returns a column's name on one line, at most 60 characters of it."""
    return printable(name[:60])


class Message(NamedTuple):
    """One turn of a conversation; the model's chat template writes it out."""

    role: str  # one of ROLES
    content: str


Text = str | tuple[Message, ...]


class Record(NamedTuple):
    """A prompt and K >= 1 responses with their scores. K=1 is SFT or a thumbs-up, K=2 a pair, K>2 a ranked list.

    All texts are strings, or all are conversations: then a response's messages follow the prompt's.

    Attributes:
        prompt: the text before every response; may be empty.
        responses: K texts, each of which continues the prompt as it stands. An empty one is a turn that ends at once.
        scores: K finite numbers, higher is better, on any scale.
        id: the record's number in its source, >= 0.
        where: "file:line", for error messages.
        source: which of the sources of a mixture it is from, counted from 0.
    """

    prompt: Text
    responses: tuple[Text, ...]
    scores: tuple[float, ...]
    id: int
    where: str
    source: int = 0


def make_record(prompt: Any, responses: Any, scores: Any, id: int, where: str) -> Record:
    """Checks one example and returns it as a `Record`.

    Args:
        prompt: a string, or a list of messages `{"role": ..., "content": ...}`.
        responses: a list or tuple of K >= 1 of the same kind.
        scores: a list or tuple of K finite numbers, higher is better.
        id: the record's number in its source, >= 0.
        where: "file:line".

    Returns:
        The record.

    Raises:
        RecordError: one line with the place, what was given, what was expected and what to do.
    """
    prompt = _text(prompt, "prompt", where)
    for name, value in (("responses", responses), ("scores", scores)):
        if not isinstance(value, list | tuple):
            raise wrong_type(value, name, "a list with one entry for each response", where)
    if not responses:
        raise RecordError(
            "no_response", f"{where}: responses is empty; expected at least one: add one or remove the record"
        )
    if len(responses) != len(scores):
        counts = f"{len(responses)} responses but {len(scores)} scores"
        raise RecordError("wrong_count", f"{where}: {counts}; expected one score for each")
    texts = tuple(_text(response, f"response {k}", where) for k, response in enumerate(responses, 1))
    numbers = tuple(number(score, f"score {k}", where) for k, score in enumerate(scores, 1))
    if len({isinstance(text, str) for text in (prompt, *texts)}) > 1:
        mixed = "prompt and responses mix strings with lists of messages"
        raise RecordError("wrong_type", f"{where}: {mixed}; expected all of one kind")
    if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 2**31:
        raise wrong_type(id, "id", "an integer from 0 to 2^31 - 1", where)
    return Record(prompt, texts, numbers, id, where)


def best_response(record: Record) -> Record:
    """Returns the record with its best response alone (the first of those that share the top score), for SFT."""
    best = max(range(len(record.scores)), key=record.scores.__getitem__)
    return record._replace(responses=(record.responses[best],), scores=(record.scores[best],))


def number(value: Any, name: str, where: str) -> float:
    """Returns a finite number read from a data file as a float.

    Args:
        value: what the file holds.
        name: what the number is, for the message.
        where: "file:line".

    Returns:
        The value.

    Raises:
        RecordError: if it is not a number (booleans and strings are not), not finite in single precision, or an
            integer so large that neighbours would become one float.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(value, name, "a number", where)
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not abs(result) <= MAX_FLOAT32:
        expected = "a finite number that single precision holds"
        raise RecordError("not_finite", f"{where}: {name} is {_show(value)}; expected {expected}")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise RecordError("huge_integer", f"{where}: {name} is {_show(value)}; expected at most 2^53: scale the scores")
    return result


def wrong_type(value: Any, name: str, expected: str, where: str) -> RecordError:
    """Returns the error of a value that is not what was expected.

    Args:
        value: what was found.
        name: what it is.
        expected: what it should be.
        where: "file:line".
    """
    return RecordError("wrong_type", f"{where}: {name} is {_show(value)}; expected {expected}")


def _text(value: Any, name: str, where: str) -> Text:
    if isinstance(value, list | tuple):
        return tuple(_message(turn, f"{name}, message {n}", where) for n, turn in enumerate(value, 1))
    return _string(value, name, where)


def _message(turn: Any, name: str, where: str) -> Message:
    given = {key for key, value in turn.items() if value is not None} if isinstance(turn, dict) else set()
    if given != {"role", "content"}:  # a table has null where a message lacks what another has
        names = ", ".join(map(short, list(turn)[:6])) if isinstance(turn, dict) else ""
        shown = f"an object of {names or 'nothing'}" if isinstance(turn, dict) else _show(turn)
        raise RecordError("message", f'{where}: {name} is {shown}; expected {{"role": ..., "content": ...}}')
    if turn["role"] not in ROLES:
        shown = _show(turn["role"])
        raise RecordError("roles", f"{where}: {name} has role {shown}; expected one of {', '.join(ROLES)}")
    return Message(turn["role"], _string(turn["content"], name, where))


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(value, name, "a string", where)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}"
        expected = "expected Unicode text: write the whole character"
        raise RecordError("surrogate", f"{where}: {name} holds {half}; {expected}") from None
    if "\0" in value:
        raise RecordError("nul", f"{where}: {name} holds NUL at character {value.index(chr(0))}; remove it")
    return value


def _show(value: Any) -> str:
    """Returns a short description of a value of any size."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    try:
        shown = repr(value)
    except ValueError:  # an integer of thousands of digits
        shown = "a huge integer"
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
