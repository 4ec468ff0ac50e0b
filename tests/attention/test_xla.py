"""Attention by block pairs against the dense rule, in value and gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.attention import xla
from palign.attention.attend import attend
from palign.attention.block_pairs import list_block_pairs
from palign.attention.walk import Ids, Scoring, Tokens
from palign.sharding.mesh import make_mesh, row_sharding
from tests.attention import rows
from tests.attention.rows import EVERYTHING
from tests.compiled import uncached
from tests.trees import largest_difference

R, T, BLOCK, H, D = 8, 64, 8, 4, 8


def compile_both(softcap=None, chunk=5):
    return rows.compile_both(xla.kernel(chunk), softcap)


def random_arrays(rng, key_heads=2):
    return rows.random_arrays(rng, rows=R, tokens=T, heads=H, key_heads=key_heads, width=D)


random_rows = functools.partial(rows.random_rows, rows=R, tokens=T, block=BLOCK)


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "reordered"])
@pytest.mark.parametrize(
    ("softcap", "chunk", "key_heads"), [(None, 5, 2), (2.0, 16, 1), (None, 300, 4), (None, None, 2)]
)
def test_values_and_gradients_equal_the_dense_rule_on_random_trees(softcap, chunk, key_heads, shuffle):
    rng = np.random.default_rng(key_heads)
    both = compile_both(softcap, chunk)
    for window in (EVERYTHING, 2, 3, 9, EVERYTHING):
        ids, pairs = random_rows(rng, shuffle=shuffle)
        by_pairs, dense = both(random_arrays(rng, key_heads), ids, pairs, window)
        assert largest_difference(by_pairs, dense) < 2e-6


@pytest.mark.parametrize(("heads", "width", "pairs"), [(2, 32, 16), (8, 32, 6), (14, 64, 2), (32, 128, 1)])
def test_a_trip_on_a_cpu_takes_what_its_caches_hold_and_one_pair_at_least(heads, width, pairs):
    ids = Ids(*(np.zeros((1, 256), np.int32),) * 3)
    tokens = Tokens(ids, ids, list_block_pairs(*(np.zeros(256, np.int32),) * 3, 64)[None])
    assert xla.pairs_in_caches((1, 256, heads, width), tokens) == pairs


def test_padding_gives_exactly_zero_and_finite_gradients():
    rng = np.random.default_rng(0)
    ids, pairs = random_rows(rng)
    ids = ids.at[:, 0].set(0)  # one row without any tree
    (output, gradients), _ = compile_both()(random_arrays(rng), ids, pairs, EVERYTHING)
    padding = np.asarray(ids[0] == 0)
    assert padding.sum() > T
    for array in (output, *gradients):
        assert np.isfinite(array).all()
        assert (np.asarray(array)[padding] == 0).all()


def test_large_scores_do_not_overflow():
    rng = np.random.default_rng(1)
    ids, pairs = random_rows(rng)
    query, key, value, cotangent = random_arrays(rng)
    whole = [64 * jnp.round(query), jnp.round(key), value, cotangent]  # scores of many hundreds without rounding
    by_pairs, dense = compile_both()(whole, ids, pairs, EVERYTHING)
    assert largest_difference(by_pairs, dense) < 1e-5  # exp(score - lse): the scores' own float32 steps


def test_no_gradient_flows_between_branches_or_trees():
    rng = np.random.default_rng(2)
    ids, pairs = random_rows(rng)
    group, branch, _ = np.asarray(ids)
    query, key, value, cotangent = random_arrays(rng)
    one = (group == 1) & (branch == 1)
    (_, gradients), _ = compile_both()(
        [query, key, value, jnp.where(one[..., None, None], cotangent, 0)], ids, pairs, EVERYTHING
    )
    seen = one | ((group == 1) & (branch == 0))
    for gradient, touched in zip(gradients, (one, seen, seen), strict=True):
        assert (np.asarray(gradient)[~touched] == 0).all()
        assert (np.asarray(gradient)[one] != 0).any()
    assert (np.asarray(gradients[1])[seen & ~one] != 0).any()  # the prompt does learn from the branch


def test_what_a_list_is_padded_with_does_not_matter():
    rng = np.random.default_rng(3)
    ids, pairs = random_rows(rng)
    arrays = random_arrays(rng)
    garbage = jnp.asarray(rng.integers(0, T // BLOCK, pairs.shape[:2]))
    padded = pairs[..., 1] < 0
    other = pairs.at[..., 0].set(jnp.where(padded, garbage, pairs[..., 0]))
    assert padded.any() and (other != pairs).any()
    expected, got = (compile_both()(arrays, ids, p, EVERYTHING)[0] for p in (pairs, other))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_pair_that_is_missing_from_the_list_shows():
    rng = np.random.default_rng(4)
    ids, pairs = random_rows(rng)
    off_diagonal = np.argwhere((pairs[..., 1] >= 0) & (pairs[..., 0] != pairs[..., 1]))
    row, entry = off_diagonal[len(off_diagonal) // 2]
    by_pairs, dense = compile_both()(random_arrays(rng), ids, pairs.at[row, entry, 1].set(-1), EVERYTHING)
    assert largest_difference(by_pairs, dense) > 1e-3


def test_the_loops_run_as_often_as_pairs_are_listed_whatever_the_capacity(monkeypatch):
    trips = []
    monkeypatch.setattr(
        jax.lax, "fori_loop", lambda start, stop, body, carry: (trips.append(int(stop) - start), carry)[1]
    )
    kernel, scoring = xla.kernel(chunk=8), Scoring(0.25, None)
    query, key, value, cotangent = (x[:2] for x in random_arrays(np.random.default_rng(5)))
    for used in (1, T):
        column = np.arange(T)
        row = np.stack([column < used, column * 0, np.where(column < used, column, 0)]).astype(np.int32)
        pairs = np.stack([list_block_pairs(*row, BLOCK)] * 2)
        ids = Ids(*(jnp.asarray(np.stack([row[i]] * 2)) for i in (2, 0, 1)))
        tokens = Tokens(ids, ids, jnp.asarray(pairs))
        saved = (scoring, query, key, value, tokens, EVERYTHING)
        output, lse = kernel.forward(*saved)
        kernel.backward(*saved, output, lse, cotangent)
        assert trips[-2:] == [math.ceil((pairs[..., 1] >= 0).sum() / 8)] * 2
    assert trips == [2, 2, 9, 9]  # 2 rows of 8 diagonal blocks, 2 rows of 36 causal pairs, 8 at a time


def test_the_compiled_loop_has_a_bound_that_the_data_decides():
    rng = np.random.default_rng(6)
    ids, pairs = random_rows(rng)
    query, key, value, _ = random_arrays(rng)
    run = lambda pairs: attend(query, key, value, ids[2], ids[0], ids[1], pairs, EVERYTHING, scale=1.0)
    text = str(jax.make_jaxpr(run)(pairs))
    assert "while[" in text and "scan[" not in text


def test_bfloat16_inputs_are_accumulated_in_float32():
    rng = np.random.default_rng(7)
    ids, pairs = random_rows(rng)
    arrays = [x.astype(jnp.bfloat16) for x in random_arrays(rng)]
    (output, gradients), dense = compile_both()(arrays, ids, pairs, EVERYTHING)
    assert {x.dtype for x in (output, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    assert largest_difference(jax.tree.map(lambda x: x.astype(jnp.float32), (output, gradients)), dense) < 1e-2


def test_a_list_whose_length_is_no_causal_bound_is_an_error():
    rng = np.random.default_rng(8)
    ids, pairs = random_rows(rng)
    query, key, value, _ = random_arrays(rng)
    for wrong in (pairs[:, :-1], pairs[:, : 3 * 4 // 2]):  # no triangle number; 3 blocks do not divide 64
        message = rf"attend: {wrong.shape[1]} block pairs for rows of 64 tokens; expected n \* \(n \+ 1\) / 2"
        with pytest.raises(ValueError, match=message):
            attend(query, key, value, ids[2], ids[0], ids[1], wrong, EVERYTHING, scale=1.0)


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=4), dict(fsdp=2, tensor=4), dict(context=4, tensor=2)], ids=str)
def test_eight_devices_compute_what_one_does(mesh):
    """Over rows; over rows and heads, four groups of them, though there are two key heads; and over pieces of rows."""
    rng = np.random.default_rng(9)
    ids, pairs = random_rows(rng)
    arrays = random_arrays(rng)
    expected, _ = compile_both()(arrays, ids, pairs, EVERYTHING)
    mesh = make_mesh(**mesh)
    place = lambda tree, axis: jax.device_put(tree, row_sharding(mesh, axis=axis))
    with jax.set_mesh(mesh), uncached():
        got, _ = compile_both()(place(arrays, 0), place(ids, 1), place(pairs, 0), EVERYTHING)
    assert len(got[0].sharding.device_set) == 8
    assert largest_difference(jax.device_get(got), jax.device_get(expected)) < 1e-6
