"""The lists against the dense rule, by brute force."""

import numpy as np
import pytest

from palign.attention.block_pairs import causal_pair_capacity, list_block_pairs, tree_mask


def dense_pairs(group, branch, position, block):
    """The pairs that the dense rule touches, and the diagonal."""
    mask = tree_mask(group, branch, position)
    n = len(group) // block
    touched = mask.reshape(n, block, n, block).any(axis=(1, 3)) | np.eye(n, dtype=bool)
    return {(int(q), int(k)) for q, k in np.argwhere(touched)}


def random_row(rng, T):
    """A row of random trees, packed or with repeated prompts, with padding at its end or none."""
    columns, group = [], 0
    while len(columns) < T and rng.random() > 0.1:
        group += 1
        prompt = int(rng.integers(1, 30))
        columns += [(group, 0, p) for p in range(prompt)]
        for k in range(1, int(rng.integers(1, 9)) + 1):
            columns += [(group, k, prompt + p) for p in range(int(rng.integers(1, 20)))]
    columns = columns[:T] + [(0, 0, 0)] * (T - len(columns))
    return np.array(columns).T


def real(pairs):
    return [(int(q), int(k)) for q, k in pairs if k >= 0]


def test_lists_equal_the_dense_rule_on_random_trees():
    rng = np.random.default_rng(0)
    for _ in range(300):
        block = int(rng.choice([1, 2, 4, 8, 16]))
        group, branch, position = random_row(rng, block * int(rng.integers(1, 17)))
        pairs = list_block_pairs(group, branch, position, block)
        assert real(pairs) == sorted(dense_pairs(group, branch, position, block))
        assert len(pairs) == causal_pair_capacity(len(group), block)


def test_lists_equal_the_dense_rule_when_the_row_is_reordered():
    rng = np.random.default_rng(1)
    for _ in range(300):
        block = int(rng.choice([1, 2, 4, 8]))
        row = random_row(rng, block * int(rng.integers(1, 13)))
        n = row.shape[1] // block
        group, branch, position = row[:, rng.permutation(row.shape[1])]
        pairs = list_block_pairs(group, branch, position, block, capacity=n * n)
        assert real(pairs) == sorted(dense_pairs(group, branch, position, block))


def test_lists_equal_the_dense_rule_on_arbitrary_numbers():
    rng = np.random.default_rng(2)
    for _ in range(200):
        group, branch, position = (rng.integers(0, high, 32) for high in (4, 4, 12))
        pairs = list_block_pairs(group, branch, position, 4, capacity=64)
        assert real(pairs) == sorted(dense_pairs(group, branch, position, 4))


def test_padding_comes_last_and_names_the_last_block():
    group = np.repeat([1, 0], [5, 11])
    pairs = list_block_pairs(group, np.zeros(16, int), np.arange(16), 4)
    assert pairs.dtype == np.int32
    assert real(pairs) == [(0, 0), (1, 0), (1, 1), (2, 2), (3, 3)]
    assert pairs[5:].tolist() == [[3, -1]] * 5


def test_an_empty_row_lists_its_diagonal():
    zeros = np.zeros(12, int)
    assert real(list_block_pairs(zeros, zeros, zeros, 4)) == [(0, 0), (1, 1), (2, 2)]


def test_branches_do_not_list_each_other():
    # Prompt in block 0, response 1 in blocks 1-2, response 2 in block 3.
    branch, position = np.repeat([0, 1, 2], [4, 8, 4]), np.r_[0:4, 4:12, 4:8]
    assert (3, 1) not in real(list_block_pairs(np.ones(16, int), branch, position, 4))


def test_a_window_hides_by_position_not_by_column():
    group, branch, position = np.ones(8, int), np.array([0, 0, 1, 1, 1, 2, 2, 2]), np.array([0, 1, 2, 3, 4, 2, 3, 4])
    mask = tree_mask(group, branch, position, window=2)
    assert mask[5].tolist() == [False, True, False, False, False, True, False, False]
    assert (mask <= tree_mask(group, branch, position)).all()


@pytest.mark.parametrize(("tokens", "block"), [(10, 4), (4, 0), (0, 4), (4, 8)])
def test_a_block_that_does_not_divide_the_row_is_an_error(tokens, block):
    with pytest.raises(ValueError, match="multiple of the block"):
        list_block_pairs(*np.zeros((3, tokens), int), block)


def test_a_list_longer_than_its_capacity_is_an_error():
    position = np.arange(16)[::-1]
    with pytest.raises(ValueError, match="16 block pairs but the list's capacity is 10"):
        list_block_pairs(np.ones(16, int), np.zeros(16, int), np.where(np.arange(16) % 2, position, 15 - position), 4)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        list_block_pairs(np.ones(8, int), np.zeros(4, int), np.arange(8), 4)
