"""Pairs as most trainers batch them: two sequences each, the prompt repeated, padded to the longest of the batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.cases import Pair


class Padded(NamedTuple):
    """All chosen, then all rejected; padding at the end, which no real token sees under a causal mask."""

    token: np.ndarray  # [B, S] int32
    response: np.ndarray  # [B, S] bool, tokens of the response


def pad(pairs: Sequence[Pair], multiple: int = 1) -> Padded:
    """Pads to the longest, rounded up to a multiple."""
    sequences = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    longest = -(-max(pair.longest for pair in pairs) // multiple) * multiple
    token, response = np.zeros((len(sequences), longest), np.int32), np.zeros((len(sequences), longest), bool)
    for r, (prompt, answer) in enumerate(sequences):
        end = prompt.size + answer.size
        token[r, :end] = np.concatenate([prompt, answer])
        response[r, prompt.size : end] = True
    return Padded(token, response)
