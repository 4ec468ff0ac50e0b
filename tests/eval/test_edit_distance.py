"""Edit distances against Levenshtein's recursion."""

import doctest

import numpy as np
import pytest

from palign.eval import edit_distance as module
from palign.eval.edit_distance import edit_distance, normalised_edit_distance
from tests.oracles import diagnostics as oracle


def test_distances_are_those_of_the_recursion():
    rng = np.random.default_rng(0)
    for _ in range(100):
        one, other = (rng.integers(0, 3, rng.integers(0, 9)) for _ in range(2))
        expected = oracle.edit_distance(tuple(one.tolist()), tuple(other.tolist()))
        assert edit_distance(one, other) == edit_distance(other, one) == expected
        assert normalised_edit_distance(one, other) == pytest.approx(expected / max(one.size, other.size, 1))


def test_the_ends_of_the_scale():
    ids = np.arange(5)
    assert normalised_edit_distance(ids, ids) == 0.0
    assert normalised_edit_distance(ids, ids + 5) == normalised_edit_distance(ids, ids[:0]) == 1.0
    assert normalised_edit_distance(ids[:0], ids[:0]) == 0.0


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(module)
    assert result.attempted == 6 and not result.failed
