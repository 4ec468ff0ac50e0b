"""From prompts as text or conversations to samples as text: tokenises, batches, and shows how far it is."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palign.data.chat import stop_ids
from palign.data.records import Text
from palign.data.tokenize import encode_prompt
from palign.data.tokenizers import Tokenizer
from palign.generate.sample import make_sampler
from palign.models.protocol import LanguageModel
from palign.types import Unembedding

PROMPT_MULTIPLE = 16  # prompts are padded to a multiple of this, long ones of an eighth to a quarter of their length


class Generation(NamedTuple):
    """One sample."""

    text: str
    ids: np.ndarray  # [n] int32, EOS included where it came
    logp: float  # nats, summed
    finished: bool


def generate(
    lm: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Text],
    *,
    samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Any = None,
) -> list[list[Generation]]:
    """Samples continuations of prompts.

    Args:
        lm: the model.
        params: its weights.
        tokenizer: the model's.
        prompts: of any lengths; conversations are written out by the tokenizer's chat template.
        samples: how many of each.
        max_new_tokens: the longest sample.
        temperature: see `make_sampler`.
        top_k: see `make_sampler`.
        top_p: see `make_sampler`.
        seed: of all draws; the same prompts in the same order give the same samples.
        batch_size: prompts at a time.
        progress: a `train.metrics.Reporter` over `len(prompts)`, or None.

    Returns:
        For every prompt its samples.

    Raises:
        ValueError: an empty prompt under a tokenizer without BOS, a conversation under one without a chat template, or
            a setting out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: expected 1 or more")
    sampler = make_sampler(
        _within(tokenizer, lm),
        samples=samples,
        max_new_tokens=max_new_tokens,
        eos_ids=stop_ids(tokenizer),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: ids[i].size)  # alike lengths together: less padding
    out: list[list[Generation]] = [[] for _ in prompts]
    key = jax.random.key(seed)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        token, length = _pad([ids[i] for i in chosen], batch_size)
        drawn = jax.device_get(sampler(params, token, length, jax.random.fold_in(key, start)))
        for row, i in enumerate(chosen):
            out[i] = [_generation(tokenizer, drawn, row, k) for k in range(samples)]
        if progress is not None:
            progress.advance(min(start + batch_size, len(order)), float(drawn.length[: len(chosen)].sum()))
    return out


def _within(tokenizer: Tokenizer, lm: LanguageModel) -> LanguageModel:
    """The model without the ids that it has beyond its tokenizer's, which have no text."""

    def unembed(params: Any) -> Unembedding:
        whole = lm.unembed(params)
        return whole._replace(vocab_size=min(whole.vocab_size, tokenizer.vocab_size))

    return lm._replace(unembed=unembed)


def as_text(prompt: Text) -> str:
    """Returns a prompt for people to read, conversations a line a turn."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{turn.role}: {turn.content}\n" for turn in prompt) + "assistant: "


def as_row(prompt: Text, samples: Sequence[Generation]) -> dict[str, Any]:
    """Returns a prompt and its samples as a row of data, scored by their log-probability."""
    texts, scores = [sample.text for sample in samples], [sample.logp for sample in samples]
    if isinstance(prompt, str):
        return {"prompt": prompt, "responses": texts, "scores": scores}
    responses = [[{"role": "assistant", "content": text}] for text in texts]
    return {"prompt": [turn._asdict() for turn in prompt], "responses": responses, "scores": scores}


def check_instructions(prompts: Iterable[Text], samples: int) -> None:
    """Checks that prompts can be written for judges who read one instruction with one output.

    Raises:
        ValueError: there are several samples, or a prompt is a conversation of more than the user's message.
    """
    if samples != 1:
        raise ValueError(f"--samples={samples}: --format=alpaca_eval has one output for each instruction")
    for prompt in prompts:
        if not isinstance(prompt, str) and [turn.role for turn in prompt] != ["user"]:
            raise ValueError(
                f"a prompt has messages of {', '.join(turn.role for turn in prompt)}; --format=alpaca_eval has one "
                "instruction for each output: expected one message of the user"
            )


Answered = Iterable[tuple[Text, Sequence[Generation]]]


def _write_text(answered: Answered, generator: str, dataset: str) -> Iterator[str]:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    return (f"{as_text(prompt)}{bold}{sample.text}{plain}" for prompt, samples in answered for sample in samples)


def _write_rows(answered: Answered, generator: str, dataset: str) -> Iterator[str]:
    return (json.dumps(as_row(*one), ensure_ascii=False) for one in answered)


def _write_alpaca_eval(answered: Answered, generator: str, dataset: str) -> Iterator[str]:
    origin = {"generator": generator, "dataset": dataset}
    outputs = [
        {"instruction": prompt if isinstance(prompt, str) else prompt[0].content, "output": sample.text, **origin}
        for prompt, (sample,) in answered
    ]
    yield json.dumps(outputs, indent=1, ensure_ascii=False)


# Name -> (prompts with their samples, who drew them, where the prompts are from) -> what is printed.
WRITERS: dict[str, Callable[[Answered, str, str], Iterator[str]]] = {
    "text": _write_text,
    "json": _write_rows,  # a line a prompt, as data that is read again
    "alpaca_eval": _write_alpaca_eval,  # one list, as AlpacaEval reads a model's outputs; see `check_instructions`
}


def _pad(ids: Sequence[np.ndarray], batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Right-pads prompts, and the batch with copies of the last one, to shapes that are compiled once."""
    longest = max(x.size for x in ids)
    multiple = max(PROMPT_MULTIPLE, 1 << max(longest.bit_length() - 3, 0))
    token = np.zeros((batch_size, -(-longest // multiple) * multiple), np.int32)
    length = np.ones(batch_size, np.int32)
    for row, x in enumerate([*ids, *[ids[-1]] * (batch_size - len(ids))]):
        token[row, : x.size], length[row] = x, x.size
    return jnp.asarray(token), jnp.asarray(length)


def _generation(tokenizer: Tokenizer, drawn: Any, row: int, k: int) -> Generation:
    ids = drawn.token[row, k, : drawn.length[row, k]]
    finished = bool(drawn.finished[row, k])
    text = tokenizer.decode(ids[:-1] if finished else ids)
    return Generation(text, ids, float(drawn.logps[row, k]), finished)
