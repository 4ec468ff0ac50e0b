"""Supervised losses against their oracles, in all types and shapes, and the gradients that weights must not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.oracles import supervised_losses as oracle

LOSSES = {"nll": (losses.nll, oracle.nll), "dft": (losses.dft, oracle.dft)}
every = pytest.mark.parametrize("name", LOSSES)
EXTREMES = np.float32([0.0, -1e-6, -104.0, -1e4])


def logps(seed, shape=(3, 4)):
    return np.float32(-np.random.default_rng(seed).gamma(1.0, 1.5, shape))


@every
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 2, 3)])
def test_the_oracle_s_values_for_any_shape(name, shape, run, close):
    loss, expected = LOSSES[name]
    given = logps(0, shape)
    assert run(loss)(given).dtype == jnp.float32
    close(run(loss)(given), expected(given))


@every
def test_float64_is_kept_and_bf16_computed_in_f32(name, close):
    loss, expected = LOSSES[name]
    given = logps(1)
    with jax.enable_x64(True):
        actual = loss(np.float64(given))
        assert actual.dtype == jnp.float64
        close(actual, expected(given), rtol=1e-12, atol=1e-12)
    rounded = jnp.asarray(given, jnp.bfloat16)
    assert loss(rounded).dtype == jnp.float32
    close(loss(rounded), expected(np.asarray(rounded, np.float64)))


@every
def test_values_and_gradients_are_finite_from_certainty_to_impossibility(name):
    values, pull_back = jax.vjp(LOSSES[name][0], EXTREMES)
    assert np.isfinite(values).all()
    assert np.isfinite(pull_back(jnp.ones_like(values))[0]).all()


@every
def test_vmap_scan_and_checkpoint_change_nothing(name, close):
    loss, given = LOSSES[name][0], logps(2)
    together = loss(given)
    np.testing.assert_array_equal(jax.vmap(loss)(given), together)
    np.testing.assert_array_equal(jax.lax.scan(lambda _, row: (None, loss(row)), None, given)[1], together)
    gradients = [jax.grad(lambda x, f=f: f(x).sum())(given) for f in (loss, jax.checkpoint(loss))]
    np.testing.assert_array_equal(*gradients)


def test_dft_s_gradient_is_that_of_minus_the_probability(close):
    given = logps(3)
    gradient = jax.grad(lambda x: losses.dft(x).sum())(given)
    close(gradient, oracle.dft_gradient(given))
    close(gradient, jax.grad(lambda x: -jnp.exp(x).sum())(given))
    # With a gradient through the weight it would be -(1 + log p) p, and change its sign at p = 1/e.
    assert (gradient < 0).all() and (given < -1).any()


def test_dft_is_nll_weighed_by_the_probability(close):
    given = logps(4)
    close(losses.dft(given), np.exp(np.float64(given)) * losses.nll(given))
    assert (losses.dft(given) <= losses.nll(given)).all()
    assert losses.dft(jnp.float32(0.0)) == 0 and losses.dft(jnp.float32(-1e4)) == 0


def test_dft_is_highest_at_a_probability_of_1_over_e(close):
    close(losses.dft(jnp.float32(-1.0)), 1 / np.e)
    assert (losses.dft(np.linspace(-5, 0, 101, dtype=np.float32)) <= np.float32(1 / np.e)).all()


def test_dft_s_gradient_in_the_logits_fades_for_unlikely_tokens(close):
    # nll pulls a token's own logit with 1 - p, dft with p (1 - p).
    logits = jnp.array([-6.0, 0.0, 1.0])

    def own(loss):
        return jax.grad(lambda z: loss(jax.nn.log_softmax(z)[0]))(logits)[0]

    p = np.exp(-6) / (np.exp(-6) + 1 + np.e)
    close(own(losses.nll), -(1 - p))
    close(own(losses.dft), -p * (1 - p))
