"""Losses without a reference, and those with a term on the chosen response alone: the identities of their papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.losses.cases.pairwise import LOG_2, at_margin, averages, gradient_of, log_probs
from tests.oracles import pairwise_losses as oracle


def test_cpo_is_dpo_with_a_uniform_reference_plus_a_supervised_term(close):
    policy, _ = log_probs(28)
    supervised = policy[:, 0]
    uniform = losses.dpo(policy, np.full_like(policy, -40.0), beta=0.3)
    close(losses.cpo(policy, supervised, beta=0.3, alpha=0.0), uniform, rtol=1e-5, atol=1e-5)
    close(losses.cpo(policy, supervised, beta=0.3, alpha=0.5), uniform + 0.5 * losses.nll(supervised), rtol=1e-5)


def test_log_odds_are_those_of_the_oracle_in_any_shape(run, close):
    logps = np.log(np.float32([[[0.25, 0.5, 0.75]], [[1e-30, 0.999999, 1e-3]]]))
    expected = np.vectorize(oracle.log_odds)(np.float64(logps))
    close(run(losses.log_odds)(logps), expected, rtol=2e-6)
    close(losses.log_odds(jnp.float32(-LOG_2)), 0.0)
    assert losses.log_odds(jnp.zeros((2, 3), jnp.bfloat16)).dtype == jnp.float32


def test_log_odds_have_a_finite_slope_next_to_certainty(run):
    logps = jnp.array([-1e-20, -1e-7, 0.0, -0.0, 1e4, -200.0, -1e4])
    values, pull_back = jax.vjp(run(losses.log_odds), logps)
    np.testing.assert_allclose(values, [46.0517, 16.1181, 69.0776, 69.0776, 69.0776, -200.0, -1e4], rtol=1e-6)
    # 1 / (1 - p), and nothing where p is taken for 1.
    np.testing.assert_allclose(pull_back(jnp.ones(7))[0], [1e20, 1e7, 0, 0, 0, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("chosen", [-1e-20, 0.0, -200.0])
@pytest.mark.parametrize("rejected", [-1e-20, 0.0, -200.0])
def test_orpo_is_finite_for_certain_and_for_impossible_responses(chosen, rejected):
    value, gradient = jax.value_and_grad(lambda policy: losses.orpo(policy).sum())(jnp.array([[chosen, rejected]]))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_orpo_without_a_penalty_is_nll_and_equal_odds_cost_weight_times_log_2(close):
    policy = averages(29)
    close(losses.orpo(policy, weight=0.0), losses.nll(policy[:, 0]))
    close(losses.orpo(jnp.full((1, 2), -1.5), weight=0.4), [1.5 + 0.4 * LOG_2])


def test_orpo_of_unlikely_responses_is_a_plain_difference_of_logps(close):
    # 1 - p is 1: what feeding sums does to the odds.
    policy = averages(30) - 60
    difference = losses.cpo(policy, policy[:, 0], beta=1.0, alpha=0.0)
    close(losses.orpo(policy, weight=1.0) + policy[:, 0], difference, atol=1e-5)


def test_alphapo_with_alpha_0_is_simpo_traced_or_not(close):
    policy = averages(31)
    simpo = losses.simpo(policy, beta=2.5, gamma=0.5)
    alphapo = functools.partial(losses.alphapo, policy, beta=2.5, gamma=0.5)
    close(alphapo(alpha=0.0), simpo)
    close(jax.jit(lambda alpha: alphapo(alpha=alpha))(0.0), simpo)
    for tiny in (1e-7, -1e-7, 1e-30, -1e-40):
        close(alphapo(alpha=tiny), simpo, atol=1e-5)
    close(
        gradient_of(losses.alphapo, policy, beta=2.5, gamma=0.5, alpha=0.0),
        gradient_of(losses.simpo, policy, beta=2.5, gamma=0.5),
    )


def test_alphapo_leaves_simpo_smoothly():
    # r = avg - alpha avg^2 / 2 + ..., so at equal averages' difference d the slope in alpha is known.
    policy = jnp.array([[-1.0, -2.0]])
    slope = jax.grad(lambda alpha: losses.alphapo(policy, beta=1.0, gamma=0.0, alpha=alpha).sum())
    sigmoid = 1 / (1 + np.exp(1.0))
    for alpha in (0.0, 1e-20, -1e-20):
        np.testing.assert_allclose(slope(alpha), -sigmoid * (-0.5 + 2.0), rtol=1e-5)


def test_alphapo_s_reward_has_the_slope_p_to_the_minus_alpha(close):
    policy = averages(32)
    for alpha in (1.0, 0.3, -0.5):
        # With gamma far above all rewards the loss is gamma - beta (r_w - r_l).
        gradient = gradient_of(losses.alphapo, policy, beta=1.0, gamma=1e5, alpha=alpha)
        slope = np.exp(-alpha * np.float64(policy)) * np.float32([[-1.0, 1.0]])
        close(gradient, slope, rtol=1e-5)


def test_alphapo_goes_on_as_a_straight_line_where_float32_ends():
    def reward(average, alpha=0.5):
        return -losses.alphapo(jnp.array([[average, 0.0]]), beta=1.0, gamma=0.0, alpha=alpha)[0]

    value, slope = jax.vmap(jax.value_and_grad(reward))(jnp.array([-159.0, -200.0, -1e4]))
    np.testing.assert_allclose(value[0], -np.expm1(79.5) / 0.5, rtol=1e-4)
    line = np.expm1(80.0) / 80.0
    np.testing.assert_allclose(value[1:], [-200.0 * line, -1e4 * line], rtol=1e-5)
    np.testing.assert_allclose(slope[1:], [line, line], rtol=1e-5)


# Keeping the chosen response likely.


def test_rpo_adds_eta_beta_nats_of_the_chosen_response_and_no_more(close):
    policy, reference = log_probs(33)
    plain = losses.dpo(policy, reference, beta=0.3)
    np.testing.assert_array_equal(losses.rpo(policy, reference, beta=0.3, eta=0.0), plain)
    close(losses.rpo(policy, reference, beta=0.3, eta=0.2), plain + 0.06 * losses.nll(policy[:, 0]))
    extra = gradient_of(losses.rpo, policy, reference, beta=0.3, eta=0.2) - gradient_of(
        losses.dpo, policy, reference, beta=0.3
    )
    close(extra, np.tile([-0.06, 0.0], (24, 1)))


def test_dpop_is_dpo_where_the_chosen_response_has_not_lost(close):
    policy, reference = log_probs(34)
    lost = policy[:, 0] < reference[:, 0]
    assert lost.any() and not lost.all()
    plain, penalised = losses.dpo(policy, reference, beta=0.3), losses.dpop(policy, reference, beta=0.3, penalty=5.0)
    np.testing.assert_array_equal(penalised[~lost], plain[~lost])
    assert (penalised[lost] > plain[lost]).all()
    np.testing.assert_array_equal(losses.dpop(policy, reference, beta=0.3, penalty=0.0), plain)
    # Where training starts the penalty has no gradient either.
    close(gradient_of(losses.dpop, policy, policy, beta=0.3), gradient_of(losses.dpo, policy, policy, beta=0.3))


def test_dpop_charges_for_making_both_less_likely():
    reference = jnp.zeros((1, 2))
    together = jnp.array([[-1.0, -1.0]])
    gradient = gradient_of(losses.dpop, together, reference, beta=0.1, penalty=5.0)
    # beta sigmoid(beta lambda) = 0.1 sigmoid(0.5), six times as much for the chosen response.
    push = 0.1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(gradient, [[-6 * push, push]], rtol=1e-6)


def test_cal_dpo_is_calibrated_at_one_over_two_beta(close):
    target = 1 / (2 * 0.25)
    policy, reference = at_margin(2 * target)
    close(losses.cal_dpo(policy, reference, beta=0.25), [np.log1p(np.exp(-2 * target))])
    # There only the logistic term pulls; a nat further on, the squares pull back.
    pull = gradient_of(losses.cal_dpo, policy, reference, beta=0.25, coefficient=0.5)
    close(pull, gradient_of(losses.dpo, policy, reference, beta=1.0))
    beyond = gradient_of(losses.cal_dpo, policy + jnp.array([[1.0, -1.0]]), reference, beta=0.25, coefficient=0.5)
    assert beyond[0, 0] > 0.9 and beyond[0, 1] < -0.9


def test_cal_dpo_without_squares_is_dpo_with_beta_1_and_starts_at_a_known_value(close):
    policy, reference = log_probs(35)
    plain = losses.dpo(policy, reference, beta=1.0)
    np.testing.assert_array_equal(losses.cal_dpo(policy, reference, beta=0.05, coefficient=0.0), plain)
    close(losses.cal_dpo(policy, policy, beta=0.05, coefficient=0.5), np.full(24, LOG_2 + 0.5 / (2 * 0.05**2)))
