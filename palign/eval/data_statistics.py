"""What is odd about preference data: repeats, leaks, pairs that hardly differ, longer ones that win."""

import unicodedata
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from palign.data.records import Record, Text
from palign.data.stored import TreeSize
from palign.data.tokenize import TokenTree
from palign.eval.edit_distance import normalised_edit_distance


class NearPairs(NamedTuple):
    """Examples whose best and worst response nearly are one, by their places, and how many were looked at."""

    near: list[int]
    examined: int


def repeats(things: Iterable[Hashable]) -> list[int]:
    """Returns the places of those that equal one before them.

    Examples:
        >>> from palign.eval.data_statistics import repeats
        >>> repeats(["a", "b", "a", "a"])
        [2, 3]
    """
    first: dict[Hashable, int] = {}
    return [i for i, thing in enumerate(things) if first.setdefault(thing, i) != i]


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


def leaks(held_out: Sequence[Record], train: Sequence[Record], key: Callable[[Text], Hashable]) -> list[int]:
    """Returns the places of the held-out records that have the prompt of a training record.

    Args:
        held_out: the records that are looked at.
        train: the records that are trained on.
        key: two prompts of which it makes the same are one, such as `normalised_text`.
    """
    trained = {key(record.prompt) for record in train}
    return [i for i, record in enumerate(held_out) if key(record.prompt) in trained]


def length_differences(sizes: Iterable[TreeSize]) -> np.ndarray:
    """Tokens of the best response minus those of the worst, of each example that has a preference, [n] int64."""
    compared = [size for size in sizes if max(size.scores) > min(size.scores)]
    lengths = [[size.responses[i] for i in best_and_worst(size.scores)] for size in compared]
    return np.asarray([best - worst for best, worst in lengths], np.int64)


def best_and_worst(scores: Sequence[float]) -> tuple[int, int]:
    """Where the first of the best and the first of the worst scores are."""
    return int(np.argmax(scores)), int(np.argmin(scores))


def near_pairs(trees: Sequence[TokenTree], *, most: int, below: float, seed: int = 0) -> NearPairs:
    """Finds examples whose best and worst response are few edits apart.

    Args:
        trees: the examples.
        most: look at no more than so many examples with a preference, drawn with the seed.
        below: the normalised edit distance, 0 to 1, under which two responses nearly are one.
        seed: of the draw.
    """
    compared = [i for i, tree in enumerate(trees) if max(tree.scores) > min(tree.scores)]
    if len(compared) > most:
        compared = np.random.default_rng(seed).choice(compared, most, replace=False).tolist()

    def distance(tree: TokenTree) -> float:
        best, worst = best_and_worst(tree.scores)
        return normalised_edit_distance(tree.responses[best], tree.responses[worst])

    return NearPairs([i for i in sorted(compared) if distance(trees[i]) < below], len(compared))
