"""DPO, IPO, SimPO and the negative log-likelihood against the oracles and the identities of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from palign import losses
from tests.oracles import pairwise_losses as oracle

EXTREMES = np.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 1e4], [-1e4, -1e4], [-3.0, -3.0]])


def log_probs(seed, size=24):
    rng = np.random.default_rng(seed)
    policy = -rng.gamma(4.0, 8.0, (size, 2))
    reference = policy + rng.normal(0.0, 6.0, (size, 2))
    extreme = np.concatenate([policy, EXTREMES]), np.concatenate([reference, np.zeros_like(EXTREMES)])
    return tuple(array.astype(np.float32) for array in extreme)


CASES = {
    "dpo": (lambda p, r: losses.dpo(p, r, beta=0.3), lambda p, r: oracle.dpo(p, r, 0.3)),
    "ipo": (lambda p, r: losses.ipo(p, r, beta=0.2), lambda p, r: oracle.ipo(p, r, 0.2)),
    "simpo": (
        lambda p, r: losses.simpo(p - jax.lax.stop_gradient(r), beta=2.5, gamma=1.2),
        lambda p, r: oracle.simpo(p - r, 2.5, 1.2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_oracle_s_in_f32_and_x64(name, run, close):
    loss, expected = CASES[name]
    policy, reference = log_probs(0)
    close(run(loss)(policy, reference), expected(np.float64(policy), np.float64(reference)))
    with jax.enable_x64(True):
        policy, reference = np.float64(policy), np.float64(reference)
        actual = run(loss)(policy, reference)
        assert actual.dtype == jnp.float64
        close(actual, expected(policy, reference), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_two_derivatives_agree_with_finite_differences(name):
    with jax.enable_x64(True):
        policy, reference = (np.float64(array[:5]) for array in log_probs(1))
        loss = jax.jit(lambda policy: CASES[name][0](policy, reference))
        check_grads(loss, (policy,), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_stay_finite_at_extreme_margins(name):
    loss, _ = CASES[name]
    zeros = np.zeros_like(EXTREMES, np.float32)
    value, gradient = jax.value_and_grad(lambda policy: loss(policy, zeros).sum())(np.float32(EXTREMES))
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", CASES)
def test_bf16_inputs_are_computed_in_f32(name, close):
    loss, expected = CASES[name]
    policy, reference = (jnp.asarray(array[:24], jnp.bfloat16) for array in log_probs(2))
    if name == "simpo":
        # The difference of two bf16 arrays is rounded before the loss sees it.
        reference = jnp.zeros_like(policy)
    actual = loss(policy, reference)
    assert actual.dtype == jnp.float32
    close(actual, expected(np.asarray(policy, np.float64), np.asarray(reference, np.float64)))


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_only_changes_against_the_reference_count(name, close):
    loss, _ = CASES[name]
    policy, reference = (array[:24] for array in log_probs(3))
    close(loss(policy + 7.5, reference), loss(policy, reference), rtol=1e-5, atol=1e-5)
    close(loss(policy, reference - 7.5), loss(policy, reference), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda reference: loss(policy, reference).sum())(reference)
    assert not np.asarray(gradient).any()


def test_dpo_starts_at_log_2_and_its_gradient_is_beta_times_a_sigmoid(close):
    policy, reference = log_probs(4)
    np.testing.assert_array_equal(losses.dpo(policy, policy, beta=0.1), np.float32(np.log(2.0)))
    gradient = jax.grad(lambda policy: losses.dpo(policy, reference, beta=0.1).sum())(policy)
    close(gradient, oracle.dpo_gradient(np.float64(policy), np.float64(reference), 0.1))


def test_swapping_the_responses_changes_dpo_by_the_margin(close):
    policy, reference = (array[:24] for array in log_probs(5))
    swapped = losses.dpo(policy[:, ::-1], reference[:, ::-1], beta=0.1)
    ratio = policy - reference
    close(swapped - losses.dpo(policy, reference, beta=0.1), 0.1 * (ratio[:, 0] - ratio[:, 1]), atol=2e-6)


def test_dpo_keeps_its_precision_where_the_preference_is_nearly_certain():
    loss = losses.dpo(jnp.array([[300.0, 0.0]]), jnp.zeros((1, 2)), beta=0.1)
    np.testing.assert_allclose(loss, np.exp(-30.0), rtol=1e-5)


def test_ipo_rests_at_its_target_and_starts_at_one_over_four_beta_squared(close):
    zeros = jnp.zeros((1, 2))
    close(losses.ipo(zeros, zeros, beta=0.1), [1 / (4 * 0.1**2)])
    at_target = jnp.array([[1 / (2 * 0.1), 0.0]])
    loss, gradient = jax.value_and_grad(lambda policy: losses.ipo(policy, zeros, beta=0.1).sum())(at_target)
    assert loss == 0 and not gradient.any()


def test_simpo_s_margin_is_not_scaled_by_beta(close):
    equal = jnp.full((1, 2), -1.5)
    close(losses.simpo(equal, beta=7.0, gamma=0.8), [np.log1p(np.exp(0.8))])
    ahead = jnp.array([[0.8 / 7.0, 0.0]])
    close(losses.simpo(ahead, beta=7.0, gamma=0.8), [np.log(2.0)])
    policy, _ = log_probs(6)
    close(losses.simpo(policy, beta=0.3, gamma=0.0), losses.dpo(policy, np.zeros_like(policy), beta=0.3))


def test_implicit_rewards_are_scaled_log_ratios_without_gradient(close):
    policy = jnp.array([[-3.0, -5.0, -7.0]])
    reference = jnp.array([[-4.0, -5.0, -5.0]])
    close(losses.implicit_rewards(policy, reference, beta=0.5), [[0.5, 0.0, -1.0]])
    gradient = jax.grad(lambda policy: losses.implicit_rewards(policy, reference, beta=0.5).sum())(policy)
    assert not gradient.any()


def test_nll_negates_any_shape_and_raises_bf16_to_f32():
    logps = jnp.array([[-1.0, -0.25], [0.0, -1e4]], jnp.bfloat16)
    assert losses.nll(logps).dtype == jnp.float32
    np.testing.assert_array_equal(losses.nll(logps), -np.asarray(logps, np.float32))
    assert losses.nll(jnp.float32(-2.0)) == 2.0


def test_beta_may_be_traced():
    policy, reference = log_probs(7)
    traced = jax.jit(lambda beta: losses.dpo(policy, reference, beta=beta))(0.3)
    np.testing.assert_allclose(traced, losses.dpo(policy, reference, beta=0.3), rtol=1e-6, atol=1e-7)


def test_wrong_arguments_are_answered_with_their_name():
    pair, one = jnp.zeros((3, 2)), jnp.zeros((1, 2))
    with pytest.raises(ValueError, match=r"dpo: policy_logps has shape \[3\].*expected \[B, 2\]"):
        losses.dpo(jnp.zeros(3), pair)
    with pytest.raises(ValueError, match=r"policy_logps \[3, 2\], ref_logps \[1, 2\]"):
        jax.jit(losses.ipo)(pair, one)
    with pytest.raises(ValueError, match=r"simpo: policy_logps has shape \[3, 4\]"):
        losses.simpo(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="implicit_rewards: all shapes must be equal"):
        losses.implicit_rewards(pair, one)
    for beta in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="dpo: beta is"):
            losses.dpo(pair, pair, beta=beta)
