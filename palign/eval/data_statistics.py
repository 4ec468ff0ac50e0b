"""What is odd about preference data: repeats, leaks, pairs that hardly differ, longer ones that win."""

import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from palign.data.records import Record, Text
from palign.data.stored import TreeSize
from palign.data.tokenize import TokenTree
from palign.eval.edit_distance import normalised_edit_distance


class Leaks(NamedTuple):
    """Held-out records whose prompt is trained on: as it stands, and up to case, punctuation and spaces."""

    exact: int
    normalised: int


class NearPairs(NamedTuple):
    """Of so many examples looked at, those whose best and worst response nearly are one."""

    near: int
    examined: int


def repeats(things: Iterable[Hashable]) -> int:
    """How many equal one before them.

    Examples:
        >>> from palign.eval.data_statistics import repeats
        >>> repeats(["a", "b", "a", "a"])
        2
    """
    seen = list(things)
    return len(seen) - len(set(seen))


def normalised_text(text: Text) -> str:
    """Returns a text without case, punctuation and differences of spaces and of Unicode's forms.

    Examples:
        >>> from palign.eval.data_statistics import normalised_text
        >>> normalised_text("What's  NEW?") == normalised_text("what s new")
        True
    """
    words = text if isinstance(text, str) else "\n".join(f"{turn.role} {turn.content}" for turn in text)
    folded = unicodedata.normalize("NFKC", words).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def leaks(held_out: Sequence[Record], train: Sequence[Record]) -> Leaks:
    """Counts the held-out records that have the prompt of a training record."""
    exact = {record.prompt for record in train}
    normalised = {normalised_text(record.prompt) for record in train}
    return Leaks(
        sum(record.prompt in exact for record in held_out),
        sum(normalised_text(record.prompt) in normalised for record in held_out),
    )


def num_with_ties(sizes: Iterable[TreeSize]) -> int:
    """How many examples have two responses of one score."""
    return sum(len(set(size.scores)) < len(size.scores) for size in sizes)


def length_differences(sizes: Iterable[TreeSize]) -> np.ndarray:
    """Tokens of the best response minus those of the worst, of each example that has a preference, [n] int64."""
    compared = [size for size in sizes if max(size.scores) > min(size.scores)]
    lengths = [[size.responses[i] for i in best_and_worst(size.scores)] for size in compared]
    return np.asarray([best - worst for best, worst in lengths], np.int64)


def best_and_worst(scores: Sequence[float]) -> tuple[int, int]:
    """Where the first of the best and the first of the worst scores are."""
    return int(np.argmax(scores)), int(np.argmin(scores))


def near_pairs(trees: Sequence[TokenTree], *, most: int, below: float, seed: int = 0) -> NearPairs:
    """Counts examples whose best and worst response are few edits apart.

    Args:
        trees: the examples.
        most: look at no more than so many examples with a preference, drawn with the seed.
        below: the normalised edit distance, 0 to 1, under which two responses nearly are one.
        seed: of the draw.
    """
    compared = [i for i, tree in enumerate(trees) if max(tree.scores) > min(tree.scores)]
    if len(compared) > most:
        compared = np.random.default_rng(seed).choice(compared, most, replace=False).tolist()
    near = 0
    for i in compared:
        best, worst = (trees[i].responses[k] for k in best_and_worst(trees[i].scores))
        near += normalised_edit_distance(best, worst) < below
    return NearPairs(near, len(compared))
