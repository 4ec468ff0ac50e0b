"""From records to token trees: one joint tokenisation, one split for all responses, BOS and EOS exactly once."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np

from palign.data.chat import Encoded, chat_of, common_prefix
from palign.data.records import Message, Record, RecordError, Text
from palign.data.tokenizers import Tokenizer


class TokenTree(NamedTuple):
    """A tokenised record.

    Attributes:
        prompt: [at least 1] int32, BOS included where the tokenizer has one.
        responses: K arrays [at least 1] int32 of what follows the prompt; the last token is EOS, or what else ends a
            turn, unless it was cut off.
        scores: K floats, higher is better, as single precision holds them: what ties there ties here.
        id: the record's id.
        mismatched: how many responses at the end have no score, because they answer another prompt (`add_mismatched`).
        learned: for each response [its size] bool, which of its tokens are targets; None = all of all.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    scores: tuple[float, ...]
    id: int
    mismatched: int = 0
    learned: tuple[np.ndarray, ...] | None = None

    @property
    def masks(self) -> tuple[np.ndarray, ...]:
        """For each response, which of its tokens are targets."""
        return self.learned or tuple(np.ones(response.size, bool) for response in self.responses)

    @property
    def num_targets(self) -> list[int]:
        """For each response, how many targets it has."""
        counts = [response.size for response in self.responses]
        return counts if self.learned is None else [int(mask.sum()) for mask in self.learned]


# What may be counted; a record that is skipped is counted as `skipped/REASON` besides.
COUNTS = (
    "records", "responses", "truncated", "prompts_cut", "control_text", "dropped_too_long", "dropped_prompt_too_long",
    "dropped_no_prompt", "dropped_identical",
)  # fmt: skip


def tokenize_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int = 0,
    truncation: str = "keep_start",
    control_text: str = "refuse",
    bad_records: str = "error",
    advance: Callable[[int, int], None] | None = None,
) -> tuple[list[TokenTree], dict[str, int]]:
    """Tokenises records (see `tokenize_record`), cuts what is too long, and counts what was cut or dropped.

    Args:
        records: the records; map them through `best_response` first to train on the best responses alone.
        tokenizer: see `Tokenizer`.
        max_length: the most tokens of a prompt with one of its responses, BOS and EOS included.
        max_prompt_length: the most tokens of a prompt; 0 = all of `max_length` but one.
        truncation: what happens to what is longer. "keep_start": a response is cut at its end and then has no EOS, a
            record whose prompt is too long is dropped. "keep_end": such a prompt loses its beginning instead (BOS
            stays). "drop": a record of which anything is too long is dropped.
        control_text: see `tokenize_record`.
        bad_records: "error", or "skip": conversations that cannot be used are dropped.
        advance: told (records done, tokens of the record), for a progress bar.

    Returns:
        The trees, and the counts: `records` and `responses` kept, `truncated` responses and `prompts_cut` among them,
        records with `control_text` in a message; records dropped: `dropped_too_long`, `dropped_prompt_too_long`,
        `dropped_no_prompt` (no BOS, and the responses differ from the first token on), `dropped_identical` (several
        responses that are all the same tokens, cut or not: they compare nothing), `skipped/REASON`.

    Raises:
        ValueError: if a limit is out of its range, a conversation cannot be used, or nothing is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; expected at least 2, one token of prompt and one of response")
    longest_prompt = min(max_prompt_length or max_length, max_length - 1)
    trees: list[TokenTree] = []
    counts = Counter(dict.fromkeys(COUNTS, 0))
    for done, record in enumerate(records, 1):
        try:
            tree = tokenize_record(record, tokenizer, control_text=control_text)
        except RecordError as error:
            if bad_records != "skip":
                raise
            counts[f"skipped/{error.reason}"] += 1
            continue
        if advance is not None:
            advance(done, tree.prompt.size + sum(response.size for response in tree.responses))
        cut = _cut(tree, max_length, longest_prompt, truncation, tokenizer.bos_id)
        if reason := _reason_to_drop(tree, cut, longest_prompt, truncation):
            counts[f"dropped_{reason}"] += 1
            continue
        trees.append(cut)
        counts["control_text"] += _has_control_text(record, tokenizer)
        counts["prompts_cut"] += cut.prompt.size < tree.prompt.size
        counts["truncated"] += _num_cut(tree, cut)
        counts["responses"] += len(cut.responses)
    counts["records"] = len(trees)
    if not trees:
        raise _nothing_left(counts, max_length)
    return trees, dict(counts)


def add_mismatched(trees: Sequence[TokenTree], *, max_length: int) -> tuple[list[TokenTree], dict[str, int]]:
    """Gives every tree one more response without a score: one of the next tree, cut to fit (for KTO's KL).

    Rotation, never reversal: no example can meet its own response, and every response list is drawn from equally. Of
    several responses the next tree gives number i mod K, so that not only the chosen ones are met.

    Args:
        trees: at least two, of different prompts in neighbouring places as far as the data has them.
        max_length: the most tokens of a prompt with one response.

    Returns:
        The trees, and the count `mismatched_cut`.

    Raises:
        ValueError: for fewer than two trees.
    """
    if len(trees) < 2:
        raise ValueError("kto compares with a response to another prompt; expected at least two records")
    added, cut = [], 0
    for i, tree in enumerate(trees):
        given, room = trees[(i + 1) % len(trees)], max_length - tree.prompt.size
        k = i % len(given.scores)
        other, learned = given.responses[k], given.masks[k]
        cut += other.size > room
        masks = None if tree.learned is given.learned is None else (*tree.masks, learned[:room])
        added.append(tree._replace(responses=(*tree.responses, other[:room]), learned=masks, mismatched=1))
    return added, {"mismatched_cut": cut}


def tokenize_record(record: Record, tokenizer: Tokenizer, *, control_text: str = "refuse") -> TokenTree:
    """Tokenises one record without any limit of length.

    Every `prompt + response` is tokenised as one text, so that pieces which straddle the seam are those the model will
    see. The split is the longest prefix that the prompt alone and all K joint encodings share: it is the same for all
    K, and a merged piece belongs to the responses. A conversation is written out by the tokenizer's chat template; its
    prompt ends before the first token that is learned of any response.

    Args:
        record: the record.
        tokenizer: see `Tokenizer`.
        control_text: what is done with a message that has the name of a control token in its text: "refuse", or
            "escape", which reads it as the text it is.

    Returns:
        The tree. Its prompt is [BOS?] + the shared ids. If that would be empty (a `text` record under a tokenizer
        without BOS), the first token is the prompt if all K share it; otherwise the prompt is left empty for the
        caller to drop.

    Raises:
        RecordError: if a conversation cannot be used.
        ValueError: if the tokenizer has no chat template and the record is a conversation.
    """
    encode = _encode_strings if isinstance(record.prompt, str) else _encode_conversation
    alone, encoded = encode(record, tokenizer, control_text)
    joint = [one.ids for one in encoded]
    split = min(min(common_prefix(alone, ids) for ids in joint), *(int(one.learned.argmax()) for one in encoded))
    begin = _begin(joint, tokenizer.bos_id)
    if not begin.size and split == 0 and len({int(ids[0]) for ids in joint}) == 1 and min(map(len, joint)) > 1:
        split = 1
    masks = tuple(one.learned[split:] for one in encoded)
    return TokenTree(
        np.concatenate([begin, joint[0][:split]]),
        tuple(ids[split:] for ids in joint),
        tuple(np.asarray(record.scores, np.float32).tolist()),
        record.id,
        learned=None if all(mask.all() for mask in masks) else masks,
    )


def encode_prompt(prompt: Text, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of a prompt alone, [n] int32, BOS included where the tokenizer has one: what to sample from.

    Args:
        prompt: a string, or a conversation, which goes on to where the assistant begins to write.
        tokenizer: see `Tokenizer`.

    Raises:
        ValueError: if there is no token, no chat template, or the template fails.
    """
    if isinstance(prompt, str):
        ids = np.asarray(tokenizer.encode(prompt), np.int32)
    else:
        chat = chat_of(tokenizer)
        ids = chat.encode_prompt(chat.escape(prompt))
    ids = np.concatenate([_begin([ids], tokenizer.bos_id), ids])
    if not ids.size:
        raise ValueError("an empty prompt needs a tokenizer with BOS; write a prompt of one token or more")
    return ids


def _encode_strings(record: Record, tokenizer: Tokenizer, control_text: str) -> tuple[np.ndarray, list[Encoded]]:
    """The prompt alone, and with each response and the EOS that is written behind it if none is there."""
    prompt, *responses = cast(tuple[str, ...], (record.prompt, *record.responses))
    alone = np.asarray(tokenizer.encode(prompt), np.int32)
    joint = [np.asarray(tokenizer.encode(prompt + response), np.int32) for response in responses]
    split = min(common_prefix(alone, ids) for ids in joint)
    ended = [
        ids if ids.size > split and int(ids[-1]) in tokenizer.eos_ids else np.append(ids, np.int32(tokenizer.eos_id))
        for ids in joint
    ]
    return alone, [Encoded(ids, np.arange(ids.size) >= split) for ids in ended]


def _encode_conversation(record: Record, tokenizer: Tokenizer, control_text: str) -> tuple[np.ndarray, list[Encoded]]:
    """The same of conversations; where the prompt has no messages, a whole text stands for it."""
    chat, parts = chat_of(tokenizer), _messages(record)
    if control_text != "escape" and (found := chat.control_text(itertools.chain(*parts))):
        raise RecordError(
            "control_text",
            f"{record.where}: a message has the control token {found!r} in its text; remove it, or set "
            "config.data.control_text='escape' to have it read as text",
        )
    try:
        prompt, *responses = (chat.escape(messages) for messages in parts)
        return chat.encode(prompt, responses)
    except ValueError as error:
        raise RecordError("chat_template", f"{record.where}: {error}") from None


def _has_control_text(record: Record, tokenizer: Tokenizer) -> bool:
    if isinstance(record.prompt, str):
        return False
    return bool(chat_of(tokenizer).control_text(itertools.chain(*_messages(record))))


def _messages(record: Record) -> tuple[tuple[Message, ...], ...]:
    """The prompt and the responses of a record of conversations."""
    return cast(tuple[tuple[Message, ...], ...], (record.prompt, *record.responses))


def _begin(joint: list[np.ndarray], bos_id: int | None) -> np.ndarray:
    """Returns [BOS], or nothing where the model has none or the text already begins with it."""
    written = all(ids.size and ids[0] == bos_id for ids in joint)
    return np.asarray([] if bos_id is None or written else [bos_id], np.int32)


def _cut(tree: TokenTree, max_length: int, longest_prompt: int, truncation: str, bos_id: int | None) -> TokenTree:
    """Cuts the responses to what the prompt leaves them, each behind a target; first the prompt under "keep_end"."""
    prompt = tree.prompt
    if truncation == "keep_end" and prompt.size > longest_prompt:
        begin = prompt[: int(prompt[0] == bos_id)]
        prompt = np.concatenate([begin, prompt[prompt.size - longest_prompt + begin.size :]])
    room = max(max_length - prompt.size, 0)
    ends = [int(np.max(np.flatnonzero(mask[:room]) + 1, initial=0)) for mask in tree.masks]
    return tree._replace(
        prompt=prompt,
        responses=tuple(response[:end] for response, end in zip(tree.responses, ends, strict=True)),
        learned=tree.learned and tuple(mask[:end] for mask, end in zip(tree.learned, ends, strict=True)),
    )


def _nothing_left(counts: Counter[str], max_length: int) -> ValueError:
    dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "there were no records"
    return ValueError(f"no record is left after tokenisation with max_length {max_length}: {dropped}")


def _reason_to_drop(tree: TokenTree, cut: TokenTree, longest_prompt: int, truncation: str) -> str:
    """Why a record is left out, as it is counted; "" if it is not."""
    if not tree.prompt.size:
        return "no_prompt"
    if cut.prompt.size > longest_prompt:
        return "prompt_too_long"
    if not all(response.size for response in cut.responses) or (truncation == "drop" and _num_cut(tree, cut)):
        return "too_long"
    return "identical" if _all_identical(cut.responses) else ""


def _num_cut(tree: TokenTree, cut: TokenTree) -> int:
    return sum(a.size > b.size for a, b in zip(tree.responses, cut.responses, strict=True))


def _all_identical(responses: tuple[np.ndarray, ...]) -> bool:
    return len(responses) > 1 and all(np.array_equal(responses[0], other) for other in responses[1:])
