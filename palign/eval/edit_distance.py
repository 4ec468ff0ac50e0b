"""How different two responses are as sequences of tokens."""

import numpy as np


def edit_distance(one: np.ndarray, other: np.ndarray) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that turn one sequence into the other.

    Args:
        one: `[n]` token ids.
        other: `[m]` token ids.

    Returns:
        0 to max(n, m).

    Examples:
        >>> import numpy as np
        >>> from palign.eval.edit_distance import edit_distance
        >>> edit_distance(np.array([1, 2, 3]), np.array([2, 3, 4]))
        2
    """
    short, long = sorted((np.asarray(one), np.asarray(other)), key=len)
    offsets = np.arange(len(long) + 1)
    row = offsets
    for i, token in enumerate(short, 1):
        replaced, deleted = row[:-1] + (long != token), row[1:] + 1
        best = np.concatenate([[i], np.minimum(replaced, deleted)])
        # Insertions run along the row: min over j' <= j of best[j'] + (j - j'), in one pass without a Python loop.
        row = np.minimum.accumulate(best - offsets) + offsets
    return int(row[-1])


def normalised_edit_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The edit distance over the length of the longer sequence.

    Args:
        one: `[n]` token ids.
        other: `[m]` token ids.

    Returns:
        0 (the same) to 1 (nothing in common in any order that counts); 0 for two empty sequences.

    References:
        Among the similarities that Razin et al., arXiv 2410.08847, compare with CHES.

    Examples:
        Two edits of three tokens.

        >>> import numpy as np
        >>> from palign.eval.edit_distance import normalised_edit_distance
        >>> round(normalised_edit_distance(np.array([1, 2, 3]), np.array([2, 3, 4])), 4)
        0.6667
    """
    longest = max(len(one), len(other))
    return edit_distance(one, other) / longest if longest else 0.0
