"""Rows: the worked example, the invariants over random trees, and every capacity."""

import collections

import numpy as np
import pytest

from palign.attention.block_pairs import list_block_pairs
from palign.data.pack import (
    LAYOUTS,
    PAIR_POLICIES,
    join_targets,
    list_pairs,
    pack_row,
    row_shape,
    split_targets,
    stack_rows,
    subset_tree,
    tree_tokens,
)
from tests.data.samples import EOS, random_tree, tree

A, B = tree(b"pqr", b"ab", b"c", id=7), tree(b"st", b"de", id=9)


def test_the_worked_example_of_the_module():
    row = pack_row([A, B], row_shape(12, trees=2, responses=2, block=4), "best_worst", "packed", seed=0)
    assert bytes(row.token.astype(np.uint8)) == b"pqrabcstde\0\0"
    assert row.group.tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert row.branch.tolist() == [0, 0, 0, 1, 1, 2, 0, 0, 1, 1, 0, 0]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 0, 0]
    assert bytes(row.target_token[:5].astype(np.uint8)) == b"abcde"
    assert row.target_source.tolist() == [2, 3, 2, 7, 8] + [0] * 7
    assert row.target_slot.tolist() == [1, 1, 2, 3, 3] + [0] * 7
    assert row.valid.tolist() == [[True, True], [True, False]]
    assert row.response_end.tolist() == [[4, 5], [9, -1]]
    assert row.pairs.tolist() == [[1, 2], [0, 0]]
    assert row.scores.tolist() == [[2, 1], [1, 0]]
    assert row.example_id.tolist() == [7, 9]
    assert row.reference_logps is None


def test_the_worked_example_unshared():
    row = pack_row([A, B], row_shape(16, trees=2, responses=2, block=4), "best_worst", "unshared", seed=0)
    assert bytes(row.token.astype(np.uint8)) == b"pqrabpqrcstde\0\0\0"
    assert row.group.tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0]
    assert row.target_source[:5].tolist() == [2, 3, 7, 10, 11]
    assert row.target_slot[:5].tolist() == [1, 1, 2, 3, 3]
    assert row.response_end.tolist() == [[4, 8], [12, -1]]


def check_row(row, trees, layout):
    """The invariants of any row."""
    real = row.target_slot > 0
    assert (np.diff(real.astype(int)) <= 0).all()  # padding last
    assert real.sum() == sum(ids.size for t in trees for ids in t.responses)
    K = row.valid.shape[1]
    for e, t in enumerate(trees):
        assert row.example_id[e] == t.id and row.valid[e].sum() == len(t.responses)
        for k, ids in enumerate(t.responses):
            mine = row.target_slot == 1 + e * K + k
            assert row.target_token[mine].tolist() == ids.tolist()  # first token and EOS included, each once
            source = row.target_source[mine]
            assert row.token[source[0]] == t.prompt[-1] and row.branch[source[0]] == 0
            assert row.position[source].tolist() == list(range(t.prompt.size - 1, t.prompt.size + ids.size - 1))
            assert row.branch[source[1:]].tolist() == [k + 1] * (ids.size - 1)
            end = row.response_end[e, k]
            assert row.token[end] == ids[-1] and row.position[end] == t.prompt.size + ids.size - 1
            assert set(row.group[source]) == {row.group[end]} != {0}
            before = np.flatnonzero((row.group == row.group[end]) & np.isin(row.branch, (0, k + 1)))
            assert row.token[before].tolist() == [*t.prompt, *ids]  # what the branch sees is prompt and response
            assert row.position[before].tolist() == list(range(before.size))
    used = sum(tree_tokens(t.prompt.size, [ids.size for ids in t.responses], layout) for t in trees)
    assert (row.group > 0).sum() == used
    assert not row.valid[len(trees) :].any() and (row.example_id[len(trees) :] == -1).all()
    assert ((row.response_end >= 0) == row.valid).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", PAIR_POLICIES)
def test_invariants_of_random_rows_with_1_to_8_responses(layout, policy):
    rng = np.random.default_rng(0)
    shape = row_shape(2048, trees=8, responses=8, pair_policy=policy, block=16)
    for _ in range(15):
        trees = [random_tree(rng, id) for id in range(int(rng.integers(1, 9)))]
        row = pack_row(trees, shape, policy, layout, seed=3)
        check_row(row, trees, layout)
        pairs = row.pairs[row.pairs[:, 0] > 0]
        scores, valid = row.scores.reshape(-1), row.valid.reshape(-1)
        assert valid[pairs - 1].all()
        assert (scores[pairs[:, 0] - 1] > scores[pairs[:, 1] - 1]).all()
        assert ((pairs[:, 0] - 1) // 8 == (pairs[:, 1] - 1) // 8).all()
        assert len(pairs) == sum(len(list_pairs(t, policy, seed=3)) for t in trees)
        assert (row.block_pairs == list_block_pairs(row.group, row.branch, row.position, 16)).all()


def test_packed_and_unshared_list_the_same_targets_and_pairs():
    rng = np.random.default_rng(1)
    shape = row_shape(1024, trees=6, responses=8, pair_policy="all")
    trees = [random_tree(rng, id) for id in range(6)]
    packed, unshared = (pack_row(trees, shape, "all", layout, seed=0) for layout in LAYOUTS)
    listed = [
        collections.Counter(zip(r.target_slot.tolist(), r.target_token.tolist(), strict=True))
        for r in (packed, unshared)
    ]
    assert listed[0] == listed[1]
    for name in ("valid", "scores", "pairs", "example_id"):
        assert (getattr(packed, name) == getattr(unshared, name)).all()
    assert unshared.group.max() == sum(len(t.responses) for t in trees) and packed.group.max() == 6


def test_every_response_starts_from_the_last_prompt_token():
    t = tree([5], [6, EOS], [EOS], [7, 8, EOS])
    row = pack_row([t], row_shape(64, responses=3), "best_worst", "packed", seed=0)
    assert row.target_source[:6].tolist() == [0, 1, 0, 0, 4, 5]
    assert (row.target_token == EOS).sum() == 3


def test_sequence_sums_by_slot_are_the_responses_own():
    rng = np.random.default_rng(2)
    trees = [random_tree(rng, id) for id in range(5)]
    row = pack_row(trees, row_shape(512, trees=8, responses=8), "best_worst", "packed", seed=0)
    values = rng.normal(size=row.target_slot.shape)
    sums = np.bincount(row.target_slot, values, minlength=1 + 64)[1:].reshape(8, 8)
    for e, arrays in enumerate(split_targets(row, values)):
        assert [a.size for a in arrays] == [ids.size for ids in trees[e].responses]
        np.testing.assert_allclose(sums[e, : len(arrays)], [a.sum() for a in arrays])


def test_cached_values_go_in_and_come_back():
    rng = np.random.default_rng(3)
    trees = [random_tree(rng, id) for id in range(5)]
    masks = tuple(np.arange(ids.size) % 3 != 1 for ids in trees[2].responses)
    trees[2] = trees[2]._replace(learned=masks)
    cached = [tuple(rng.normal(size=n).astype(np.float32) for n in t.num_targets) for t in trees]
    for layout in LAYOUTS:
        row = pack_row(trees, row_shape(1024, responses=8), "best_worst", layout, seed=0)
        joined = join_targets(row, cached, like=cached[0][0])
        assert joined.dtype == np.float32 and not joined[row.target_slot == 0].any()
        back = split_targets(row, joined)
        assert all(
            np.array_equal(a, b) for one, two in zip(back, cached, strict=True) for a, b in zip(one, two, strict=True)
        )


def test_pair_policies_on_a_list_with_ties():
    rng = np.random.default_rng(0)
    scores = (1.0, 3.0, 3.0, 2.0)
    assert PAIR_POLICIES["best_worst"](scores, rng) == [(1, 0)]
    assert PAIR_POLICIES["adjacent"](scores, rng) == [(2, 3), (3, 0)]
    assert PAIR_POLICIES["all"](scores, rng) == [(1, 0), (1, 3), (2, 0), (2, 3), (3, 0)]
    assert PAIR_POLICIES["random"](scores, rng)[0] in PAIR_POLICIES["all"](scores, rng)
    for policy in PAIR_POLICIES.values():
        assert policy((2.0,) * 4, rng) == [] == policy((1.0,), rng)


def test_random_pairs_depend_on_seed_and_example_only():
    trees = [tree([5], *[[6, EOS]] * 6, id=id) for id in range(40)]
    first = [list_pairs(t, "random", seed=1) for t in trees]
    assert first == [list_pairs(t, "random", seed=1) for t in trees]
    assert first != [list_pairs(t, "random", seed=2) for t in trees]
    assert len(set(map(str, first))) > 8


def test_shapes_and_types_do_not_depend_on_the_trees():
    shape = row_shape(256, trees=4, responses=3, pair_policy="all", block=32)
    rows = [pack_row([], shape, "all", "packed", seed=0), pack_row([tree([5], [EOS])], shape, "all", "packed", seed=0)]
    assert [(a.shape, a.dtype) for a in rows[0][:-3]] == [(a.shape, a.dtype) for a in rows[1][:-3]]
    batch = stack_rows(rows)
    assert batch.token.shape == (2, 256) and batch.pairs.shape == (2, 12, 2) and batch.reference_logps is None
    assert batch.block_pairs.shape == (2, 36, 2) and batch.valid.dtype == bool and batch.scores.dtype == np.float32
    assert not batch.valid[0].any() and not batch.target_slot[0].any() and (batch.response_end[0] == -1).all()


@pytest.mark.parametrize(
    ("trees", "changes", "message"),
    [
        ([A, B], {"trees": 1}, "2 trees do not fit a row of 1"),
        ([A, B], {"tokens": 8}, "10 tokens but a row holds 8"),
        ([A, B], {"targets": 4}, "5 targets but a row holds 4"),
        ([A, A._replace(id=8)], {"pairs": 1}, "2 pairs but a row holds 1"),
        ([tree([5], *[[EOS]] * 3)], {}, "example 0 has 3 responses; expected 1 to 2"),
        ([tree([], [EOS])], {}, "at least one token"),
        ([tree([5], [])], {}, "at least one token"),
        ([A._replace(scores=(1.0,))], {}, "one score a response"),
        ([A._replace(id=-1)], {}, "negative"),
    ],
)
def test_what_does_not_fit_is_named(trees, changes, message):
    shape = row_shape(12, trees=2, responses=2, block=4)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        pack_row(trees, shape, "best_worst", "packed", seed=0)


def test_unknown_names_get_the_nearest():
    shape = row_shape(64, responses=2)
    with pytest.raises(ValueError, match="did you mean 'best_worst'"):
        pack_row([A], shape, "best-worst", "packed", seed=0)
    with pytest.raises(ValueError, match="did you mean 'unshared'"):
        pack_row([A], shape, "all", "unshred", seed=0)
    with pytest.raises(ValueError, match="trees=0"):
        row_shape(64, trees=0, responses=2)
    with pytest.raises(ValueError, match="multiple of the block"):
        row_shape(100, responses=2)


def test_subsets_keep_best_and_worst_in_order_and_are_nested():
    t = tree([5], *[[10 + k, EOS] for k in range(8)], scores=[3, 1, 4, 1, 5, 9, 2, 6], id=3)
    before = {5, 1}
    for keep in range(2, 8):
        smaller = subset_tree(t, keep, seed=0)
        kept = {int(ids[0]) - 10 for ids in smaller.responses}
        assert len(kept) == keep and before <= kept
        assert [int(ids[0]) for ids in smaller.responses] == sorted(10 + k for k in kept)
        assert smaller.scores == tuple(t.scores[k] for k in sorted(kept))
        before = kept
    assert subset_tree(t, 8, seed=0) is t
    assert subset_tree(t, 1, seed=0).scores == (9.0,)
    tied = tree([5], *[[EOS]] * 4, scores=[1, 1, 1, 1])
    assert len(subset_tree(tied, 2, seed=0).responses) == 2
    with pytest.raises(ValueError, match="keep=0"):
        subset_tree(t, 0, seed=0)
