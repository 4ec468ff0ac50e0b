"""Scores of given responses against a dense computation, one response at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.eval.per_target import per_target
from palign.eval.score import as_dataset, ranked_right, sequence_kl, sequence_logps
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from tests.trees import TINY, VOCAB, make_batch, random_trees


@functools.cache
def model():
    """An untied model with a window, and two sets of its parameters."""
    lm = make_language_model(dataclasses.replace(TINY, tie_embedding=False, windows=(4, 0), final_softcap=8.0))
    shapes = jax.eval_shape(lm.init, jax.random.key(0))

    def draw(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda s: jnp.asarray(0.1 + 0.6 * rng.normal(size=s.shape), s.dtype), shapes)

    return lm, draw(0), draw(1)


@functools.cache
def mesh():
    return make_mesh(data=1, devices=jax.devices()[:1])


@functools.cache
def trees():
    return random_trees(4, 9, responses=(1, 4))


@functools.cache
def dataset():
    return as_dataset(trees(), row_length=64, rows_per_step=3, block=16)


@functools.cache
def dense():
    """Float64 log-probabilities `[n, V]` at each response's tokens: (example, response) -> of both models.

    Every response is alone with its prompt in a row of its own, and all logits are formed.
    """
    lm = model()[0]
    single = [t._replace(responses=(r,), scores=(0.0,)) for t in trees() for r in t.responses]
    batch = make_batch(single, rows=len(single), used=len(single), tokens=32, responses=1, trees_cap=1)
    keys = [(i, k) for i, t in enumerate(trees()) for k in range(len(t.responses))]

    @jax.jit
    def logits(params):
        kernel, softcap, size = lm.unembed(params)
        return (softcap * jnp.tanh((lm.hidden(params, batch) @ kernel) / softcap))[..., :size]

    tables = []
    for params in model()[1:]:
        raw = np.asarray(logits(params), np.float64)
        logps = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
        starts = [(trees()[i].prompt.size - 1, trees()[i].responses[k].size) for i, k in keys]
        tables.append({key: logps[row, a : a + n] for row, (key, (a, n)) in enumerate(zip(keys, starts, strict=True))})
    return tables


def test_log_probabilities_of_responses_are_those_of_a_dense_softmax():
    found = sequence_logps(*model()[:2], dataset(), mesh())
    assert [row.size for row in found] == [len(tree.responses) for tree in trees()]
    for (i, k), table in dense()[0].items():
        ids = trees()[i].responses[k]
        assert found[i][k] == pytest.approx(table[np.arange(ids.size), ids].sum(), rel=1e-5)


def test_the_divergence_is_the_sum_over_tokens_of_dense_kls_and_not_symmetric():
    lm, policy, reference = model()
    found = sequence_kl(lm, policy, reference, dataset(), mesh())
    backwards = sequence_kl(lm, reference, policy, dataset(), mesh())
    for key, p in dense()[0].items():
        q = dense()[1][key]
        i, k = key
        assert found[i][k] == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-4)
        assert backwards[i][k] == pytest.approx((np.exp(q) * (q - p)).sum(), rel=1e-4)
        assert found[i][k] > 0.1 and abs(found[i][k] - backwards[i][k]) > 1e-3


def test_a_model_does_not_diverge_from_itself():
    lm, policy, _ = model()
    for row in sequence_kl(lm, policy, policy, dataset(), mesh()):
        # An ulp of each of two log-partition functions: the sums are the same, the order of adding may not be.
        np.testing.assert_allclose(row, 0.0, atol=1e-6)


def test_numbers_come_back_per_token_in_the_order_of_the_examples_not_of_the_rows():
    def tokens(params, batch):
        return batch.target_token.astype(jnp.float32) + 0 * params["embedding"][0, 0]

    seen = []
    found = per_target(dataset(), tokens, model()[1], mesh(), advance=lambda done, amount: seen.append((done, amount)))
    for tree, numbers in zip(trees(), found, strict=True):
        assert len(numbers) == len(tree.responses)
        for ids, values in zip(tree.responses, numbers, strict=True):
            np.testing.assert_array_equal(ids, values)
    order = dataset().plan.members.tolist()
    assert order != sorted(order)  # the rows' order is another
    assert [done for done, _ in seen] == list(range(1, dataset().num_steps + 1))
    assert sum(amount for _, amount in seen) == sum(t.prompt.size + sum(map(len, t.responses)) for t in trees())


def test_a_ranking_compares_the_best_and_the_worst_of_examples_that_have_a_preference():
    logps = [np.asarray([-1.0, -2.0, -3.0]), np.asarray([-4.0, -5.0]), np.asarray([-6.0])]
    best, worst = ranked_right(logps, [[0.1, 0.9, 0.5], [1.0, 1.0], [2.0]])
    assert best.tolist() == [-2.0] and worst.tolist() == [-1.0]


def test_the_vocabulary_is_padded_so_that_masking_is_tested():
    assert model()[1]["unembedding"].shape[1] > VOCAB
