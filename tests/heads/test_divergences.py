"""The fused divergences against NumPy in float64: values, closed-form gradients, extremes, which positions count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from palign.heads.target_values import target_logps, target_values
from palign.heads.targets import TargetTower, Tower, at_targets
from palign.heads.weighted_sum import weighted_sum
from palign.objectives.per_target import values_per_target
from palign.types import Unembedding
from tests.oracles import distill_losses as oracle
from tests.trees import VOCAB, largest_difference, make_batch, random_trees

R, T, D, PADDED = 4, 32, 8, 56
CAP = 0.02
SOFTCAPS = (6.0, None, 5.0)
OPTIONS = {"beta0": 0.1, "scale": 20.0, "epsilon": 1e-3}


@functools.cache
def batch():
    with jax.ensure_compile_time_eval():
        return make_batch(random_trees(3, 6, responses=(2, 4), longest=3), rows=R, used=R, tokens=T)


@functools.cache
def arrays():
    """Hidden states and kernels of a student, a DPO model and a reverse DPO model, alike in row 0 only; and weights."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(R, T, D)), rng.normal(size=(D, PADDED))
    apart = np.array([0.01, 0.1, 0.5, 1.5]).reshape(R, 1, 1)
    others = [
        (hidden + apart * rng.normal(size=hidden.shape), kernel + 0.02 * rng.normal(size=kernel.shape)) for _ in "dr"
    ]
    hiddens, kernels = zip((hidden, kernel), *others, strict=True)
    return *([jnp.asarray(x, jnp.float32) for x in xs] for xs in (hiddens, kernels)), rng.uniform(0.5, 1.5, (R, T))


def towers_of(hiddens, kernels):
    return tuple(Tower(x, Unembedding(w, cap, VOCAB)) for x, w, cap in zip(hiddens, kernels, SOFTCAPS, strict=False))


def float64_logits():
    """Each tower's raw and finished logits at all targets, `[R, M, V]`, by NumPy."""
    found = []
    for x, w, cap in zip(*arrays()[:2], SOFTCAPS, strict=True):
        rows = np.take_along_axis(np.asarray(x, np.float64), np.asarray(batch().target_source)[..., None], axis=1)
        raw = rows @ np.asarray(w, np.float64)[:, :VOCAB]
        found.append((rows, raw, raw if cap is None else cap * np.tanh(raw / cap)))
    return found


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def float64_head(teacher_and_weight):
    """The weighted sum of reverse KLs to a teacher, and its gradients in closed form, by NumPy."""
    (rows, raw, student), (_, _, first), (_, _, second) = float64_logits()
    teacher, beta = teacher_and_weight(first, second)
    log_p, log_t = log_softmax(student), log_softmax(teacher)
    kl = np.sum(np.exp(log_p) * (log_p - log_t), axis=-1)
    weights = np.where(np.asarray(batch().target_slot) > 0, arrays()[2], 0.0) * beta
    slope = weights[..., None] * np.exp(log_p) * ((log_p - log_t) - kl[..., None])
    slope *= 1 - np.tanh(raw / SOFTCAPS[0]) ** 2
    dhidden, w = np.zeros((R, T, D)), np.asarray(arrays()[1][0], np.float64)
    for r in range(R):
        np.add.at(dhidden[r], np.asarray(batch().target_source)[r], slope[r] @ w[:, :VOCAB].T)
    dkernel = np.zeros((D, PADDED))
    dkernel[:, :VOCAB] = np.einsum("rmd,rmv->dv", rows, slope)
    return np.sum(weights * kl), dhidden, dkernel


def adaptive(first, second, scale=20.0, epsilon=1e-3):
    distance = 0.5 * np.abs(np.exp(log_softmax(first)) - np.exp(log_softmax(second))).sum(-1)
    alpha = scale * distance + epsilon
    return first + alpha[..., None] * (first - second), alpha


def constant_of(first, second):
    return adaptive(first, second)[0], 0.1


def capped_of(first, second):
    teacher, alpha = adaptive(first, second)
    return teacher, np.minimum(0.1 / alpha, CAP)


def aligndistil_of(first, second):
    teacher, alpha = adaptive(first, second)
    return teacher, 0.1 / alpha


CASES = {
    "aligndistil": (functools.partial(losses.aligndistil, **OPTIONS), aligndistil_of),
    "constant": (functools.partial(losses.aligndistil_constant, **OPTIONS), constant_of),
    "capped": (functools.partial(losses.aligndistil_capped, **OPTIONS, cap=CAP), capped_of),
    "contrastive": (
        functools.partial(losses.aligndistil_contrastive, beta=0.05, beta0=0.1),
        lambda first, second: (first + 2.0 * (first - second), 0.05),
    ),
    "theorem1": (
        functools.partial(losses.aligndistil_theorem1, beta=0.04, beta0=0.1),
        lambda first, second: (2.5 * first - 1.5 * second, 0.04),
    ),
}


def fused(loss, towers, weights, chunk=7):
    return weighted_sum(lambda token, *logits: (loss(*logits), ()), weights, towers, batch(), chunk=chunk)[0]


def test_the_cases_go_from_models_that_agree_to_models_that_do_not():
    _, (_, _, first), (_, _, second) = float64_logits()
    _, alpha = adaptive(first, second)
    assert alpha.min() < 2 and alpha.max() > 18
    assert 0.2 < (0.1 / alpha > CAP).mean() < 0.8


@pytest.mark.parametrize("name", CASES)
def test_every_weight_of_aligndistil_has_its_closed_form_gradient(name):
    loss, formula = CASES[name]
    hiddens, kernels, weights = arrays()

    @jax.jit
    def head(x, w):
        return jax.value_and_grad(
            lambda x, w: fused(loss, towers_of((x, *hiddens[1:]), (w, *kernels[1:])), weights), argnums=(0, 1)
        )(x, w)

    total, gradients = head(hiddens[0], kernels[0])
    expected, *expected_gradients = float64_head(formula)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert largest_difference(list(gradients), expected_gradients) < 1e-5
    assert not np.asarray(gradients[1])[:, VOCAB:].any()


def test_the_closed_forms_are_the_derivatives_of_the_float64_formulas():
    """Central differences of the oracles, one logit at a time: independent of every rule in the losses."""
    rng = np.random.default_rng(1)
    student, teacher = (np.float32(rng.normal(0, 2, 7)) for _ in "st")
    for loss, value in (
        (losses.reverse_kl, oracle.kl),
        (losses.forward_kl, oracle.forward_kl),
        (functools.partial(losses.generalised_jsd, beta=0.3), functools.partial(oracle.jsd, beta=0.3)),
        (functools.partial(losses.scaled_jsd, beta=0.9), functools.partial(oracle.scaled_jsd, beta=0.9)),
    ):
        nudges = 1e-5 * np.eye(7)
        z, t = np.float64(student), np.float64(teacher).tolist()
        slope = [(value((z + n).tolist(), t) - value((z - n).tolist(), t)) / 2e-5 for n in nudges]
        np.testing.assert_allclose(jax.grad(loss)(student, teacher), slope, atol=1e-6)


def test_a_mixture_s_beta_may_be_learned():
    student, teacher = (np.random.default_rng(2).normal(0, 2, (2, 7)) for _ in "st")
    for loss in (losses.generalised_jsd, losses.scaled_jsd):
        with jax.enable_x64(True):
            value = jax.jit(lambda beta, loss=loss: loss(student, teacher, beta=beta).sum())
            expected = (value(0.3 + 1e-6) - value(0.3 - 1e-6)) / 2e-6
            np.testing.assert_allclose(jax.grad(value)(0.3), expected, rtol=1e-6)


@functools.cache
def per_target_numbers():
    """Every number that the objectives read per target with a reference, and a gradient through each of them."""
    hiddens, kernels, weights = arrays()
    student, reference = towers_of(hiddens[:2], kernels[:2])
    names = frozenset({"policy_kl", "reference_kl"})

    @jax.jit
    def run(x):
        _, values = values_per_target(Tower(x, student.unembedding), {"reference": reference}, batch(), names, chunk=7)
        return jnp.sum(weights * values["policy_kl"]), jnp.sum(weights * values["reference_kl"]), values

    return run(hiddens[0]), jax.jit(jax.grad(lambda x: run(x)[0]))(hiddens[0])


def test_both_kl_divergences_from_the_reference_are_per_target_numbers():
    (_, _, values), gradient = per_target_numbers()
    student, reference = (logits for _, _, logits in float64_logits()[:2])
    listed = np.asarray(batch().target_slot) > 0
    for name, (first, second) in {"policy_kl": (student, reference), "reference_kl": (reference, student)}.items():
        expected = np.where(listed, oracle.per_position(oracle.kl, first, second), 0.0)
        np.testing.assert_allclose(values[name], expected, atol=1e-6)
    assert not np.asarray(gradient).any()  # a metric


def test_cached_hidden_states_are_as_good_as_live_ones():
    hiddens, kernels, weights = arrays()
    live = towers_of(hiddens, kernels)
    loss = CASES["aligndistil"][0]

    def both(hidden, kernel, frozen):
        total = lambda x, w: fused(loss, (Tower(x, Unembedding(w, SOFTCAPS[0], VOCAB)), *frozen), weights)
        values = target_values(lambda token, *z: loss(*z), (live[0], *frozen), batch(), chunk=7)
        return values, jax.value_and_grad(total, argnums=(0, 1))(hidden, kernel)

    cached = tuple(at_targets(tower, batch()) for tower in live[1:])
    assert cached[0].hidden.shape == (*batch().target_slot.shape, D)
    expected = jax.jit(lambda x, w: both(x, w, live[1:]))(hiddens[0], kernels[0])
    got = jax.jit(lambda x, w: both(x, w, cached))(hiddens[0], kernels[0])
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_cached_hidden_states_are_not_read_where_nothing_is_listed():
    """The first row is empty, and the last chunk is not full."""
    slots = batch().target_slot.at[0].set(0)
    assert int((slots > 0).sum()) % 8
    tower, *frozen = towers_of(*arrays()[:2])
    loud = tuple(
        cached._replace(hidden=jnp.where((slots > 0)[..., None], cached.hidden, jnp.nan))
        for cached in (at_targets(tower, batch()) for tower in frozen)
    )

    @jax.jit
    def head(kernel):
        towers = (tower._replace(unembedding=tower.unembedding._replace(kernel=kernel)), *loud)
        function = lambda token, *z: (losses.aligndistil(*z), ())
        some = batch()._replace(target_slot=slots)
        return weighted_sum(function, jnp.ones((R, T)), towers, some, chunk=8)[0]

    assert np.isfinite(np.asarray(jax.grad(head)(tower.unembedding.kernel))).all()


def test_the_trained_tower_may_hold_the_targets_alone():
    hiddens, kernels, weights = arrays()
    (tower, *_) = towers_of(hiddens, kernels)

    def summed(hidden):
        kept = at_targets(tower._replace(hidden=hidden), batch())
        return jnp.sum(weights * target_logps(*tower._replace(hidden=hidden), batch(), chunk=7)), jnp.sum(
            weights * target_values(_logp, (kept,), batch(), chunk=7)
        )

    live, kept = (jax.jit(jax.grad(lambda x, i=i: summed(x)[i]))(hiddens[0]) for i in (0, 1))
    assert largest_difference(kept, live) < 1e-6


def _logp(token, logits):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]


def test_hidden_states_that_were_cached_for_other_targets_are_an_error():
    hiddens, kernels, _ = arrays()
    short = TargetTower(hiddens[1][:, 1:], Unembedding(kernels[1], None, VOCAB))
    with pytest.raises(ValueError, match=r"heads: cached hidden states are \[4, 31, 8\], .* target table is \[4, 32\]"):
        target_values(lambda token, *z: losses.reverse_kl(*z), (*towers_of(hiddens[:1], kernels[:1]), short), batch())


def test_the_divergence_counts_the_first_response_token_and_nothing_after_the_last():
    """Prompt of P tokens, response of N: the states at P - 1 ... P + N - 2 count, and no other does."""
    trees = random_trees(5, R, responses=(1, 1))
    plain = make_batch(trees, rows=R, used=R, tokens=T)
    hiddens, kernels, _ = arrays()
    towers = towers_of(hiddens, kernels)

    @jax.jit
    def head(x, weights):
        function = lambda token, *z: (losses.reverse_kl(*z), ())
        return jax.value_and_grad(
            lambda x: weighted_sum(function, weights, (towers[0]._replace(hidden=x), towers[1]), plain, chunk=7)[0]
        )(x)

    total, gradient = head(hiddens[0], jnp.ones(plain.target_slot.shape))
    counted = np.zeros((R, T), bool)
    for row, tree in enumerate(trees):
        start = tree.prompt.size - 1
        counted[row, start : start + tree.responses[0].size] = True
    np.testing.assert_array_equal(np.asarray(gradient).any(-1), counted)
    logits = [
        np.asarray(x, np.float64) @ np.asarray(w, np.float64)[:, :VOCAB]
        for x, w in zip(hiddens[:2], kernels[:2], strict=True)
    ]
    logits[0] = SOFTCAPS[0] * np.tanh(logits[0] / SOFTCAPS[0])
    np.testing.assert_allclose(total, oracle.per_position(oracle.kl, *logits)[counted].sum(), rtol=1e-6)


@functools.cache
def wide_range():
    """`(hidden states, kernels, softcap None) -> (value, gradients)`, jitted: AlignDistil on whatever it is given."""

    def run(hiddens, kernels):
        def total(x, w):
            towers = zip((x, *hiddens[1:]), (w, *kernels[1:]), strict=True)
            towers = tuple(Tower(h, Unembedding(k, None, VOCAB)) for h, k in towers)
            return fused(losses.aligndistil, towers, arrays()[2])

        return jax.value_and_grad(total, argnums=(0, 1))(hiddens[0], kernels[0])

    return jax.jit(run)


def test_logits_of_ten_thousand_give_finite_numbers():
    hiddens, kernels, _ = arrays()
    largest = max(float(jnp.abs(h @ k).max()) for h, k in zip(hiddens, kernels, strict=True))
    scale = 1e4 / largest
    total, gradients = wide_range()([scale * h for h in hiddens], kernels)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves((total, gradients)))
    assert float(total) > 1.0


def test_bfloat16_hidden_states_and_kernels_keep_float32_logits():
    """Equal to full logits of the same bfloat16 numbers, multiplied in float32: nothing is rounded in between."""
    hiddens, kernels = ([x.astype(jnp.bfloat16) for x in xs] for xs in arrays()[:2])
    total, gradients = wide_range()(hiddens, kernels)
    assert total.dtype == jnp.float32 and {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
    wide = [[x.astype(jnp.float32) for x in xs] for xs in (hiddens, kernels)]
    expected, expected_gradients = wide_range()(*wide)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    # The slope is rounded to the kernel's type before it is multiplied: one part in 256.
    assert largest_difference([g.astype(jnp.float32) for g in gradients], list(expected_gradients)) < 5e-3


def test_memory_does_not_grow_with_targets_times_vocabulary():
    """Twice the targets: full logits would take `T * V` floats more; hidden states, lists and results are allowed."""
    vocabulary = 1024
    shapes = [jax.ShapeDtypeStruct((D, vocabulary), jnp.float32)] * 3

    def temporaries(head, rows):
        copies = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch())
        hiddens = [jax.ShapeDtypeStruct((rows, T, D), jnp.float32)] * 3
        compiled = jax.jit(jax.grad(head, argnums=(0, 1))).lower(hiddens[0], shapes[0], hiddens[1:], shapes[1:], copies)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    def towers(x, w, hiddens, kernels):
        pairs = zip((x, *hiddens), (w, *kernels), strict=True)
        return tuple(Tower(h, Unembedding(k, None, vocabulary)) for h, k in pairs)

    def by_sum(x, w, hiddens, kernels, batch):
        function = lambda token, *z: (losses.aligndistil(*z), ())
        ones = jnp.ones(batch.target_slot.shape)
        return weighted_sum(function, ones, towers(x, w, hiddens, kernels), batch, chunk=16)[0]

    def recomputed(x, w, hiddens, kernels, batch):
        function = lambda token, *z: losses.aligndistil(*z)
        return jnp.sum(target_values(function, towers(x, w, hiddens, kernels), batch, chunk=16))

    def dense(x, w, hiddens, kernels, batch):
        return jnp.sum(losses.aligndistil(*(h @ k for h, k in zip((x, *hiddens), (w, *kernels), strict=True))))

    logits = 4 * R * T * vocabulary
    small, large = 8, 8 + R
    assert temporaries(dense, large) - temporaries(dense, small) >= logits  # what the reader sees if it is there
    for head in (by_sum, recomputed):
        assert temporaries(head, large) - temporaries(head, small) < logits / 16
