"""What all tests of the losses share: strict types, both ways to run, and the way to compare."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(params=[jax.jit, lambda function: function], ids=["jit", "eager"])
def run(request):
    return request.param


def _jitted_value_and_gradient(loss):
    def both(first, *rest):
        values, pull_back = jax.vjp(lambda first: loss(first, *rest), first)
        return values, pull_back(jnp.ones_like(values))[0]

    return jax.jit(both)


@pytest.fixture(scope="session")
def value_and_gradient():
    """Values per example, and the gradient of their sum with respect to the first array, as numpy."""
    compiled = functools.cache(_jitted_value_and_gradient)
    return lambda loss, *arrays: jax.tree.map(np.asarray, compiled(loss)(*arrays))


@pytest.fixture
def close():
    """Within 1e-6, relative with an absolute floor, of a float64 oracle."""

    def check(actual, expected, *, rtol=1e-6, atol=1e-6):
        assert np.asarray(actual).shape == np.shape(expected)
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=atol)

    return check
