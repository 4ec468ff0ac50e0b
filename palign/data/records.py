"""One preference example as text: a prompt, its responses, and what somebody thought of each."""

import math
from typing import Any, NamedTuple

MAX_FLOAT32 = 3.4028234663852886e38


ROLES = ("system", "developer", "user", "assistant", "tool")


class RecordError(ValueError):
    """A record that cannot be used; the message is one line that begins with its place.

    Attributes:
        reason: what is wrong in one or two words, such as `not_json`; records that are skipped are counted by it.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


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
    """

    prompt: Text
    responses: tuple[Text, ...]
    scores: tuple[float, ...]
    id: int
    where: str


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
        ValueError: one line with the place, what was given, what was expected and what to do.
    """
    prompt = _text(prompt, "prompt", where)
    for name, value in (("responses", responses), ("scores", scores)):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: {name} is {_show(value)}; expected a list with one entry for each response")
    if not responses:
        raise ValueError(f"{where}: responses is empty; expected at least one: add one or remove the record")
    if len(responses) != len(scores):
        raise ValueError(f"{where}: {len(responses)} responses but {len(scores)} scores; expected one score for each")
    texts = tuple(_text(response, f"response {k}", where) for k, response in enumerate(responses, 1))
    numbers = tuple(number(score, f"score {k}", where) for k, score in enumerate(scores, 1))
    if len({isinstance(text, str) for text in (prompt, *texts)}) > 1:
        raise ValueError(f"{where}: prompt and responses mix strings with lists of messages; expected all of one kind")
    if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 2**31:
        raise ValueError(f"{where}: id is {_show(id)}; expected an integer from 0 to 2^31 - 1")
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
        ValueError: if it is not a number (booleans and strings are not) or not finite in single precision.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {name} is {_show(value)}; expected a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not abs(result) <= MAX_FLOAT32:
        raise ValueError(f"{where}: {name} is {_show(value)}; expected a finite number that single precision holds")
    return result


def _text(value: Any, name: str, where: str) -> Text:
    if isinstance(value, list | tuple):
        return tuple(_message(turn, f"{name}, message {n}", where) for n, turn in enumerate(value, 1))
    return _string(value, name, where)


def _message(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        shown = f"an object of {', '.join(map(str, turn))}" if isinstance(turn, dict) else _show(turn)
        raise ValueError(f'{where}: {name} is {shown}; expected {{"role": ..., "content": ...}}')
    if turn["role"] not in ROLES:
        raise ValueError(f"{where}: {name} has role {_show(turn['role'])}; expected one of {', '.join(ROLES)}")
    return Message(turn["role"], _string(turn["content"], name, where))


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {_show(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character "
            f"{error.start}; expected Unicode text: write the whole character"
        ) from None
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
