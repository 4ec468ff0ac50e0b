"""Every loss through the same tests: its oracle, gradients, jit, extremes, types, shapes, transformations."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.test_util import check_grads

from tests.losses.cases.case import Case
from tests.losses.cases.every import CASES

FAMILIES = {case.family: case for case in reversed(CASES)}  # one of each, the first


def each(cases):
    return pytest.mark.parametrize("case", list(cases), ids=lambda case: case.title)


every = each(CASES)
# One of each family in every run; all of them before a release.
one_a_family = pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c is FAMILIES[c.family] else pytest.mark.slow, id=c.title) for c in CASES],
)
SIZE = 12


def rng_of(case: Case, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *case.title.encode()])


def is_float(array) -> bool:
    return np.issubdtype(np.asarray(array).dtype, np.floating)


def f32(arrays):
    return tuple(np.float32(a) if is_float(a) else np.asarray(a) for a in arrays)


def bound(case: Case):
    return functools.partial(case.loss, **case.hyper)


def expected(case: Case, arrays):
    values = [np.asarray(a, np.float64) if is_float(a) else np.asarray(a) for a in arrays]
    return np.asarray(case.oracle(*values, **case.hyper), np.float64)


def total_of(case: Case, arrays, positions):
    """The sum of the loss as a function of the arrays at `positions`."""

    def total(*chosen):
        full = list(arrays)
        for position, array in zip(positions, chosen, strict=True):
            full[position] = array
        return bound(case)(*full).sum()

    return total, [arrays[position] for position in positions]


class WithAndWithoutJit(chex.TestCase):
    """Values in float32 and in float64, traced and not."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters((case.title, case) for case in CASES)
    def test_the_oracle_s_values(self, case):
        arrays = case.arrays(rng_of(case, 0), SIZE)
        with jax.numpy_dtype_promotion("strict"):
            actual = self.variant(bound(case))(*f32(arrays))
        assert actual.dtype == jnp.float32
        want = expected(case, arrays)
        assert actual.shape == want.shape
        np.testing.assert_allclose(np.float64(actual), want, rtol=2e-6, atol=2e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters((case.title, case) for case in CASES)
    def test_the_oracle_s_values_in_float64(self, case):
        arrays = case.arrays(rng_of(case, 1), SIZE)
        with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
            actual = self.variant(bound(case))(*arrays)
            assert actual.dtype == jnp.float64
        np.testing.assert_allclose(actual, expected(case, arrays), rtol=1e-10, atol=1e-10)


@each(case for case in CASES if case.checks_gradient)
def test_the_gradient_is_that_of_finite_differences(case):
    with jax.enable_x64(True):
        total, chosen = total_of(case, case.arrays(rng_of(case, 2), 4), case.differentiable)
        check_grads(jax.jit(total), chosen, order=1, modes=("rev",), rtol=1e-4, atol=1e-4)


@each(case for case in CASES if case.stopped)
def test_no_gradient_reaches_what_is_stopped(case):
    total, chosen = total_of(case, f32(case.arrays(rng_of(case, 3), SIZE)), case.stopped)
    for gradient in jax.jit(jax.grad(total, argnums=tuple(range(len(chosen)))))(*chosen):
        assert not np.asarray(gradient).any()


@every
def test_values_and_gradients_are_finite_at_extremes(case):
    arrays = f32(case.extremes())
    total, chosen = total_of(case, arrays, case.differentiable)
    values = jax.jit(bound(case))(*arrays)
    assert np.isfinite(values).all()
    for gradient in jax.jit(jax.grad(total, argnums=tuple(range(len(chosen)))))(*chosen):
        assert np.isfinite(gradient).all()


@each(case for case in CASES if not case.any_shape)
def test_a_wrong_shape_is_answered_with_the_argument_s_name(case):
    arrays = f32(case.arrays(rng_of(case, 4), SIZE))
    names = [p.name for p in inspect.signature(case.loss).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    for position, name in enumerate(names):
        given = list(arrays)
        given[position] = given[position][None]
        with pytest.raises(ValueError, match=rf"{case.loss.__name__}: .*\b{name}\b"):
            jax.eval_shape(bound(case), *given)


@one_a_family
def test_bf16_is_computed_in_f32(case):
    floats = [is_float(a) for a in case.arrays(rng_of(case, 5), SIZE)]
    rounded = tuple(
        jnp.asarray(a, jnp.bfloat16) if f else a
        for a, f in zip(case.arrays(rng_of(case, 5), SIZE), floats, strict=True)
    )
    actual = bound(case)(*rounded)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(
        np.float64(actual),
        expected(case, [np.asarray(a, np.float64) if f else a for a, f in zip(rounded, floats, strict=True)]),
        rtol=2e-6,
        atol=2e-6,
    )


@one_a_family
def test_vmap_and_scan_over_examples_and_checkpoint_change_nothing(case):
    arrays = f32(case.arrays(rng_of(case, 6), SIZE))
    together = bound(case)(*arrays)
    whole = set(case.whole)

    def one(*example):
        lifted = [a if i in whole else a[None] for i, a in enumerate(example)]
        return bound(case)(*lifted)[0]

    axes = tuple(None if i in whole else 0 for i in range(len(arrays)))
    np.testing.assert_allclose(jax.jit(jax.vmap(one, in_axes=axes))(*arrays), together, rtol=1e-5, atol=1e-6)

    def step(_, examples):
        parts = iter(examples)
        return None, one(*(a if i in whole else next(parts) for i, a in enumerate(arrays)))

    scanned = jax.lax.scan(step, None, [a for i, a in enumerate(arrays) if i not in whole])[1]
    np.testing.assert_allclose(scanned, together, rtol=1e-5, atol=1e-6)

    total, chosen = total_of(case, arrays, case.differentiable)
    positions = tuple(range(len(chosen)))
    plain, again = (jax.jit(jax.grad(f, argnums=positions))(*chosen) for f in (total, jax.checkpoint(total)))
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
