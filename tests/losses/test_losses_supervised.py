"""Identities of the supervised losses, and the gradient that DFT's weight must not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.oracles import supervised_losses as oracle


def logps(seed, shape=(3, 4)):
    return np.float32(-np.random.default_rng(seed).gamma(1.0, 1.5, shape))


@pytest.mark.parametrize("shape", [(), (5,), (2, 2, 3)])
@pytest.mark.parametrize("name", ["nll", "dft"])
def test_any_shape_will_do(name, shape, close):
    given = logps(0, shape)
    close(getattr(losses, name)(given), getattr(oracle, name)(given))


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
