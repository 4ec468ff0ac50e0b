"""Rows laid out for several devices: they mean what they meant, and cost each device about the same."""

import numpy as np
import pytest

from palign.attention.block_pairs import deal_blocks, list_block_pairs, tree_mask
from palign.data.pack import pack_row, row_shape
from palign.data.pieces import in_pieces
from palign.data.tokenize import TokenTree
from tests.data.samples import random_tree

SHAPE = row_shape(256, trees=24, responses=4, block=16)
BLOCKS, PIECES = 16, 4


def packed(seed):
    rng = np.random.default_rng(seed)
    trees = []
    while sum(tree.prompt.size + sum(r.size for r in tree.responses) for tree in trees) < 180:
        trees.append(random_tree(rng, len(trees), K=int(rng.integers(1, 5))))
    return pack_row(trees[:-1], SHAPE, "best_worst", "packed", seed=0)


def identities(row):
    return np.stack([row.group, row.branch, row.position, row.token])


@pytest.mark.parametrize("seed", range(5))
def test_a_row_means_what_it_meant(seed):
    before = packed(seed)
    after = in_pieces(before, SHAPE.block, PIECES)
    assert (after.token != before.token).any()
    order = np.lexsort(identities(after)), np.lexsort(identities(before))
    np.testing.assert_array_equal(*(identities(row)[:, o] for row, o in zip((after, before), order, strict=True)))
    seen = [tree_mask(row.group, row.branch, row.position) for row in (after, before)]
    real = [o[row.group[o] > 0] for row, o in zip((after, before), order, strict=True)]
    np.testing.assert_array_equal(*(mask[np.ix_(o, o)] for mask, o in zip(seen, real, strict=True)))
    listed = before.target_slot > 0
    for name in ("target_slot", "target_token", "pairs", "valid", "example_id"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    for name, which in (("target_source", listed), ("response_end", before.response_end >= 0)):
        at = [identities(row)[:, getattr(row, name)[which]] for row in (after, before)]
        np.testing.assert_array_equal(*at)
    assert (after.response_end[before.response_end < 0] == -1).all()


@pytest.mark.parametrize("seed", range(5))
def test_its_list_is_the_one_that_the_new_order_makes(seed):
    after = in_pieces(packed(seed), SHAPE.block, PIECES)
    expected = list_block_pairs(after.group, after.branch, after.position, SHAPE.block)
    np.testing.assert_array_equal(after.block_pairs, expected)


def test_one_piece_is_the_row_itself():
    row = packed(0)
    assert in_pieces(row, SHAPE.block, 1) is row


@pytest.mark.parametrize(
    ("trees", "pieces", "most"),
    [("one response of 32,000 tokens", 8, 1.001), ("pairs of 4,000", 4, 1.02), ("lists of eight", 4, 1.05)],
)
def test_blocks_are_dealt_so_that_no_piece_costs_much_more_than_the_mean(trees, pieces, most):
    worst, in_order = spread(trees, pieces)
    assert worst <= most < 1.1 < in_order


def spread(trees, pieces):
    """The dearest piece over the mean, the worst of several rows: dealt, and cut in the order of the row."""
    rng = np.random.default_rng(0)
    tokens, block = {"one response of 32,000 tokens": (32768, 128)}.get(trees, (16384, 128))
    shape, worst = row_shape(tokens, trees=64, responses=8, block=block), []
    for _ in range(4):
        pairs = pack_row(realistic_row(rng, trees, tokens), shape, "best_worst", "packed", seed=0).block_pairs
        cost = np.bincount(pairs[pairs[:, 1] >= 0, 0])
        orders = (deal_blocks(pairs, cost.size, pieces), np.arange(cost.size))
        worst.append([cost[order].reshape(pieces, -1).sum(1).max() * pieces / cost.sum() for order in orders])
    return np.max(worst, axis=0)


def realistic_row(rng, trees, tokens):
    """Prompts of a few hundred tokens; lengths of responses spread by a factor of two or so."""
    medians = {"one response of 32,000 tokens": (1, 31000, 0.0), "pairs of 4,000": (2, 4000, 0.4)}
    responses, median, spread = medians.get(trees, (8, 500, 0.6))
    row: list[TokenTree] = []
    while True:
        lengths = [int(n) for n in median * np.exp(spread * rng.normal(size=responses))]
        prompt = int(rng.integers(100, 1000))
        tokens -= prompt + sum(lengths)
        if tokens < 0:
            return row
        scores = tuple(float(k) for k in range(responses))
        answers = tuple(np.ones(n, np.int32) for n in lengths)
        row.append(TokenTree(np.ones(prompt, np.int32), answers, scores, len(row)))
