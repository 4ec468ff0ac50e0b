"""The chunked heads against logits that are all there at once, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from palign.heads import target_values as target_values_module
from palign.heads import targets
from palign.heads import weighted_sum as weighted_sum_module
from palign.heads.target_values import logp_at_targets, target_logps, target_values, token_values, values_at_targets
from palign.heads.targets import PADDED_LOGIT, Tower
from palign.heads.weighted_sum import weighted_sum
from palign.sharding.mesh import make_mesh, row_sharding
from palign.types import Unembedding
from tests.compiled import largest_buffer, uncached
from tests.trees import VOCAB, largest_difference, make_batch, random_trees

R, T, D, PADDED = 8, 128, 16, 64
CHUNKS = (1, 7, 64, 2000)  # with 8 * 128 targets at most; 7 divides nothing
FUNCTIONS = {
    "logp": (1, logp_at_targets),
    "logp and entropy": (1, lambda token, z: (logp_at_targets(token, z), _entropy(z))),
    "reverse_kl": (2, lambda token, z, t: losses.reverse_kl(z, t)),
    "generalised_jsd": (2, lambda token, z, t: losses.generalised_jsd(z, t, beta=0.3)),
    "aligndistil": (3, lambda token, z, t, r: losses.aligndistil(z, t, r)),
}


def _entropy(logits):
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(log_p > -1e20, jnp.exp(log_p) * log_p, 0.0), axis=-1)


@functools.cache
def batch():
    with jax.ensure_compile_time_eval():  # it may be asked for first while something is traced
        return make_batch(random_trees(0, 20), rows=R, used=R - 1, tokens=T)  # the last row is empty


@functools.cache
def arrays(num_towers=3):
    """Hidden states and kernels of several towers, and a cotangent."""
    rng = np.random.default_rng(num_towers)
    hidden = tuple(jnp.asarray(rng.normal(size=(R, T, D)), jnp.float32) for _ in range(num_towers))
    kernels = tuple(jnp.asarray(rng.normal(size=(D, PADDED)), jnp.float32) for _ in range(num_towers))
    return hidden, kernels, jnp.asarray(rng.normal(size=(R, T)), jnp.float32)


def towers_of(hidden, kernels, softcap=5.0):
    return tuple(
        Tower(x, Unembedding(w, cap, VOCAB)) for x, w, cap in zip(hidden, kernels, (softcap, None, 3.0), strict=False)
    )


def dense_values(function, hidden, kernels, batch, softcap=5.0):
    """The same by a `[R, M, V]` array, padded vocabulary cut off instead of masked."""

    def logits(x, w, cap):
        z = jnp.take_along_axis(x, batch.target_source[..., None], axis=1) @ w
        return (z if cap is None else cap * jnp.tanh(z / cap))[..., :VOCAB].reshape(R * T, VOCAB)

    frozen = [jax.lax.stop_gradient(a) for a in (hidden[1:], kernels[1:])]
    towers = zip((hidden[0], *frozen[0]), (kernels[0], *frozen[1]), (softcap, None, 3.0), strict=False)
    values = function(batch.target_token.reshape(-1), *(logits(*tower) for tower in towers))
    return jax.tree.map(lambda v: jnp.where(batch.target_slot > 0, v.reshape(R, T), 0.0), values)


def pull(function, *primals):
    """`cotangent -> (values, gradients)`, jitted."""

    def both(cotangent, *primals):
        values, pull_back = jax.vjp(function, *primals)
        return values, pull_back(jax.tree.map(lambda v: cotangent.astype(v.dtype), values))

    return jax.jit(both)


@functools.cache
def oracle(name):
    num, function = FUNCTIONS[name]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays(3))
        hidden, kernels, cotangent = (*(x[:num] for x in wide[:2]), wide[2])
        dense = pull(lambda x, w: dense_values(function, x, w, batch()))
        return jax.tree.map(lambda x: np.asarray(x, np.float32), dense(cotangent, hidden, kernels))


def test_several_branches_start_from_one_source():
    """A prompt's last token predicts every branch: what the equalities below must see several times in one chunk."""
    sources = np.where(batch().target_slot > 0, batch().target_source, -np.arange(1, T + 1))
    shared = [np.unique(row, return_counts=True)[1].max() for row in sources]
    assert max(shared) >= 7


@pytest.mark.parametrize(("name", "chunk"), [("logp", c) for c in CHUNKS] + [(n, 7) for n in FUNCTIONS if n != "logp"])
def test_target_values_equal_dense_logits_for_any_cotangent(name, chunk):
    num, function = FUNCTIONS[name]
    hidden, kernels, cotangent = arrays(3)
    head = pull(lambda x, w: target_values(function, towers_of(x, w), batch(), chunk=chunk))
    values, gradients = head(cotangent, hidden[:num], kernels[:num])
    expected_values, expected = oracle(name)
    assert largest_difference(values, expected_values) < 2e-6
    assert largest_difference([x[0] for x in gradients], [x[0] for x in expected]) < 1e-5
    for frozen in jax.tree.leaves([x[1:] for x in gradients]):
        assert (np.asarray(frozen) == 0).all()


@pytest.mark.parametrize(("name", "chunk"), [("reverse_kl", c) for c in CHUNKS] + [("logp", 7), ("aligndistil", 7)])
def test_weighted_sums_equal_dense_logits(name, chunk):
    num, function = FUNCTIONS[name]
    hidden, kernels, weights = arrays(3)

    def reported(token, *logits):
        return function(token, *logits), {"values": values_at_targets(token, logits[0])}

    @jax.jit
    def run(hidden, kernels, weights):
        def total(x, w):
            total, (values, more) = weighted_sum(reported, weights, towers_of(x, w), batch(), chunk=chunk)
            return 3.0 * total, (values, more["values"].logps)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, kernels)

    (total, (values, logps)), gradients = run(hidden[:num], kernels[:num], weights)
    expected_values, expected = oracle(name)
    np.testing.assert_allclose(total, 3.0 * np.sum(np.asarray(weights, np.float64) * expected_values), rtol=1e-5)
    assert largest_difference(values, expected_values) < 2e-6
    assert largest_difference(logps, oracle("logp")[0]) < 2e-6
    assert largest_difference([x[0] for x in gradients], [3.0 * x[0] for x in expected]) < 1e-5
    for frozen in jax.tree.leaves([x[1:] for x in gradients]):
        assert (np.asarray(frozen) == 0).all()


@functools.cache
def compiled_logps():
    """`(cotangent, batch, hidden, kernel) -> (token values, gradients of the log-probabilities)`."""

    def both(cotangent, batch, hidden, kernel):
        values, pull_back = jax.vjp(
            lambda x, w: token_values(x, Unembedding(w, None, VOCAB), batch, chunk=32), hidden, kernel
        )
        return values, pull_back(values._replace(logps=cotangent, entropy=cotangent, correct=cotangent))

    return jax.jit(both)


def test_token_values_report_entropy_and_hits_without_gradient():
    (hidden, *_), (kernel, *_), cotangent = arrays(3)
    values, gradients = compiled_logps()(cotangent, batch(), hidden, kernel)
    logits = np.take_along_axis(np.asarray(hidden, np.float64), np.asarray(batch().target_source)[..., None], axis=1)
    logits = (logits @ np.asarray(kernel, np.float64))[..., :VOCAB]
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    listed = np.asarray(batch().target_slot) > 0
    np.testing.assert_allclose(values.entropy, np.where(listed, -(p * np.log(p)).sum(-1), 0), atol=5e-6)
    hit = listed & (p.argmax(-1) == np.asarray(batch().target_token))
    np.testing.assert_array_equal(values.correct, hit)
    assert 0 < hit.sum() < listed.sum()
    # The cotangents of entropy and hits were not zero, and changed nothing.
    only_logps = jax.jit(
        lambda x, w: jax.vjp(lambda x, w: target_logps(x, Unembedding(w, None, VOCAB), batch(), chunk=32), x, w)[1](
            cotangent
        )
    )(hidden, kernel)
    assert largest_difference(gradients, only_logps) < 1e-6


def test_entropy_and_hits_hold_for_peaked_padded_and_level_logits():
    token, logits = np.array([3, 0, 5, 2]), np.random.default_rng(0).normal(size=(4, 8)) * 300
    logits[2:] = 7.0  # no token is likelier than another
    logits[:, 6:] = PADDED_LOGIT
    found = values_at_targets(jnp.asarray(token), jnp.asarray(logits, jnp.float32))
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    np.testing.assert_allclose(found.logps, log_p[range(4), token], rtol=1e-6)
    np.testing.assert_allclose(found.entropy, -(np.exp(log_p) * log_p).sum(1), atol=1e-6)
    np.testing.assert_array_equal(found.correct, logits[range(4), token] == logits.max(1))
    assert found.correct[2:].all()


def test_padding_targets_contribute_exactly_nothing():
    (hidden, *_), (kernel, *_), cotangent = arrays(3)
    clean = batch()
    padding = clean.target_slot == 0
    rng = np.random.default_rng(0)
    dirty = clean._replace(
        target_source=jnp.where(padding, rng.integers(0, T, (R, T)), clean.target_source),
        target_token=jnp.where(padding, rng.integers(0, VOCAB, (R, T)), clean.target_token),
    )
    expected = compiled_logps()(cotangent, clean, hidden, kernel)
    got = compiled_logps()(jnp.where(padding, jnp.nan, cotangent), dirty, hidden, kernel)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert (np.asarray(expected[0].logps)[np.asarray(padding)] == 0).all()
    assert (np.asarray(expected[1][0])[-1] == 0).all()  # the empty row


def test_padded_ids_have_no_probability_and_no_gradient():
    (hidden, *_), (kernel, *_), cotangent = arrays(3)
    loud = kernel.at[:, VOCAB:].set(100.0)  # logits of a padded id that would win
    expected, (_, gradient) = compiled_logps()(cotangent, batch(), hidden, kernel)
    got, (_, loud_gradient) = compiled_logps()(cotangent, batch(), hidden, loud)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    np.testing.assert_array_equal(loud_gradient, gradient)
    assert (np.asarray(gradient)[:, VOCAB:] == 0).all() and (np.asarray(gradient)[:, :VOCAB] != 0).any()
    probabilities = jax.nn.softmax(targets.finish_logits(hidden[0] @ loud, None, VOCAB))
    assert (np.asarray(probabilities)[:, VOCAB:] == 0).all()


def test_towers_of_different_vocabularies_are_an_error():
    hidden, kernels, _ = arrays(3)
    sizes = (VOCAB, VOCAB - 1)
    towers = tuple(Tower(x, Unembedding(w, None, size)) for x, w, size in zip(hidden, kernels, sizes, strict=False))
    with pytest.raises(ValueError, match=r"heads: models with vocabularies of \[49, 50\] tokens"):
        target_values(FUNCTIONS["reverse_kl"][1], towers, batch())


def test_bfloat16_kernels_keep_float32_log_probabilities_and_sums():
    """512 targets of one source: sums kept in bfloat16 would stop growing after a few hundred equal terms."""
    (hidden, *_), (kernel, *_), _ = arrays(3)
    one = batch()._replace(target_source=jnp.zeros((R, T), jnp.int32), target_token=jnp.full((R, T), 7, jnp.int32))
    one = one._replace(target_slot=jnp.ones((R, T), jnp.int32))
    low = (hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    head = lambda x, w: target_logps(x, Unembedding(w, None, VOCAB), one, chunk=4)
    values, gradients = pull(head)(jnp.ones((R, T)), *low)
    assert values.dtype == jnp.float32 and {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
    wide = [x.astype(jnp.float32) for x in low]
    dense = lambda x, w: dense_values(logp_at_targets, (x,), (w,), one, softcap=None)
    expected, expected_gradients = pull(dense)(jnp.ones((R, T)), *wide)
    np.testing.assert_allclose(values, expected, rtol=2e-6)
    assert largest_difference(jax.tree.map(lambda x: x.astype(jnp.float32), gradients), expected_gradients) < 5e-3


@functools.cache
def plain():
    """Rows of one prompt and one response: what a borrower's `[B, T, V]` batch looks like."""
    plain = make_batch(random_trees(1, R, responses=(1, 1)), rows=R, used=R, tokens=16)
    rng = np.random.default_rng(2)
    hidden = tuple(jnp.asarray(rng.normal(size=(R, 16, D)), jnp.float32) for _ in range(3))
    return plain, hidden, tuple(w[:, :VOCAB] for w in arrays(3)[1])


def test_the_heads_equal_the_dense_functions_that_borrowers_use():
    plain_batch, hidden, kernels = plain()
    mask = plain_batch.branch > 0

    def by_head(x, w):
        values = target_logps(x, Unembedding(w, None, VOCAB), plain_batch, chunk=5)
        return jnp.zeros((R, 16)).at[jnp.arange(R)[:, None], plain_batch.target_source + 1].add(values)

    def by_logits(x, w):
        return losses.dense.token_logps(x @ w, plain_batch.token, mask)

    cotangent = arrays(3)[2][:, :16]
    got, expected = (pull(f)(cotangent, hidden[0], kernels[0]) for f in (by_head, by_logits))
    assert (np.asarray(got[0]) != 0).sum() == int(mask.sum())
    assert largest_difference(got, expected) < 2e-6


def test_fused_aligndistil_equals_the_dense_one():
    plain_batch, hidden, kernels = plain()
    mask = plain_batch.branch > 0
    weights = jnp.broadcast_to(1.0 / mask.sum(-1, keepdims=True), plain_batch.target_slot.shape)
    frozen = list(zip(hidden[1:], kernels[1:], strict=True))

    def by_head(x, w):
        towers = tuple(Tower(h, Unembedding(k, None, VOCAB)) for h, k in ((x, w), *frozen))
        function = lambda token, *logits: (losses.aligndistil(*logits), ())
        return weighted_sum(function, weights, towers, plain_batch, chunk=5)[0]

    def by_logits(x, w):
        return losses.dense.aligndistil(x @ w, *(h @ k for h, k in frozen), mask).sum()

    got, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden[0], kernels[0]) for f in (by_head, by_logits)
    )
    assert largest_difference(got, expected) < 5e-6


def test_eight_devices_compute_what_one_does():
    hidden, kernels, weights = arrays(3)

    def values(weights, batch, hidden, kernels):
        function = FUNCTIONS["aligndistil"][1]
        total = lambda x, w: weighted_sum(
            lambda t, *z: (function(t, *z), ()), weights, towers_of(x, w), batch, chunk=9
        )[0]
        logps = lambda x, w: target_logps(x[0], Unembedding(w[0], None, VOCAB), batch, chunk=9)
        out, pull_back = jax.vjp(logps, hidden, kernels)
        return jax.value_and_grad(total, argnums=(0, 1))(hidden, kernels), out, pull_back(weights)

    run = jax.jit(values)
    expected = run(weights, batch(), hidden, kernels)
    mesh = make_mesh(data=4, fsdp=2)
    rows = row_sharding(mesh)
    with jax.set_mesh(mesh), uncached():
        got = run(*jax.device_put((weights, batch(), hidden), rows), kernels)
    assert len(got[1].sharding.device_set) == 8
    assert largest_difference(jax.device_get(got), jax.device_get(expected)) < 2e-6


def test_no_buffer_of_all_logits_is_compiled():
    (hidden, *_), (kernel, *_), cotangent = arrays(3)

    def compile_gradient(head, chunk):
        loss = lambda x, w: head(x, Unembedding(w, None, VOCAB), chunk)
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, kernel).compile()

    def summed(x, unembedding, chunk):
        return jnp.sum(cotangent * target_logps(x, unembedding, batch(), chunk=chunk))

    def weighted(x, unembedding, chunk):
        function = lambda token, logits: (values_at_targets(token, logits).logps, ())
        return weighted_sum(function, cotangent, (Tower(x, unembedding),), batch(), chunk=chunk)[0]

    for head in (summed, weighted):
        assert largest_buffer(compile_gradient(head, 16)) < R * T * VOCAB
    assert largest_buffer(compile_gradient(summed, R * T)) >= R * T * VOCAB  # what the reader finds if it is there


def test_a_frozen_unembedding_costs_no_gradient():
    """As under LoRA: of four products (logits, logits again, two gradients) one is not made."""
    hidden, kernels, _ = arrays(1)

    def total(hidden, kernel):
        return jnp.sum(target_logps(hidden, Unembedding(kernel, None, VOCAB), batch(), chunk=64) ** 2)

    def flops(*which):
        compiled = jax.jit(jax.grad(total, which)).lower(hidden[0], kernels[0]).compile()
        return compiled.cost_analysis()["flops"]

    product = 2 * 64 * D * PADDED  # of one trip: how often the loop runs, the compiler does not know
    assert flops(0, 1) - flops(0) >= product


@pytest.mark.parametrize("num_trees", [1, 20])
def test_the_loops_run_as_often_as_targets_are_listed(monkeypatch, num_trees):
    trips = []
    original = jax.lax.fori_loop

    def record(start, stop, body, carry):
        trips.append(int(stop) - start)
        return original(0, 0, body, carry)

    monkeypatch.setattr(jax.lax, "fori_loop", record)
    (hidden, *_), (kernel, *_), _ = arrays(3)
    few = make_batch(random_trees(0, num_trees), rows=R, tokens=T)
    tower = Tower(hidden, Unembedding(kernel, None, VOCAB))
    static, operands, kernels = targets.pack_arguments(logp_at_targets, (tower,), few, 16)
    target_values_module._forward_rows(static, operands, kernels)
    target_values_module._backward_rows(static, operands, kernels, jnp.zeros((R, T)))
    pair = static._replace(function=lambda token, logits: (logp_at_targets(token, logits), ()))
    weighted_sum_module._value_and_gradient_rows(pair, operands, kernels, jnp.zeros((R, T)))
    weighted_sum_module._value_rows(pair, operands, kernels, jnp.zeros((R, T)))
    assert trips == [-(-int((few.target_slot > 0).sum()) // 16)] * 4
