"""SPA: which pairs are taken for noise, and what is remembered of their margins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.losses.cases.pairwise_shaped import gradient, log_probs, ratios


def test_spa_with_alpha_zero_or_no_threshold_is_dpo_and_with_all_noise_conservative_dpo(close):
    policy, reference = log_probs(17)
    dpo = np.float64(losses.dpo(policy, reference, beta=0.2))
    close(losses.spa(policy, reference, policy, jnp.inf, beta=0.2, alpha=0.0), dpo)
    close(losses.spa(policy, reference, policy, -jnp.inf, beta=0.2), dpo)
    everything = losses.spa(policy, reference, policy, jnp.inf, beta=0.2, alpha=0.3)
    close(everything, np.float64(losses.cdpo(policy, reference, beta=0.2, label_smoothing=0.3)))


def test_spa_detects_with_the_margin_of_the_model_that_it_is_given(close):
    policy, zeros = ratios((4.0, 0.0), (4.0, 0.0), (4.0, 0.0), (-4.0, 0.0))
    detection = np.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [3.0, 0.0]], np.float32)
    calm, noisy = np.logaddexp(0, -2.0), 0.9 * np.logaddexp(0, -2.0) + 0.1 * np.logaddexp(0, 2.0)
    # beta times 2 is on the threshold itself: noise.
    close(losses.spa(policy, zeros, detection, 1.0, beta=0.5), [calm, noisy, noisy, np.logaddexp(0, 2.0)])
    # The policy as its own detector: all margins above 1 but the last.
    smoothed = 0.9 * np.logaddexp(0, 2.0) + 0.1 * np.logaddexp(0, -2.0)
    close(losses.spa(policy, zeros, policy, 1.0, beta=0.5), [calm, calm, calm, smoothed])
    # The smoothed loss of a noisy pair rests at a finite margin.
    rest, zero = ratios((np.log(9.0) / 0.5, 0.0))
    slope = gradient(lambda p, r: losses.spa(p, r, p, jnp.inf, beta=0.5, alpha=0.1), rest, zero)
    np.testing.assert_allclose(slope, 0.0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 73])
def test_the_threshold_is_the_quantile_of_the_last_fifty_steps(steps, close):
    means = np.random.default_rng(steps).normal(0.3, 1.0, steps).astype(np.float32)
    remember = jax.jit(lambda history, mean: (losses.spa_remember(history, mean), None))
    history, _ = jax.lax.scan(remember, losses.spa_history(), means)
    assert history.count == steps
    for quantile in (0.0, 0.1, 0.5, 1.0):
        close(losses.spa_threshold(history, quantile=quantile), np.quantile(np.float64(means[-50:]), quantile))


def test_there_is_no_threshold_before_the_start_or_without_memory():
    threshold = jax.jit(lambda history, start: losses.spa_threshold(history, start=start))
    history = losses.spa_history()
    assert threshold(history, 0.0) == -np.inf
    with jax.debug_nans(True):
        assert losses.spa_threshold(history) == -np.inf
    for step in range(1, 5):
        history = losses.spa_remember(history, float(step))
        assert (threshold(history, 2.5) == -np.inf) == (step < 2.5)
        assert (threshold(history, 3) == -np.inf) == (step < 3)
        assert threshold(history, 0.0) >= 1.0


def test_what_is_remembered_has_no_gradient():
    def threshold(mean):
        return losses.spa_threshold(losses.spa_remember(losses.spa_history(), mean))

    value, slope = jax.value_and_grad(threshold)(0.25)
    assert value == 0.25 and slope == 0
    # The memory stays in float32 where the losses are in float64.
    with jax.enable_x64(True):
        history = losses.spa_remember(losses.spa_history(), np.float64(0.1))
        assert history.margins.dtype == jnp.float32 and history.count.dtype == jnp.int32
        pair = np.zeros((1, 2))
        assert losses.spa(pair, pair, pair, losses.spa_threshold(history)).dtype == jnp.float64
