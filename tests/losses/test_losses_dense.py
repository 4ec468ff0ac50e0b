"""The functions of whole sequences of logits: the shift, the mask, empty responses and the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from palign import losses
from tests.oracles import dense_losses as oracle

token_logps = jax.jit(losses.dense.token_logps)
sequence_logps = jax.jit(losses.dense.sequence_logps)
average_logps = jax.jit(losses.dense.average_logps)
aligndistil = jax.jit(losses.dense.aligndistil)
sequence_kl = jax.jit(losses.dense.sequence_kl)
alignment_logps = jax.jit(losses.dense.alignment_logps)
shared_and_tail_logps = jax.jit(losses.dense.shared_and_tail_logps)
extrapolated_sequence_logps = jax.jit(losses.dense.extrapolated_sequence_logps)
SHARED = np.array([2, 1, 3, 0, 9, 1], np.int32)  # of 3, 3, 0, 6, 1 and 2 response tokens

B, T, V = 6, 7, 5
PROMPT, END = 2, 5  # in row 0 the response is ids[2:5]


def batch(seed=0):
    """Three models' logits, ids with -100 outside the responses, and masks, one of them empty."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (3, B, T, V)).astype(np.float32)
    mask = np.zeros((B, T), bool)
    for row, (first, last) in enumerate([(PROMPT, END), (4, T), (0, 0), (1, T), (3, 4), (1, 3)]):
        mask[row, first:last] = True
    ids = np.where(mask, rng.integers(0, V, (B, T)), -100).astype(np.int32)
    return logits, ids, mask


def test_token_sequence_and_average_log_probs_are_the_oracle_s(close):
    (logits, _, _), ids, mask = batch()
    expected = oracle.token_logps(logits, ids, mask)
    lengths = mask.sum(-1)
    close(token_logps(logits, ids, mask), expected)
    close(losses.dense.token_logps(logits, ids, mask), expected)
    close(sequence_logps(logits, ids, mask), expected.sum(-1))
    close(average_logps(logits, ids, mask), expected.sum(-1) / np.maximum(lengths, 1))
    with jax.enable_x64(True):
        logits = np.float64(logits)
        close(token_logps(logits, ids, mask), oracle.token_logps(logits, ids, mask), rtol=1e-12, atol=1e-12)


def test_dense_aligndistil_is_the_oracle_s(close):
    logits, _, mask = batch(1)
    options = dict(beta0=0.2, scale=10.0, epsilon=0.01)
    close(aligndistil(*logits, mask, **options), oracle.aligndistil(*logits, mask, **options))
    with jax.enable_x64(True):
        logits = np.float64(logits)
        close(
            aligndistil(*logits, mask, **options), oracle.aligndistil(*logits, mask, **options), rtol=1e-11, atol=1e-12
        )


def test_two_derivatives_agree_with_finite_differences():
    with jax.enable_x64(True):
        logits, ids, mask = batch(2)
        student = np.float64(logits[0, :3])
        check_grads(lambda z: average_logps(z, ids[:3], mask[:3]), (student,), order=2, modes=("fwd", "rev"))


def test_the_position_before_the_first_response_token_counts_and_that_of_the_last_does_not(value_and_gradient):
    logits, ids, mask = batch(3)
    for loss, arrays in (
        (sequence_logps, (logits[0], ids, mask)),
        (average_logps, (logits[0], ids, mask)),
        (aligndistil, (*logits, mask)),
        (sequence_kl, (*logits[:2], mask)),
        (alignment_logps, (logits[0], ids, mask)),
    ):
        _, gradient = value_and_gradient(loss, *arrays)
        depends = np.abs(gradient[0]).sum(-1) > 0
        # The index prompt_len - 1 is in, the index of the last real token is out.
        np.testing.assert_array_equal(np.flatnonzero(depends), np.arange(PROMPT - 1, END - 1))
        np.testing.assert_array_equal(np.abs(gradient).sum(-1)[:, :-1] > 0, mask[:, 1:])


def test_log_probs_stand_under_their_token():
    (logits, _, _), ids, mask = batch(4)
    out = np.asarray(token_logps(logits, ids, mask))
    # Row 3 is all response but for its first token, which nothing predicts in any case.
    np.testing.assert_array_equal(out != 0, mask)
    whole_row = np.asarray(token_logps(logits, np.maximum(ids, 0), np.ones_like(mask)))
    assert not whole_row[:, 0].any() and whole_row[:, 1:].all()
    first, last = out[0, PROMPT], out[0, END - 1]
    np.testing.assert_allclose(first, jax.nn.log_softmax(logits[0, PROMPT - 1])[ids[0, PROMPT]], rtol=1e-6)
    np.testing.assert_allclose(last, jax.nn.log_softmax(logits[0, END - 2])[ids[0, END - 1]], rtol=1e-6)


def test_what_lies_outside_the_response_is_never_read(value_and_gradient, close):
    logits, ids, mask = batch(5)
    keep = np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    spoiled = np.where(keep[None, ..., None], logits, np.nan)
    spoiled[:, :, -1] = np.inf
    for loss, clean, dirty in (
        (average_logps, (logits[0], ids, mask), (spoiled[0], ids, mask)),
        (aligndistil, (*logits, mask), (*spoiled, mask)),
        (sequence_kl, (*logits[:2], mask), (*spoiled[:2], mask)),
        (alignment_logps, (logits[0], ids, mask), (spoiled[0], ids, mask)),
        (extrapolated_sequence_logps, (*logits[:2], ids, mask), (*spoiled[:2], ids, mask)),
    ):
        expected, expected_gradient = value_and_gradient(loss, *clean)
        value, gradient = value_and_gradient(loss, *dirty)
        close(value, np.float64(expected))
        close(gradient, np.float64(expected_gradient))
        # Row 2 has an empty response.
        assert value[2] == 0 and not gradient[2].any() and not gradient[~keep].any()


def test_padding_on_either_side_and_a_longer_row_change_nothing(close):
    logits, ids, mask = batch(6)
    for before, after in ((3, 0), (0, 2)):
        wide = np.pad(logits, ((0, 0), (0, 0), (before, after), (0, 0)), constant_values=9.0)
        wide_ids, wide_mask = (np.pad(array, ((0, 0), (before, after))) for array in (ids, mask))
        close(sequence_logps(wide[0], wide_ids, wide_mask), np.float64(sequence_logps(logits[0], ids, mask)))
        close(aligndistil(*wide, wide_mask), np.float64(aligndistil(*logits, mask)))


def test_a_row_of_one_token_has_nothing_to_predict():
    logits, ids, mask = jnp.zeros((2, 1, V)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), bool)
    assert not token_logps(logits, ids, mask).any()
    assert not average_logps(logits, ids, mask).any()
    assert not aligndistil(logits, logits, logits, mask).any()
    assert not sequence_kl(logits, logits + 1.0, mask).any()
    assert not alignment_logps(logits, ids, mask).any()
    assert not np.any(shared_and_tail_logps(logits, ids, mask, jnp.ones(2, jnp.int32)))
    assert not extrapolated_sequence_logps(logits, logits, ids, mask).any()


def test_excluded_tokens_and_bf16(value_and_gradient, close):
    (logits, _, _), ids, mask = batch(7)
    padded = np.pad(logits, ((0, 0), (0, 0), (0, 3)), constant_values=-np.inf)
    close(sequence_logps(padded, ids, mask), np.float64(sequence_logps(logits, ids, mask)))
    _, gradient = value_and_gradient(sequence_logps, padded, ids, mask)
    assert np.isfinite(gradient).all() and not gradient[..., V:].any()
    rounded = jnp.asarray(logits, jnp.bfloat16)
    actual = token_logps(rounded, ids, mask)
    assert actual.dtype == jnp.float32
    close(actual, oracle.token_logps(np.asarray(rounded, np.float64), ids, mask))


def test_ids_outside_the_vocabulary_show_as_nan_under_the_mask_only():
    (logits, _, _), ids, mask = batch(8)
    for wrong in (-1, -100, V, V + 7):
        broken = ids.copy()
        broken[0, PROMPT] = wrong
        out = np.asarray(token_logps(logits, broken, mask))
        assert np.isnan(out[0, PROMPT]) and np.isnan(out).sum() == 1


def test_wrong_arguments_are_answered_with_their_name():
    (logits, _, _), ids, mask = batch()
    with pytest.raises(ValueError, match="token_logps: response_mask has dtype int32; expected bool"):
        losses.dense.token_logps(logits, ids, mask.astype(np.int32))
    with pytest.raises(ValueError, match=r"token_logps: logits has shape \[6, 6, 5\].*not shifted"):
        losses.dense.token_logps(logits[:, :-1], ids, mask)
    with pytest.raises(ValueError, match=r"token_logps: .*ids \[6, 6\]"):
        losses.dense.token_logps(logits, ids[:, 1:], mask)
    with pytest.raises(ValueError, match=r"dense.aligndistil: dpo_logits has shape"):
        losses.dense.aligndistil(logits, logits[:3], logits, mask)
    with pytest.raises(ValueError, match=r"response_mask has shape \[6\]"):
        losses.dense.sequence_logps(logits, ids, mask[:, 0])
    with pytest.raises(ValueError, match=r"sequence_kl: ref_logits has shape \[6, 6, 5\].*not shifted"):
        losses.dense.sequence_kl(logits, logits[:, 1:], mask)
    with pytest.raises(ValueError, match="sequence_kl: response_mask has dtype int32; expected bool"):
        losses.dense.sequence_kl(logits, logits, mask.astype(np.int32))
    with pytest.raises(ValueError, match=r"alignment_logps: .*ids \[6, 6\]"):
        losses.dense.alignment_logps(logits, ids[:, 1:], mask)
    with pytest.raises(ValueError, match=r"shared_and_tail_logps: .*ids \[6, 6\]"):
        losses.dense.shared_and_tail_logps(logits, ids[:, 1:], mask, SHARED)
    with pytest.raises(ValueError, match=r"shared_and_tail_logps: shared_lengths has shape \[5\]"):
        losses.dense.shared_and_tail_logps(logits, ids, mask, SHARED[1:])
    with pytest.raises(ValueError, match=r"extrapolated_sequence_logps: .*ref_logits \[6, 7, 4\]"):
        losses.dense.extrapolated_sequence_logps(logits, logits[..., 1:], ids, mask)
    with pytest.raises(ValueError, match=r"extrapolated_sequence_logps: .*ids \[6, 6\]"):
        losses.dense.extrapolated_sequence_logps(logits, logits, ids[:, 1:], mask)
    with pytest.raises(ValueError, match=r"extrapolated_sequence_logps: weight is 0\.0"):
        losses.dense.extrapolated_sequence_logps(logits, logits, ids, mask, weight=0.0)


def shaped(arrays, ids, mask):
    """The four functions with their oracles' values, on the same arrays."""
    policy, reference = arrays
    yield sequence_kl(policy, reference, mask), oracle.sequence_kl(policy, reference, mask)
    yield alignment_logps(policy, ids, mask), oracle.alignment_logps(policy, ids, mask)
    parts = shared_and_tail_logps(policy, ids, mask, SHARED)
    yield from zip(parts, oracle.shared_and_tail_logps(policy, ids, mask, SHARED), strict=True)
    for weight in (0.6, 1.5):
        mixed = extrapolated_sequence_logps(policy, reference, ids, mask, weight=weight)
        yield mixed, oracle.extrapolated_sequence_logps(policy, reference, ids, mask, weight)


def test_what_tdpo_wpo_ld_dpo_and_spa_take_is_the_oracle_s(close):
    logits, ids, mask = batch(9)
    for actual, expected in shaped(logits[:2], ids, mask):
        assert actual.dtype == jnp.float32
        close(actual, expected, rtol=2e-6, atol=2e-6)
    with jax.enable_x64(True):
        for actual, expected in shaped(np.float64(logits[:2]), ids, mask):
            assert actual.dtype == jnp.float64
            close(actual, expected, rtol=1e-11, atol=1e-12)


def test_their_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        logits, ids, mask = batch(10)
        policy, reference = np.float64(logits[:2, :3])
        for total in (
            lambda z: losses.dense.sequence_kl(z, reference, mask[:3]),
            lambda z: losses.dense.alignment_logps(z, ids[:3], mask[:3]),
            lambda z: losses.dense.shared_and_tail_logps(z, ids[:3], mask[:3], SHARED[:3]),
        ):
            check_grads(jax.jit(total), (policy,), order=1, modes=("rev",))


def test_the_divergence_of_a_policy_from_itself_is_zero_and_at_its_minimum(value_and_gradient, close):
    (logits, other, _), _, mask = batch(11)
    value, gradient = value_and_gradient(sequence_kl, logits, logits, mask)
    close(value, np.zeros(B))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    # Only the policy learns, and constants added to a position's logits change nothing.
    assert not jax.grad(lambda z: sequence_kl(logits, z, mask).sum())(other).any()
    close(sequence_kl(logits + 3.0, other, mask), np.float64(sequence_kl(logits, other, mask)), rtol=1e-5)


def test_tdpo_of_whole_sequences_starts_at_log_2_with_dpo_s_gradient(close):
    (logits, _, _), ids, mask = batch(12)
    pairs = lambda values: jnp.stack([values[: B // 2], values[B // 2 :]], axis=1)
    reference = pairs(sequence_logps(logits, ids, mask))

    def total(loss, z):
        policy, divergence = pairs(sequence_logps(z, ids, mask)), pairs(sequence_kl(z, logits, mask))
        return loss(policy, reference, divergence).sum()

    slopes = {}
    for name, loss in {"dpo": lambda p, r, _: losses.dpo(p, r), "1": losses.tdpo1, "2": losses.tdpo2}.items():
        value, slopes[name] = jax.value_and_grad(lambda z, loss=loss: total(loss, z))(logits)
        close(value, B / 2 * np.log(2.0))
    # The divergences have their minimum where the policy is the reference.
    close(slopes["1"], np.float64(slopes["dpo"]))
    close(slopes["2"], np.float64(slopes["dpo"]))


def test_uniform_tokens_are_as_likely_as_sampled_ones_and_the_likeliest_ones_likelier(close):
    (logits, _, _), _, mask = batch(13)
    greedy = np.zeros((B, T), np.int32)
    greedy[:, 1:] = logits.argmax(-1)[:, :-1]
    full = mask.any(-1)
    assert (np.asarray(alignment_logps(logits, greedy, mask)) > 0)[full].all()
    close(alignment_logps(np.ones_like(logits), greedy, mask), np.zeros(B))
    close(alignment_logps(logits + 50.0, greedy, mask), np.float64(alignment_logps(logits, greedy, mask)), rtol=1e-4)


def test_shared_and_tail_add_up_and_the_shared_length_bounds_the_first(close):
    (logits, _, _), ids, mask = batch(14)
    whole = np.float64(sequence_logps(logits, ids, mask))
    shared, tail = shared_and_tail_logps(logits, ids, mask, SHARED)
    close(shared + tail, whole)
    assert (np.asarray(tail) == 0).tolist() == (SHARED >= mask[:, 1:].sum(-1)).tolist()
    everything = mask.sum(-1).astype(np.int32)
    shared, tail = shared_and_tail_logps(logits, ids, mask, everything)
    close(shared, whole)
    assert not tail.any()
    shared, tail = shared_and_tail_logps(logits, ids, mask, np.zeros(B, np.float32))
    close(tail, whole)
    assert not shared.any()


def test_shared_lengths_of_a_narrow_type_count_long_responses_too(close):
    logits, ids, mask = np.zeros((1, 202, 2), np.float32), np.zeros((1, 202), np.int32), np.ones((1, 202), bool)
    parts = shared_and_tail_logps(logits, ids, mask, np.array([100], np.int8))
    # 201 tokens of probability 1/2.
    close(np.concatenate(parts), np.array([-100 * np.log(2.0), -101 * np.log(2.0)]))


def test_extrapolation_runs_from_the_reference_through_the_policy_as_aligndistil_s_teacher(close):
    (logits, other, _), ids, mask = batch(15)
    own = np.float64(sequence_logps(logits, ids, mask))
    close(extrapolated_sequence_logps(logits, other, ids, mask), own, rtol=1e-5)
    close(extrapolated_sequence_logps(logits, logits, ids, mask, weight=3.0), own, rtol=1e-5)
    close(
        extrapolated_sequence_logps(logits, other, ids, mask, weight=1e-7),
        np.float64(sequence_logps(other, ids, mask)),
        rtol=1e-5,
    )
    teacher = losses.theorem1_teacher(logits, other, ratio=1.5).logits
    mixed = extrapolated_sequence_logps(logits, other, ids, mask, weight=1.5)
    close(mixed, np.float64(sequence_logps(teacher, ids, mask)))
    for position in (0, 1):
        slopes = jax.grad(lambda *z: extrapolated_sequence_logps(*z, ids, mask).sum(), argnums=position)(logits, other)
        assert not slopes.any()


def test_excluded_tokens_cost_tdpo_wpo_and_spa_nothing(value_and_gradient, close):
    logits, ids, mask = batch(16)
    padded = np.pad(logits, ((0, 0), (0, 0), (0, 0), (0, 3)), constant_values=-np.inf)
    for loss, plain, wide in (
        (sequence_kl, (*logits[:2], mask), (*padded[:2], mask)),
        (alignment_logps, (logits[0], ids, mask), (padded[0], ids, mask)),
        (extrapolated_sequence_logps, (*logits[:2], ids, mask), (*padded[:2], ids, mask)),
    ):
        value, slopes = value_and_gradient(loss, *wide)
        close(value, np.float64(loss(*plain)), rtol=1e-5)
        assert np.isfinite(slopes).all() and not slopes[..., V:].any()
