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
from collections.abc import Hashable, Iterable, Mapping, Sequence
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

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
        """Writes a conversation out.

        Args:
            messages: the conversation.
            add_generation_prompt: whether to go on to where the assistant begins to write.

        Returns:
            The text.

        Raises:
            ValueError: if the template is malformed, raises an error, or exceeds a limit.
        """
        answer = self._ask([[message._asdict() for message in messages], add_generation_prompt])
        return Rendered(answer["text"], tuple(map(tuple, answer["spans"])))

    def _ask(self, request: object) -> dict:
        if self._worker is None:
            # -P: the script's folder is not searched for modules, or tokenize.py there would shadow Python's own.
            command = [sys.executable, "-P", str(WORKER)]
            quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._worker = subprocess.Popen(command, start_new_session=True, **quiet)  # type: ignore[call-overload]
            weakref.finalize(self, _end, self._worker)
            self._exchange({"template": self._source, "variables": self._variables} | LIMITS)
        return self._exchange(request)

    def _exchange(self, request: object) -> dict:
        worker = self._worker
        assert worker is not None and worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline() or "null")
        except BrokenPipeError:
            answer = None
        if answer is None:
            self._worker = None  # the next record gets a new one
            answer = {"error": _cause_of_death(_end(worker))}
        if "error" in answer:
            raise ValueError(f"the chat template {answer['error']}")
        return answer


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
                "these are conversations and the tokenizer has no chat template; name the file of one (Jinja) in "
                "config.tokenizer.chat_template"
            )
        control = tokenizer.control_tokens
        longest_first = sorted(map(re.escape, control), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or "(?!)")
        self._tokenizer, self._template = tokenizer, ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        self._marked = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", tokenizer.chat_template) is not None
        # The K responses of a record render and encode the same beginnings.
        self._render = functools.lru_cache(64)(self._template.render)
        self._encode = functools.lru_cache(64)(self._encode_rendered)
        answer = "palign"
        probe = self._render((Message("user", "?"), Message("assistant", answer)), add_generation_prompt=False)
        end = self._control.match(probe.text.rpartition(answer)[2].lstrip())
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
        return self._encode(self._render(messages, add_generation_prompt=True).text)

    def encode_response(self, prompt: tuple[Message, ...], response: tuple[Message, ...]) -> Encoded:
        """Tokenises a whole conversation.

        Args:
            prompt: what is given; may be empty.
            response: what follows it; the assistant's turns in it are learned.

        Returns:
            The ids up to the end of the last turn that is learned, which is a stop token, and which are learned.

        Raises:
            ValueError: if nothing is learned, or the template fails or changes what it wrote before.
        """
        rendered = self._render(prompt + response, add_generation_prompt=False)
        ids = self._encode(rendered.text)
        find = self._marked_turns if self._marked else self._unmarked_turns
        places = [[self._tokens_before(place, rendered.text) for place in turn] for turn in find(prompt, response)]
        if not places:
            raise ValueError("the chat template marks nothing of the response with {% generation %}; correct it")
        learned = np.zeros(ids.size + 1, bool)
        for first, last in places:
            stops = [i for i in range(first, min(last + 1, ids.size)) if int(ids[i]) in self.stop_ids]
            end = stops[0] + 1 if stops else last  # what is sampled ends there too
            learned[first:end] = True
        if not stops:  # of the last turn
            ids, learned[end] = np.append(ids[:end], np.int32(self._tokenizer.eos_id)), True
            end += 1
        return Encoded(ids[:end], learned[:end])

    def _marked_turns(self, prompt: tuple[Message, ...], response: tuple[Message, ...]) -> list[tuple[int, int]]:
        """The `{% generation %}` blocks behind the prompt, as places in the text."""
        rendered = self._render(prompt + response, add_generation_prompt=False)
        known = self._length(prompt, rendered.text, add_generation_prompt=False)
        return [span for span in rendered.spans if span[1] > known]

    def _unmarked_turns(self, prompt: tuple[Message, ...], response: tuple[Message, ...]) -> list[tuple[int, int]]:
        """The assistant's turns behind the prompt: from where it begins to write to where the next turn begins."""
        messages = prompt + response
        text = self._render(messages, add_generation_prompt=False).text
        self._length(prompt, text, add_generation_prompt=False)
        turns = [i for i in range(len(prompt), len(messages)) if messages[i].role == "assistant"]
        starts = [self._length(messages[:i], text, add_generation_prompt=True) for i in turns]
        ends = [self._length(messages[: i + 1], text, add_generation_prompt=False) for i in turns]
        return list(zip(starts, ends, strict=True))

    def _length(self, messages: tuple[Message, ...], text: str, *, add_generation_prompt: bool) -> int:
        """How many characters the first messages of a conversation are, which must begin its whole text."""
        if not messages:
            return 0
        part = self._render(messages, add_generation_prompt=add_generation_prompt).text
        if not text.startswith(part):
            raise ValueError(
                f"the chat template writes the first {len(messages)} messages differently once more follow, so what "
                "the assistant wrote cannot be told; put {% generation %} and {% endgeneration %} around it in a copy "
                "of the template and name that in config.tokenizer.chat_template"
            )
        return len(part)

    def _tokens_before(self, place: int, text: str) -> int:
        """How many tokens of a text lie wholly before a place in it."""
        return common_prefix(self._encode(text[:place]), self._encode(text))

    def _encode_rendered(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode_rendered(text), np.int32)


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
