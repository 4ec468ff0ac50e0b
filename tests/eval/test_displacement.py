"""CHES and displacement against loops over single responses, and what must not matter: packing, padding, dtype."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.eval import displacement as module
from palign.eval.diagnostics import at_pairs
from palign.eval.displacement import (
    ches,
    dense_hidden_sums,
    displacement,
    hidden_sums_by_slot,
    length_normalised_ches,
)
from palign.sharding.mesh import make_mesh
from tests.oracles import diagnostics as oracle
from tests.trees import make_batch, random_trees, tiny_model


def random_sums(seed, pairs=16, width=8):
    rng = np.random.default_rng(seed)
    return rng.normal(0.0, 5.0, (pairs, 2, width)).astype(np.float32), rng.integers(1, 9, (pairs, 2))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_both_scores_are_the_oracle_s(dtype):
    sums, lengths = random_sums(0)
    rtol = 1e-12 if dtype == "float64" else 1e-5
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        given = jnp.asarray(sums, dtype)
        exact = np.asarray(given.astype("float32"), np.float64)
        found = jax.jit(ches)(given), jax.jit(length_normalised_ches)(given, jnp.asarray(lengths, jnp.int32))
        assert all(values.dtype == ("float64" if dtype == "float64" else "float32") for values in found)
    expected = oracle.ches(exact), oracle.length_normalised_ches(exact, lengths)
    for values, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, right, rtol=rtol, atol=rtol * np.abs(right).max())


def test_a_response_against_itself_scores_exactly_nothing():
    sums, lengths = random_sums(1)
    sums, lengths = 1e3 * np.stack([sums[:, 0]] * 2, axis=1), np.stack([lengths[:, 0]] * 2, axis=1)
    assert not np.asarray(ches(sums)).any()
    assert not np.asarray(length_normalised_ches(sums, lengths)).any()


def test_a_score_is_bounded_by_the_norms_of_its_sums():
    sums, lengths = random_sums(2)
    sums[0, 1] = 3 * sums[0, 0]  # in one direction the bound is reached
    norms = np.linalg.norm(sums, axis=-1)
    bound = norms[:, 0] * (norms[:, 1] - norms[:, 0])
    found = np.asarray(ches(sums))
    assert (found <= bound + 1e-3).all() and found[0] == pytest.approx(bound[0], rel=1e-5)
    means = norms / lengths
    assert (np.asarray(length_normalised_ches(sums, lengths)) <= means[:, 0] * (means[:, 1] - means[:, 0]) + 1e-4).all()


def test_the_order_of_a_pair_matters_and_lengths_of_one_change_nothing():
    sums, _ = random_sums(3)
    assert not np.allclose(ches(sums), ches(sums[:, ::-1]))
    np.testing.assert_array_equal(ches(sums), length_normalised_ches(sums, np.ones((16, 2))))


def test_values_and_gradients_are_finite_for_large_sums_and_empty_responses():
    sums = np.float32([[[1e6, -1e6], [1e6, 1e6]], [[0.0, 0.0], [1e4, 1e4]], [[0.0, 0.0], [0.0, 0.0]]])
    lengths = np.array([[1, 1], [0, 3], [0, 0]])
    for score in (ches, lambda sums: length_normalised_ches(sums, lengths)):
        value, gradient = jax.value_and_grad(lambda sums, score=score: score(sums).sum())(sums)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    assert length_normalised_ches(sums, lengths)[2] == 0


def test_displacement_is_the_change_since_the_start_and_no_change_is_none():
    now = np.float32([[-13.0, -20.0], [-10.0, -1e4], [1e4, -3.0], [-9.5, -2.0]])
    before = np.float32([[-10.0, -12.0], [-10.0, 0.0], [-1e4, -3.0], [-9.0, -4.0]])
    found = jax.jit(displacement)(now, before)
    np.testing.assert_array_equal(found.chosen, [-3.0, 0.0, 2e4, -0.5])
    np.testing.assert_array_equal(found.rejected, [-8.0, -1e4, 0.0, 2.0])
    np.testing.assert_array_equal(found.displaced, [True, False, False, True])


@pytest.fixture(scope="module")
def alone():
    """Trees, and the states of each response alone with its prompt: (example, response) -> `[tokens, D]` float64."""
    lm, params, _ = tiny_model()
    trees = random_trees(7, 10, responses=(2, 4))
    single = [t._replace(responses=(r,), scores=(0.0,)) for t in trees for r in t.responses]
    batch = make_batch(single, rows=len(single), used=len(single), tokens=16, responses=1, trees_cap=1)
    states = np.asarray(jax.jit(lm.hidden)(params, batch), np.float64)
    keys = [(e, k) for e, tree in enumerate(trees) for k in range(len(tree.responses))]
    return trees, dict(zip(keys, states, strict=True))


@pytest.mark.parametrize("layout", ["packed", "unshared"])
def test_pairs_of_packed_trees_score_as_each_pair_does_alone(layout, alone):
    trees, states = alone
    lm, params, _ = tiny_model()
    batch = make_batch(trees, layout=layout, rows=6, used=5, pair_policy="all", responses=4)

    @jax.jit
    def numbers(params, batch):
        pairs = at_pairs(hidden_sums_by_slot(lm.hidden(params, batch), batch), batch)
        return pairs, ches(pairs)

    sums, scores = (np.asarray(x) for x in numbers(params, batch))
    used, checked = 5, 0
    for r, p in np.argwhere(np.asarray(batch.pairs)[..., 0] > 0):
        examples, responses = np.divmod(np.asarray(batch.pairs)[r, p] - 1, 4)
        e = int(examples[0]) * used + r  # trees were dealt out in turn
        tree = trees[e]
        expected = [
            oracle.summed_states(states[e, int(k)], tree.prompt.size, tree.responses[int(k)].size) for k in responses
        ]
        place = r * batch.pairs.shape[1] + p
        np.testing.assert_allclose(sums[place], expected, rtol=1e-4, atol=1e-4)
        assert scores[place] == pytest.approx(oracle.ches([expected])[0], rel=1e-4, abs=1e-3 * (expected[0] ** 2).sum())
        checked += 1
    assert checked >= 2 * len(trees)


def test_what_predicts_nothing_is_never_read():
    batch = make_batch(random_trees(8, 5, responses=(2, 3)), rows=3, used=2, responses=3)
    hidden = np.random.default_rng(0).normal(size=(*batch.token.shape, 4)).astype(np.float32)
    clean = hidden_sums_by_slot(hidden, batch)
    poisoned = hidden.copy()
    for r in range(3):
        sources = np.asarray(batch.target_source)[r, np.asarray(batch.target_slot)[r] > 0]
        poisoned[r, np.setdiff1d(np.arange(hidden.shape[1]), sources)] = np.nan
    assert np.isnan(poisoned[2]).all()  # an empty row
    found = hidden_sums_by_slot(poisoned, batch)
    np.testing.assert_array_equal(found, clean)
    assert not np.asarray(found)[:, 0].any() and not np.asarray(found)[2].any()


def test_sums_are_made_in_f32_of_states_in_bf16():
    batch = make_batch(random_trees(9, 2, responses=(2, 2)), rows=1, used=1, responses=2)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(*batch.token.shape, 4)), jnp.bfloat16)
    found = hidden_sums_by_slot(hidden, batch)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, hidden_sums_by_slot(hidden.astype(jnp.float32), batch), rtol=1e-6)


def test_sums_of_rows_on_several_devices_are_those_of_one():
    batch = make_batch(random_trees(10, 6, responses=(2, 3)), rows=4, used=3, responses=3)
    hidden = np.random.default_rng(2).normal(size=(*batch.token.shape, 4)).astype(np.float32)
    expected = at_pairs(hidden_sums_by_slot(hidden, batch), batch)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])):
        compiled = jax.jit(lambda hidden, batch: at_pairs(hidden_sums_by_slot(hidden, batch), batch))
        np.testing.assert_array_equal(compiled(hidden, batch), expected)


def test_sums_of_rows_in_pieces_are_those_of_whole_rows():
    batch = make_batch(random_trees(10, 6, responses=(2, 3)), rows=4, used=3, responses=3)
    hidden = np.random.default_rng(2).normal(size=(*batch.token.shape, 4)).astype(np.float32)
    with jax.set_mesh(make_mesh(data=2, context=4)):
        found = jax.jit(hidden_sums_by_slot)(hidden, batch)
    np.testing.assert_allclose(found, hidden_sums_by_slot(hidden, batch), rtol=1e-6, atol=1e-6)


def test_no_gradient_reaches_hidden_states():
    batch = make_batch(random_trees(11, 2, responses=(2, 2)), rows=1, used=1, responses=2)
    hidden = jnp.ones((*batch.token.shape, 4))
    gradient = jax.grad(lambda hidden: ches(at_pairs(hidden_sums_by_slot(hidden, batch), batch)).sum())(hidden)
    assert not gradient.any()
    mask = jnp.ones(batch.token.shape, bool)
    assert not jax.grad(lambda hidden: dense_hidden_sums(hidden, mask).sum())(hidden).any()


def test_dense_sums_are_the_same_whichever_side_is_padded_and_whatever_padding_holds():
    rng = np.random.default_rng(3)
    prompt, lengths, width = 3, (1, 4), 2
    left, right = np.full((2, 9, width), np.nan, np.float32), np.full((2, 9, width), np.nan, np.float32)
    mask_left, mask_right, expected = np.zeros((2, 9), bool), np.zeros((2, 9), bool), []
    for b, n in enumerate(lengths):
        states = rng.normal(size=(prompt + n, width)).astype(np.float32)
        right[b, : prompt + n], left[b, -prompt - n :] = states, states
        mask_right[b, prompt : prompt + n], mask_left[b, -n:] = True, True
        expected.append(oracle.summed_states(states, prompt, n))
    for hidden, mask in ((left, mask_left), (right, mask_right)):
        np.testing.assert_allclose(jax.jit(dense_hidden_sums)(hidden, mask), expected, rtol=1e-5)
    first = np.zeros((2, 9), bool)
    first[:, 0] = True
    assert not dense_hidden_sums(right, first).any()  # nothing predicts the first token of a row


def test_dense_sums_and_sums_by_slot_agree(alone):
    trees, states = alone
    tree, response = trees[0], trees[0].responses[0]
    row = states[0, 0].astype(np.float32)
    mask = np.zeros(row.shape[0], bool)
    mask[tree.prompt.size : tree.prompt.size + response.size] = True
    single = make_batch([tree._replace(responses=(response,), scores=(0.0,))], rows=1, used=1, tokens=16, responses=1)
    by_slot = hidden_sums_by_slot(row[None], single)
    np.testing.assert_allclose(dense_hidden_sums(row[None], mask[None]), by_slot[:, 1], rtol=1e-5, atol=1e-5)


def test_wrong_shapes_are_answered_with_the_argument_s_name():
    batch = make_batch(random_trees(12, 1, responses=(2, 2)), rows=1, used=1, responses=2)
    with pytest.raises(ValueError, match=r"ches: hidden_sums has shape \[3, 4\]; expected \[B, 2, D\]"):
        ches(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"length_normalised_ches: hidden_sums has shape \[3, 3, 4\]"):
        length_normalised_ches(jnp.zeros((3, 3, 4)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"length_normalised_ches: lengths has shape \[2\]; expected \[3, 2\]"):
        length_normalised_ches(jnp.zeros((3, 2, 4)), jnp.ones(2))
    with pytest.raises(ValueError, match=r"displacement: initial_logps has shape \[3\]"):
        displacement(jnp.zeros((3, 2)), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"displacement: all shapes must be equal"):
        jax.jit(displacement)(jnp.zeros((3, 2)), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"hidden_sums_by_slot: hidden has shape \[1, 7, 4\]; expected \[1, 128, D\]"):
        hidden_sums_by_slot(jnp.zeros((1, 7, 4)), batch)
    with pytest.raises(ValueError, match=r"dense_hidden_sums: response_mask has dtype float32; expected bool"):
        dense_hidden_sums(jnp.zeros((1, 3, 4)), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"dense_hidden_sums: response_mask has shape \[3\] and hidden \[1, 3, 4\]"):
        dense_hidden_sums(jnp.zeros((1, 3, 4)), jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"dense_hidden_sums: hidden has shape \[1, 3, 4\] and response_mask \[1, 5\]"):
        dense_hidden_sums(jnp.zeros((1, 3, 4)), jnp.ones((1, 5), bool))


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(module)
    assert result.attempted > 10 and not result.failed
