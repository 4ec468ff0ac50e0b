"""Conversations as a model reads them: written out by its chat template, tokenised, and which tokens it is to learn.

A template that marks what the assistant writes with `{% generation %}` says itself what is learned. Of another one the
conversation is rendered up to each turn of the assistant and up to its end: both must begin the whole text.
"""

import contextlib
import functools
import json
import pathlib
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from palign.data.records import Message
from palign.data.tokenizers import GUARD, Tokenizer

MAX_TEMPLATE = 64 << 10  # bytes
MAX_OUTPUT = 1 << 20  # bytes
MAX_SECONDS = 1.0  # of processor time, for one rendering
LIMITS = {"seconds": MAX_SECONDS, "memory": 1 << 29, "output": MAX_OUTPUT}  # memory: bytes of address space
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
WORKER = pathlib.Path(__file__).with_name("template_worker.py")


# Messages, and whether to go on to where the assistant begins to write.
Request = tuple[tuple[Message, ...], bool]


class Rendered(NamedTuple):
    """A conversation written out."""

    text: str
    spans: tuple[tuple[int, int], ...]  # characters [start, end) of each `{% generation %}` block


class ChatTemplate:
    """A chat template in Jinja, rendered by a process of its own under limits of time, memory and output."""

    def __init__(self, source: str, variables: Mapping[str, str]):
        """Takes the template; it is not compiled before it is used.

        Args:
            source: the template.
            variables: what it may read besides the messages: `bos_token`, `eos_token`.

        Raises:
            ValueError: if the template is longer than `MAX_TEMPLATE`.
        """
        if len(source.encode()) > MAX_TEMPLATE:
            raise ValueError(f"the chat template has {len(source):,} characters; expected at most {MAX_TEMPLATE} bytes")
        self._source, self._variables = source, dict(variables)
        self._worker: subprocess.Popen | None = None

    def render(self, requests: Iterable[Request]) -> dict[Request, Rendered]:
        """Writes conversations out, several at once: it takes longer to reach the process than to render.

        Raises:
            ValueError: if the template is malformed, raises an error, or exceeds a limit.
        """
        wanted = list(dict.fromkeys(requests))
        answer = self._ask([[[message._asdict() for message in messages], flag] for messages, flag in wanted])
        made = [Rendered(one["text"], tuple(map(tuple, one["spans"]))) for one in answer["rendered"]]
        return dict(zip(wanted, made, strict=True))

    def _ask(self, request: object) -> dict:
        # An exchange that is interrupted leaves a process whose answer is still to come: nobody asks that one again.
        worker, self._worker = self._worker or self._start(), None
        answer = _exchange(worker, request)
        self._worker = worker if worker.poll() is None else None
        if "error" in answer:
            raise ValueError(f"the chat template {answer['error']}")
        return answer

    def _start(self) -> subprocess.Popen:
        # -P: the script's folder is not searched for modules, or tokenize.py there would shadow Python's own.
        command = [sys.executable, "-P", str(WORKER)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        worker = subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]
        weakref.finalize(self, _end, worker)
        _exchange(worker, {"template": self._source, "variables": self._variables} | LIMITS)
        return worker


def _exchange(worker: subprocess.Popen, request: object) -> dict:
    """Hands a worker one line and takes its answer, an error if it has ended."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except (BrokenPipeError, ValueError):  # it has ended, and its pipes were closed when that was noticed before
        line = b""
    return json.loads(line) if line else {"error": _cause_of_death(_end(worker))}


def _end(worker: subprocess.Popen) -> int:
    """Ends a worker that may have ended already; returns its exit status."""
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()  # type: ignore[union-attr]
    try:
        return worker.wait(timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def _cause_of_death(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"takes more than {MAX_SECONDS:g} s of processor time"
    return f"ended its process (status {status}); it needs too much memory or nests too deeply"


class Encoded(NamedTuple):
    """One joint tokenisation of a prompt and a response."""

    ids: np.ndarray  # [n] int32
    learned: np.ndarray  # [n] bool, what the assistant writes in the response, the end of each turn included


class Chat:
    """A tokenizer with its chat template; `chat_of` keeps one for each.

    Attributes:
        stop_ids: the ids that end a turn: the tokenizer's, and the one that the template writes after the assistant.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Finds out how the template ends a turn.

        Args:
            tokenizer: one with a chat template.

        Raises:
            ValueError: if it has none, or the template cannot write out a question and an answer.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                "these are messages and the tokenizer has no chat template; name the file of one (Jinja) in "
                "config.tokenizer.chat_template, or put it beside the tokenizer as chat_template.jinja"
            )
        control = tokenizer.control_tokens
        longest_first = sorted(map(re.escape, control), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or "(?!)")
        self._tokenizer, self._template = tokenizer, ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        self._marked = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", tokenizer.chat_template) is not None
        self._encode = functools.lru_cache(64)(self._encode_rendered)  # the K responses of a record begin alike
        probe = (Message("user", "?"), Message("assistant", "palign")), False
        try:
            text = self._template.render([probe])[probe].text
        except ValueError as error:
            raise ValueError(
                f"{error}; it has to write out a question and an answer: name another in config.tokenizer.chat_template"
            ) from None
        end = self._control.match(text.rpartition("palign")[2].lstrip())
        self.stop_ids = tokenizer.eos_ids | ({control[end[0]]} if end else set())

    def control_text(self, messages: Iterable[Message]) -> str:
        """Returns the first control token whose name stands in the text of a message, "" if none does."""
        found = (self._control.search(turn.content) for turn in messages)
        return next((match[0] for match in found if match), "")

    def escape(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Returns the messages with every control token in them taken apart, so that it is read as the text it is.

        Raises:
            ValueError: if one has a character U+FDD0 to U+FDEF, which stand for nothing and mark things here.
        """
        if any(NONCHARACTERS.search(message.content) for message in messages):
            raise ValueError("a message has a noncharacter (U+FDD0 to U+FDEF); remove it")
        contents = [self._control.sub(lambda match: GUARD.join(match[0]), message.content) for message in messages]
        return tuple(Message(turn.role, content) for turn, content in zip(messages, contents, strict=True))

    def encode_prompt(self, messages: tuple[Message, ...]) -> np.ndarray:
        """Returns the ids of a conversation up to where the assistant begins to write, [n] int32.

        Raises:
            ValueError: as `ChatTemplate.render`.
        """
        request = messages, True
        return self._encode(self._template.render([request])[request].text)

    def encode(
        self, prompt: tuple[Message, ...], responses: Sequence[tuple[Message, ...]]
    ) -> tuple[np.ndarray, list[Encoded]]:
        """Tokenises a prompt alone and with each of its responses.

        Args:
            prompt: what is given; may be empty.
            responses: what follows it; the assistant's turns in them are learned.

        Returns:
            The prompt's ids (those of the first whole text if it is empty), and of each response the ids up to the end
            of its last turn, which is a stop token.

        Raises:
            ValueError: if nothing of a response is learned, or the template fails or changes what it wrote before.
        """
        alone = [(prompt, True), (prompt, False)] if prompt else []
        wholes = [(prompt + response, False) for response in responses]
        turns = [[] if self._marked else list(_turns(prompt, response)) for response in responses]
        rendered = self._template.render([*alone, *wholes, *(request for each in turns for request in sum(each, ()))])
        known = _length(rendered, alone[1], wholes) if prompt else 0
        encoded = []
        for whole, pairs in zip(wholes, turns, strict=True):
            if self._marked:
                spans = [span for span in rendered[whole].spans if span[1] > known]
            else:
                spans = [(_length(rendered, start, [whole]), _length(rendered, end, [whole])) for start, end in pairs]
            encoded.append(self._encode_turns(rendered[whole].text, spans))
        return self._encode(rendered[alone[0]].text) if prompt else encoded[0].ids, encoded

    def _encode_turns(self, text: str, spans: Sequence[tuple[int, int]]) -> Encoded:
        """Tokenises a whole text of which some spans of characters are learned."""
        if not spans:
            raise ValueError("the chat template marks nothing of the response with {% generation %}; correct it")
        ids = self._encode(text)
        learned = np.zeros(ids.size + 1, bool)
        for span in spans:
            first, last = (common_prefix(self._encode(text[:place]), ids) for place in span)
            stops = [i for i in range(first, min(last + 1, ids.size)) if int(ids[i]) in self.stop_ids]
            end = stops[0] + 1 if stops else last  # what is sampled ends there too
            learned[first:end] = True
        if not stops:  # of the last turn
            ids, learned[end] = np.append(ids[:end], np.int32(self._tokenizer.eos_id)), True
            end += 1
        return Encoded(ids[:end], learned[:end])

    def _encode_rendered(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode_rendered(text), np.int32)


def _turns(prompt: tuple[Message, ...], response: tuple[Message, ...]) -> Iterator[tuple[Request, Request]]:
    """The conversation up to each turn of the assistant in the response, and up to that turn's end."""
    messages = prompt + response
    for i in range(len(prompt), len(messages)):
        if messages[i].role == "assistant":
            yield (messages[:i], True), (messages[: i + 1], False)


def _length(rendered: Mapping[Request, Rendered], beginning: Request, wholes: Iterable[Request]) -> int:
    """How many characters the beginning of conversations is, which must begin their whole texts."""
    text = rendered[beginning].text
    if not all(rendered[whole].text.startswith(text) for whole in wholes):
        raise ValueError(
            f"the chat template writes the first {len(beginning[0])} messages differently once more follow, so what "
            "the assistant wrote cannot be told; put {% generation %} and {% endgeneration %} around it in a copy of "
            "the template and name that in config.tokenizer.chat_template"
        )
    return len(text)


def chat_of(tokenizer: Tokenizer) -> Chat:
    """Returns the tokenizer with its chat template as it is now.

    Raises:
        ValueError: as `Chat`.
    """
    assert isinstance(tokenizer, Hashable)
    return _chat_of(tokenizer, tokenizer.chat_template, tokenizer.eos_ids)


@functools.lru_cache(maxsize=8)
def _chat_of(tokenizer: Tokenizer, template: str | None, eos_ids: frozenset[int]) -> Chat:
    return Chat(tokenizer)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids at which sampling stops: the tokenizer's, and the one that ends a turn of its chat template."""
    return tuple(sorted(tokenizer.eos_ids if tokenizer.chat_template is None else chat_of(tokenizer).stop_ids))


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Returns how many entries two vectors have in common from the first on."""
    length = min(one.size, other.size)
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length
