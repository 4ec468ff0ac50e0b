"""Sampling with a cache against full recomputation, and the rules by which tokens are drawn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.data.tokenize import TokenTree
from palign.eval.per_target import per_target
from palign.eval.score import as_dataset, sequence_logps
from palign.generate.sample import (
    DRAW_BLOCK,
    Samples,
    _find,
    cut_logits,
    draw_tokens,
    make_sampler,
    pick_tokens,
)
from palign.heads.target_values import target_values
from palign.heads.targets import PADDED_LOGIT, Tower
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from tests.trees import TINY, VOCAB

LENGTHS = (5, 1, 9, 3)
SAMPLES, NEW = 3, 12
EOS = 27


@functools.cache
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(8, VOCAB, size=n, dtype=np.int32) for n in LENGTHS]


@functools.cache
def padded():
    token = np.full((len(LENGTHS), 16), 3, np.int32)  # what stands behind a prompt's end must not matter
    for row, ids in enumerate(prompts()):
        token[row, : ids.size] = ids
    return jnp.asarray(token), jnp.asarray(LENGTHS, jnp.int32)


@functools.cache
def model():
    """A model with a window whose next token depends on all that it sees, and its parameters."""
    lm = make_language_model(dataclasses.replace(TINY, tie_embedding=False, windows=(4, 0)))
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    return lm, jax.tree.map(lambda s: jnp.asarray(0.1 + 0.6 * rng.normal(size=s.shape), s.dtype), shapes)


@functools.cache
def loud_padding():
    """Parameters whose padded vocabulary has by far the largest logits, were it not masked."""
    params = model()[1]
    kernel = params["unembedding"]
    direction = 1000 * jax.random.normal(jax.random.key(5), (kernel.shape[0], 1))
    signs = jnp.where(jnp.arange(kernel.shape[1] - VOCAB) % 2 == 0, 1.0, -1.0)[None]
    return params | {"unembedding": kernel.at[:, VOCAB:].set(direction * signs)}


@functools.cache
def sampler(**settings):
    return make_sampler(model()[0], **{"samples": SAMPLES, "max_new_tokens": NEW, "eos_ids": (EOS,), **settings})


@functools.cache
def drawn(seed: int = 0, **settings) -> Samples:
    return jax.device_get(sampler(**settings)(loud_padding(), *padded(), jax.random.key(seed)))


@functools.cache
def mesh():
    return make_mesh(data=1, devices=jax.devices()[:1])


def dataset(samples: Samples):
    """The ids as they were drawn, as trees."""
    trees = [
        TokenTree(ids, tuple(t[:n] for t, n in zip(samples.token[i], samples.length[i], strict=True)), (0.0,) * k, i)
        for i, ids in enumerate(prompts())
        for k in (samples.token.shape[1],)
    ]
    return as_dataset(trees, row_length=64, rows_per_step=4, block=16)


def most_likely(samples: Samples) -> list[tuple[np.ndarray, ...]]:
    """At every drawn token, what a forward over prompt and sample, without a cache, finds most likely."""
    lm = model()[0]

    def argmax(params, batch):
        tower = Tower(lm.hidden(params, batch), lm.unembed(params))
        return target_values(lambda _, logits: jnp.argmax(logits, axis=-1).astype(jnp.float32), (tower,), batch)

    return per_target(dataset(samples), argmax, loud_padding(), mesh())


def test_greedy_decoding_takes_the_argmax_of_a_full_forward_at_every_step():
    samples = drawn(samples=1, temperature=0.0)
    for row, tree in enumerate(most_likely(samples)):
        np.testing.assert_array_equal(samples.token[row, 0, : samples.length[row, 0]], tree[0])
    assert len({tuple(row[0]) for row in samples.token}) == len(LENGTHS)  # the prompts matter


def test_log_probabilities_of_samples_equal_a_full_recomputation_with_eos_included():
    samples = drawn()
    recomputed = np.stack(sequence_logps(model()[0], loud_padding(), dataset(samples), mesh()))
    np.testing.assert_allclose(samples.logps, recomputed, rtol=1e-5, atol=1e-5)
    assert samples.finished.any()
    longer = samples.finished & (samples.length > 1)
    without_end = samples._replace(length=samples.length - longer)
    shorter = np.stack(sequence_logps(model()[0], loud_padding(), dataset(without_end), mesh()))
    assert longer.any() and (shorter - samples.logps)[longer].min() > 1e-4


def test_the_samples_of_a_prompt_differ_and_the_log_probabilities_are_those_of_the_model_at_any_temperature():
    samples = drawn(temperature=1.7, top_k=5)
    longer = [[tuple(ids) for ids in row[row[:, 3] > 0]] for row in samples.token]  # short ones are alike by chance
    assert sum(map(len, longer)) > 8 and all(len(set(row)) == len(row) for row in longer)
    recomputed = np.stack(sequence_logps(model()[0], loud_padding(), dataset(samples), mesh()))
    np.testing.assert_allclose(samples.logps, recomputed, rtol=1e-5, atol=1e-5)


def test_a_sample_ends_with_its_first_eos_and_holds_zeros_after_it():
    samples = drawn()
    ends = samples.token == EOS
    np.testing.assert_array_equal(ends.any(-1), samples.finished)
    assert samples.finished.any() and not samples.finished.all()
    expected = np.where(samples.finished, ends.argmax(-1) + 1, NEW)
    np.testing.assert_array_equal(samples.length, expected)
    assert np.unique(expected).size > 2
    after = np.arange(NEW) >= samples.length[..., None]
    assert after.any() and not samples.token[after].any()


def test_padding_of_the_vocabulary_is_never_drawn_however_large_its_logits_are():
    lm, quiet = model()
    hidden, _ = lm.prefill(loud_padding(), *padded(), samples=1, capacity=1)
    unmasked = hidden @ lm.unembed(loud_padding()).kernel
    assert (unmasked.argmax(-1) >= VOCAB).all()
    for samples in (drawn(), drawn(samples=1, temperature=0.0), drawn(temperature=1.7, top_k=5)):
        assert samples.token.max() < VOCAB
    other = jax.device_get(sampler()(quiet, *padded(), jax.random.key(0)))
    np.testing.assert_array_equal(other.token, drawn().token)


def test_what_stands_behind_a_prompt_does_not_matter():
    token, length = padded()
    other = jnp.where(jnp.arange(token.shape[1])[None] < length[:, None], token, 11)
    samples = jax.device_get(sampler()(loud_padding(), other, length, jax.random.key(0)))
    np.testing.assert_array_equal(samples.token, drawn().token)


def test_one_seed_gives_one_set_of_samples():
    again = jax.device_get(sampler()(loud_padding(), *padded(), jax.random.key(0)))
    for first, second in zip(drawn(), again, strict=True):
        np.testing.assert_array_equal(first, second)
    assert (drawn(seed=1).token != drawn().token).any()


def test_prompts_are_read_once_however_many_samples_continue_them_and_nothing_is_compiled_again():
    lm, params = model()
    read = []

    def prefill(params, token, *rest, **sizes):
        read.append(token.shape)
        return lm.prefill(params, token, *rest, **sizes)

    sample = make_sampler(lm._replace(prefill=prefill), samples=SAMPLES, max_new_tokens=2, eos_ids=(EOS,))
    token, length = padded()
    sample(params, token, length, jax.random.key(0))
    sample(params, token + 1, length - 1, jax.random.key(1))
    assert read == [token.shape] and sample._cache_size() == 1  # traced once: a batch has a row a prompt


def test_the_log_probability_of_a_draw_is_how_often_it_is_drawn():
    token, length = (jnp.repeat(x[:1], 1, axis=0) for x in padded())
    many = jax.device_get(sampler(samples=4000, max_new_tokens=1)(loud_padding(), token, length, jax.random.key(2)))
    ids, first, counts = np.unique(many.token[0, :, 0], return_index=True, return_counts=True)
    probability = np.exp(many.logps[0, first])
    error = np.sqrt(probability * (1 - probability) / 4000)
    assert ids.size > 3 and (np.abs(counts / 4000 - probability) < 4.5 * error).all()


def test_draws_over_several_blocks_are_as_frequent_as_probable_and_never_of_what_is_masked():
    rng, size, number = np.random.default_rng(0), 2 * DRAW_BLOCK + 44, 100_000
    logits = np.where(np.arange(size) % 3 == 0, PADDED_LOGIT, 2 * rng.normal(size=size)).astype(np.float32)
    logits[DRAW_BLOCK : DRAW_BLOCK + 60] = PADDED_LOGIT
    ids = jax.jit(draw_tokens)(jnp.broadcast_to(jnp.asarray(logits), (number, size)), jax.random.key(0))
    probability = np.exp(logits - logits.max(), dtype=np.float64)
    probability /= probability.sum()
    counts, error = np.bincount(ids, minlength=size), np.sqrt(number * probability * (1 - probability))
    assert counts[logits == PADDED_LOGIT].sum() == 0
    assert (np.abs(counts - number * probability) < 4.5 * error + 1).all()


@pytest.mark.parametrize(("place", "found"), [(0.0, 2), (0.49, 2), (0.5, 4), (0.99, 4), (1.0, 4), (1.1, 4)])
def test_a_place_on_an_edge_or_rounded_beyond_it_is_never_of_an_entry_without_weight(place, found):
    weight = jnp.asarray([0.0, 0.0, 0.5, 0.0, 0.5, 0.0])
    assert int(_find(weight, jnp.asarray(place))[0]) == found


def test_the_most_likely_token_is_the_first_of_the_largest():
    logits = jnp.asarray([[1.0, 3.0, 3.0, -jnp.inf], [0.0, 0.0, 0.0, 0.0], [-jnp.inf, -2.0, -3.0, -1.0]])
    ids = pick_tokens(logits, jax.random.key(0), temperature=0.0, top_k=0, top_p=1.0)
    np.testing.assert_array_equal(ids, np.argmax(logits, axis=-1))


def test_top_k_and_top_p_draw_from_what_they_leave_in_and_from_all_of_it():
    logits = jnp.log(jnp.asarray([0.1, 0.4, 0.05, 0.3, 0.15]))
    rows = jnp.broadcast_to(logits, (2000, 5))
    for cut, kept in (
        (dict(top_k=1, top_p=1.0), {1}),
        (dict(top_k=3, top_p=1.0), {1, 3, 4}),
        (dict(top_k=0, top_p=0.6), {1, 3}),
        (dict(top_k=3, top_p=0.6), {1, 3}),
        (dict(top_k=0, top_p=1.0), {0, 1, 2, 3, 4}),
    ):
        ids = pick_tokens(rows, jax.random.key(0), temperature=1.0, **cut)
        assert set(np.asarray(ids).tolist()) == kept


@pytest.mark.parametrize(
    ("probabilities", "cut", "kept"),
    [
        ([0.5, 0.3, 0.2], dict(top_k=2, top_p=1.0), [0, 1]),
        ([0.2, 0.5, 0.3], dict(top_k=0, top_p=0.5), [1]),  # the first alone reaches one half
        ([0.2, 0.5, 0.3], dict(top_k=0, top_p=0.51), [1, 2]),
        ([0.2, 0.5, 0.3], dict(top_k=0, top_p=0.81), [0, 1, 2]),
        ([0.2, 0.5, 0.3], dict(top_k=0, top_p=1e-6), [1]),  # the most likely always stays
        ([0.25, 0.25, 0.25, 0.25], dict(top_k=2, top_p=1.0), [0, 1, 2, 3]),  # ties at the edge stay
        ([0.4, 0.3, 0.2, 0.1], dict(top_k=2, top_p=0.6), [0, 1]),  # of what top-k leaves, 4/7 is less than 0.6
        ([0.4, 0.3, 0.2, 0.1], dict(top_k=2, top_p=0.57), [0]),
        ([0.5, 0.5], dict(top_k=9, top_p=1.0), [0, 1]),  # more than there are
    ],
)
def test_logits_are_cut_as_computed_by_hand(probabilities, cut, kept):
    logits = jnp.log(jnp.asarray(probabilities))
    out = np.asarray(cut_logits(logits[None], **cut))[0]
    assert np.flatnonzero(out > PADDED_LOGIT).tolist() == kept
    np.testing.assert_array_equal(out[kept], np.asarray(logits)[kept])


def test_a_temperature_scales_the_log_odds():
    logits = jnp.log(jnp.asarray([0.8, 0.2]))
    rows = jnp.broadcast_to(logits, (20000, 2))
    for temperature, expected in ((0.5, 16 / 17), (1.0, 0.8), (2.0, 2 / 3), (0.0, 1.0)):
        ids = pick_tokens(rows, jax.random.key(1), temperature=temperature, top_k=0, top_p=1.0)
        assert abs(float(jnp.mean(ids == 0)) - expected) < 4.5 * np.sqrt(0.25 / 20000)
        assert (float(jnp.mean(ids == 0)) == 1.0) == (temperature == 0.0)


@pytest.mark.parametrize(
    "setting",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_p=float("nan")),
        dict(samples=0),
        dict(max_new_tokens=0),
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} = .*: expected"):
        make_sampler(model()[0], **{"samples": 1, "max_new_tokens": 1, "eos_ids": (0,), **setting})
