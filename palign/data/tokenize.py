"""From records to token trees: one joint tokenisation, one split for all responses, BOS and EOS exactly once."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from palign.data.records import Record, Text
from palign.data.tokenizers import Tokenizer


class TokenTree(NamedTuple):
    """A tokenised record.

    Attributes:
        prompt: [at least 1] int32, BOS included where the tokenizer has one.
        responses: K arrays [at least 1] int32 of what follows the prompt; the last token is EOS unless it was cut off.
        scores: K floats, higher is better, as single precision holds them: what ties there ties here.
        id: the record's id.
        mismatched: how many responses at the end have no score, because they answer another prompt (`add_mismatched`).
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    scores: tuple[float, ...]
    id: int
    mismatched: int = 0


def tokenize_records(
    records: Iterable[Record], tokenizer: Tokenizer, *, max_length: int
) -> tuple[list[TokenTree], dict[str, int]]:
    """Tokenises records (see `tokenize_record`), cuts what is too long, and counts what was cut or dropped.

    Args:
        records: the records; map them through `best_response` first to train on the best responses alone.
        tokenizer: see `Tokenizer`.
        max_length: the most tokens of a prompt with one of its responses, BOS and EOS included. A longer response is
            cut at its end and then has no EOS. A prompt of this length or more leaves no room: its record is dropped.

    Returns:
        The trees, and the counts: `records` and `responses` kept, `truncated` responses among them,
        `dropped_prompt_too_long` records, `dropped_no_prompt` records (no BOS, and the responses differ from the first
        token on), and `dropped_identical` records (several responses that are all the same tokens, cut or not: they
        compare nothing).

    Raises:
        ValueError: if max_length is below 2 or nothing is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; expected at least 2, one token of prompt and one of response")
    trees: list[TokenTree] = []
    names = ("records", "responses", "truncated", "dropped_prompt_too_long", "dropped_no_prompt", "dropped_identical")
    counts = Counter(dict.fromkeys(names, 0))
    for record in records:
        tree = tokenize_record(record, tokenizer)
        room = max_length - tree.prompt.size
        cut = tree._replace(responses=tuple(response[: max(room, 0)] for response in tree.responses))
        if not tree.prompt.size:
            counts["dropped_no_prompt"] += 1
        elif room < 1:
            counts["dropped_prompt_too_long"] += 1
        elif _all_identical(cut.responses):
            counts["dropped_identical"] += 1
        else:
            trees.append(cut)
            counts["truncated"] += sum(response.size > room for response in tree.responses)
            counts["responses"] += len(cut.responses)
    counts["records"] = len(trees)
    if not trees:
        dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "there were no records"
        raise ValueError(f"no record is left after tokenisation with max_length {max_length}: {dropped}")
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
    given = [trees[(i + 1) % len(trees)] for i in range(len(trees))]
    others = [tree.responses[i % len(tree.scores)] for i, tree in enumerate(given)]
    rooms = [max_length - tree.prompt.size for tree in trees]
    added = [
        tree._replace(responses=(*tree.responses, other[:room]), mismatched=1)
        for tree, other, room in zip(trees, others, rooms, strict=True)
    ]
    return added, {"mismatched_cut": sum(other.size > room for other, room in zip(others, rooms, strict=True))}


def tokenize_record(record: Record, tokenizer: Tokenizer) -> TokenTree:
    """Tokenises one record without any limit of length.

    Every `prompt + response` is tokenised as one text, so that pieces which straddle the seam are those the model will
    see. The split is the longest prefix that `encode(prompt)` and all K joint encodings share: it is the same for all
    K, and a merged piece belongs to the responses.

    Args:
        record: the record.
        tokenizer: see `Tokenizer`.

    Returns:
        The tree. Its prompt is [BOS?] + the shared ids. If that would be empty (a `text` record under a tokenizer
        without BOS), the first token is the prompt if all K share it; otherwise the prompt is left empty for the
        caller to drop.
    """
    alone = np.asarray(tokenizer.encode(_plain(record.prompt, record)), np.int32)
    joint = [
        np.asarray(tokenizer.encode(_plain(record.prompt, record) + _plain(response, record)), np.int32)
        for response in record.responses
    ]
    split = min(_common_prefix(alone, ids) for ids in joint)
    begin = _begin(joint, tokenizer.bos_id)
    if not begin.size and split == 0 and all(ids.size for ids in joint) and len({int(ids[0]) for ids in joint}) == 1:
        split = 1
    end = np.asarray([tokenizer.eos_id], np.int32)
    responses = tuple(_ended(ids[split:], end) for ids in joint)
    scores = tuple(np.asarray(record.scores, np.float32).tolist())
    return TokenTree(np.concatenate([begin, joint[0][:split]]), responses, scores, record.id)


def _plain(text: Text, record: Record) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{record.where}: a conversation; write it out with the model's chat template first")
    return text


def _begin(joint: list[np.ndarray], bos_id: int | None) -> np.ndarray:
    """Returns [BOS], or nothing where the model has none or the text already begins with it."""
    written = all(ids.size and ids[0] == bos_id for ids in joint)
    return np.asarray([] if bos_id is None or written else [bos_id], np.int32)


def _ended(response: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Returns the response with EOS at its end, once."""
    return response if response.size and response[-1] == end[0] else np.concatenate([response, end])


def _common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    length = min(one.size, other.size)
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length


def _all_identical(responses: tuple[np.ndarray, ...]) -> bool:
    return len(responses) > 1 and all(np.array_equal(responses[0], other) for other in responses[1:])
