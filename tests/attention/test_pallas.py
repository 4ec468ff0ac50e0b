"""The Pallas kernels, interpreted, against the dense rule in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.attention import pallas_gpu, pallas_tpu
from palign.attention.attend import KERNELS, attend
from palign.sharding.mesh import make_mesh, row_sharding
from tests.attention import rows
from tests.attention.rows import EVERYTHING
from tests.compiled import uncached
from tests.trees import largest_difference

R, T, BLOCK, H, D = 2, 64, 16, 4, 8
KINDS = {"tpu": pallas_tpu.kernel(interpret=True), "gpu": pallas_gpu.kernel(interpret=True)}

each_kind = pytest.mark.parametrize("kind", KINDS)
random_rows = functools.partial(rows.random_rows, rows=R, tokens=T, block=BLOCK)


def compile_both(kind, softcap=2.0):
    return rows.compile_both(KINDS[kind], softcap)


def random_arrays(rng, key_heads=2, width=D):
    return rows.random_arrays(rng, rows=R, tokens=T, heads=H, key_heads=key_heads, width=width)


@each_kind
def test_values_and_gradients_equal_the_dense_rule_on_random_trees(kind):
    rng = np.random.default_rng(0)
    for window, shuffle in ((EVERYTHING, False), (2, False), (9, True), (EVERYTHING, True), (EVERYTHING, False)):
        ids, pairs = random_rows(rng, shuffle=shuffle)
        by_pairs, dense = compile_both(kind)(random_arrays(rng), ids, pairs, window)
        assert largest_difference(by_pairs, dense) < 2e-6


@each_kind
def test_padding_gives_exactly_zero_and_finite_gradients(kind):
    rng = np.random.default_rng(1)
    ids, pairs = random_rows(rng)
    ids = ids.at[:, 0].set(0)  # one row without any tree
    (output, gradients), _ = compile_both(kind)(random_arrays(rng), ids, pairs, EVERYTHING)
    padding = np.asarray(ids[0] == 0)
    assert padding.sum() >= T
    for array in (output, *gradients):
        assert np.isfinite(array).all()
        assert (np.asarray(array)[padding] == 0).all()


@each_kind
def test_what_a_list_is_padded_with_does_not_matter(kind):
    rng = np.random.default_rng(2)
    ids, pairs = random_rows(rng)
    arrays = random_arrays(rng)
    garbage = jnp.asarray(rng.integers(0, T // BLOCK, pairs.shape[:2]))
    other = pairs.at[..., 0].set(jnp.where(pairs[..., 1] < 0, garbage, pairs[..., 0]))
    assert (other != pairs).any()
    expected, got = (compile_both(kind)(arrays, ids, p, EVERYTHING)[0] for p in (pairs, other))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@each_kind
def test_a_pair_that_is_missing_from_the_list_shows(kind):
    rng = np.random.default_rng(3)
    ids, pairs = random_rows(rng)
    row, entry = np.argwhere((pairs[..., 1] >= 0) & (pairs[..., 0] != pairs[..., 1]))[0]
    missing = np.delete(np.asarray(pairs[row]), entry, axis=0)
    pairs = pairs.at[row].set(np.concatenate([missing, [[T // BLOCK - 1, -1]]]))
    by_pairs, dense = compile_both(kind)(random_arrays(rng), ids, pairs, EVERYTHING)
    assert largest_difference(by_pairs, dense) > 1e-3


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize(("softcap", "key_heads", "width"), [(None, 1, 8), (None, 4, 12), (2.0, 2, 32)])
def test_heads_of_every_kind_equal_the_dense_rule(kind, softcap, key_heads, width):
    rng = np.random.default_rng(4)
    for shuffle in (False, True):
        ids, pairs = random_rows(rng, shuffle=shuffle)
        arrays = random_arrays(rng, key_heads, width)
        by_pairs, dense = compile_both(kind, softcap)(arrays, ids, pairs, 9 if shuffle else EVERYTHING)
        assert largest_difference(by_pairs, dense) < 2e-6


@pytest.mark.slow
@each_kind
def test_large_scores_do_not_overflow(kind):
    rng = np.random.default_rng(5)
    ids, pairs = random_rows(rng)
    query, key, value, cotangent = random_arrays(rng)
    whole = [64 * jnp.round(query), jnp.round(key), value, cotangent]  # scores of many hundreds without rounding
    by_pairs, dense = compile_both(kind, None)(whole, ids, pairs, EVERYTHING)
    assert largest_difference(by_pairs, dense) < 1e-5


@pytest.mark.slow
@each_kind
def test_bfloat16_inputs_are_accumulated_in_float32(kind):
    rng = np.random.default_rng(6)
    ids, pairs = random_rows(rng)
    arrays = [x.astype(jnp.bfloat16) for x in random_arrays(rng)]
    (output, gradients), dense = compile_both(kind)(arrays, ids, pairs, EVERYTHING)
    assert {x.dtype for x in (output, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    assert largest_difference(jax.tree.map(lambda x: x.astype(jnp.float32), (output, gradients)), dense) < 1e-2


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("axis", ["fsdp", "context"])
def test_two_devices_compute_what_one_does(kind, axis):
    """Rows; or pieces of rows, and then keys of one device that the other has no query for get no gradient there."""
    rng = np.random.default_rng(7)
    ids, pairs = random_rows(rng, shuffle=axis == "context")
    queries, keys = (np.asarray(pairs[0]) // (T // BLOCK // 2)).T
    assert axis == "fsdp" or len(set(np.asarray(pairs[0, :, 1])[(queries == 0) & (keys >= 0)])) < T // BLOCK
    arrays = random_arrays(rng)
    expected, _ = compile_both(kind)(arrays, ids, pairs, EVERYTHING)
    mesh = make_mesh(**{"data": 1, axis: 2}, devices=jax.devices()[:2])
    place = lambda tree, axis: jax.device_put(tree, row_sharding(mesh, axis=axis))
    with jax.set_mesh(mesh), uncached():
        got, _ = compile_both(kind)(place(arrays, 0), place(ids, 1), place(pairs, 0), EVERYTHING)
    assert len(got[0].sharding.device_set) == 2
    assert largest_difference(jax.device_get(got), jax.device_get(expected)) < 1e-6


@pytest.mark.parametrize(
    ("name", "block", "width", "message"),
    [
        ("pallas_tpu", 64, 64, "block = 64: .* multiples of 128; use 512"),
        ("pallas_tpu", 128, 64, "list 131328 block pairs, .* takes 120000; twice the block needs a quarter"),
        ("pallas_gpu", 256, 64, r"block = 256: .* one of \(16, 32, 64, 128\); use 64"),
        ("pallas_gpu", 128, 96, "keys of width 128 has 65536 bytes, .* takes 32768; use a smaller block"),
    ],
)
def test_sizes_that_a_chip_cannot_take_are_an_error(name, block, width, message):
    tokens = 65536
    pairs = (tokens // block) * (tokens // block + 1) // 2
    shapes = [(1, tokens, 2, width)] * 3 + [(1, tokens)] * 3 + [(1, pairs, 2)]
    dtypes = [jnp.float32] * 3 + [jnp.int32] * 4
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: attend(*x, EVERYTHING, scale=1.0, kernel=KERNELS[name]), *inputs)
