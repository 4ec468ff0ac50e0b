"""Losses of reward models: identities. Oracles and extremes are in test_every_loss.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.losses.cases.reward import CASES, vectors
from tests.oracles import reward_losses as oracle


def rewards(seed, size=9):
    return np.float32(np.random.default_rng(seed).normal(0.0, 2.0, (size, 2)))


def embeddings(seed, size=5, **layout):
    return tuple(np.float32(array) for array in vectors(np.random.default_rng(seed), size, **layout))


# Bradley-Terry


def test_bradley_terry_starts_at_log_2_and_its_gradient_is_the_probability_of_losing(close):
    close(losses.bradley_terry(jnp.full((2, 2), 3.5)), np.full(2, np.log(2)))
    given = rewards(0)
    losing = 1 / (1 + np.exp(np.float64(given[:, 0]) - given[:, 1]))
    gradient = jax.grad(lambda r: losses.bradley_terry(r).sum())(given)
    close(gradient, np.stack([-losing, losing], axis=1))


def test_bradley_terry_of_implicit_rewards_is_dpo(close):
    policy, reference = rewards(1), rewards(2)
    close(losses.bradley_terry(np.float32(0.3) * (policy - reference)), losses.dpo(policy, reference, beta=0.3))


def test_what_both_rewards_share_does_not_count_unless_they_are_centred(close):
    given, margins = rewards(3), np.float32(np.arange(9))
    for loss in (losses.bradley_terry, losses.bradley_terry_margin, losses.bradley_terry_scaled):
        rest = () if loss is losses.bradley_terry else (margins,)
        close(loss(given + 4, *rest), loss(given, *rest), rtol=1e-5, atol=1e-5)
    gap = losses.bradley_terry_centred(given, coefficient=0.5) - losses.bradley_terry(given)
    close(gap, 0.5 * np.float64(given).sum(1) ** 2, rtol=1e-5, atol=1e-5)


def test_a_margin_is_a_lead_that_is_asked_for(close):
    given, margins = rewards(4), np.float32(np.linspace(0, 4, 9))
    ahead = given + np.stack([margins, np.zeros(9, np.float32)], axis=1)
    close(losses.bradley_terry_margin(ahead, margins), losses.bradley_terry(given), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        losses.bradley_terry_margin(given, np.zeros(9, np.float32)), losses.bradley_terry(given)
    )


def test_a_scale_of_3_is_the_pair_three_times(close):
    given = rewards(5)
    close(losses.bradley_terry_scaled(given, np.full(9, 3, np.float32)), 3 * np.asarray(losses.bradley_terry(given)))
    assert not np.any(losses.bradley_terry_scaled(given, np.zeros(9, np.float32)))


def test_margins_may_be_bf16_or_whole_numbers(close):
    given, whole = rewards(6, 3), np.array([1, 2, 3])
    for loss in (losses.bradley_terry_margin, losses.bradley_terry_scaled):
        expected = loss(given, np.float32(whole))
        np.testing.assert_array_equal(loss(given, whole), expected)
        np.testing.assert_array_equal(loss(given, jnp.asarray(whole, jnp.bfloat16)), expected)


def test_centring_alone_pulls_at_the_mean_reward(close):
    tied = jnp.array([[2.0, 2.0], [-1.0, -1.0]])
    gradient = jax.grad(lambda r: losses.bradley_terry_centred(r, coefficient=0.25).sum())(tied)
    close(np.asarray(gradient).sum(1), 2 * 2 * 0.25 * np.array([4.0, -2.0]))  # Bradley-Terry's own part cancels


# Regression on attributes


def test_regression_averages_over_the_known_grades_only(close):
    predictions, targets = np.float32([[1, 2, 3], [4, 5, 6]]), np.float32([[2, 0, 9], [1, 1, 1]])
    every = np.ones((2, 3), bool)
    close(losses.masked_regression(predictions, targets, every), ((predictions - targets) ** 2).mean(1))
    some = np.array([[1, 1, 0], [0, 0, 1]], bool)
    close(losses.masked_regression(predictions, targets, some), [(1 + 4) / 2, 25])


def test_unknown_grades_may_hold_anything_and_get_no_gradient():
    predictions, valid = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0], [jnp.nan, jnp.nan]]), np.eye(3, 2, dtype=bool)
    targets = jnp.array([[3.0, jnp.inf], [jnp.nan, 1.0], [jnp.nan, 0.0]])
    values, gradient = jax.value_and_grad(lambda p: losses.masked_regression(p, targets, valid).sum())(predictions)
    assert values == 4 + 1
    np.testing.assert_array_equal(gradient, [[-4, 0], [0, 2], [0, 0]])


# General preferences


def test_general_scores_are_antisymmetric_and_nobody_beats_himself():
    scores = np.asarray(losses.gpm_scores(*embeddings(7, responses=5)))
    np.testing.assert_array_equal(scores, -scores.swapaxes(1, 2))
    assert not np.diagonal(scores, axis1=1, axis2=2).any()


def test_general_scores_can_go_round_in_a_circle():
    angles = 2 * np.pi * np.arange(3) / 3
    circle = np.float32(np.stack([np.cos(angles), np.sin(angles)], axis=-1))[None]
    scores = np.asarray(losses.gpm_scores(circle, np.ones((1, 1), np.float32)))[0]
    assert scores[0, 1] > 0.5 and scores[1, 2] > 0.5 and scores[2, 0] > 0.5  # rock, paper, scissors


def test_no_rewards_do_better_than_guessing_on_a_circle_but_general_scores_do():
    turn = np.array([[0, 1], [1, 2], [2, 0]])  # chosen, rejected
    for seed in range(5):
        given = np.float32(np.random.default_rng(seed).normal(0, 1, 3))
        assert losses.bradley_terry(given[turn]).mean() >= np.float32(np.log(2))
    angles = 2 * np.pi * turn / 3
    circle = np.float32(np.stack([np.cos(angles), np.sin(angles)], axis=-1))
    assert (losses.gpm(circle, np.ones((3, 1), np.float32), temperature=0.1) < 1e-3).all()


def test_vectors_of_a_reward_and_1_are_bradley_terry(close):
    given = rewards(8)
    as_vectors, ones = np.stack([given, np.ones_like(given)], axis=-1), np.ones((9, 1), np.float32)
    close(losses.gpm_scores(as_vectors, ones)[:, 0, 1], given[:, 0] - given[:, 1])
    close(losses.gpm(as_vectors, ones, temperature=1.0), losses.bradley_terry(given))
    close(losses.gpm(as_vectors, ones, temperature=0.25), losses.bradley_terry(4 * given))


def test_turning_all_vectors_together_changes_nothing(close):
    given, scales = embeddings(9, pairs=1)
    turn = np.float32([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    close(losses.gpm(given @ turn, scales), losses.gpm(given, scales), rtol=1e-5, atol=1e-5)


def test_scales_of_general_scores_multiply_their_coordinates_and_learn(close):
    given, scales = embeddings(10)
    stretched = given.copy()
    stretched[:, 0] *= np.repeat(scales, 2, axis=-1)
    ones = np.ones_like(scales)
    close(losses.gpm_scores(given, scales)[:, 0, 1], losses.gpm_scores(stretched, ones)[:, 0, 1], rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda scales: losses.gpm(given, scales).sum())(scales)
    assert np.asarray(gradient).any()


def test_swapping_the_responses_changes_the_general_loss_by_the_score(close):
    given, scales = embeddings(11)
    change = losses.gpm(given[:, ::-1], scales, temperature=0.5) - losses.gpm(given, scales, temperature=0.5)
    close(change, oracle.gpm_scores(given, scales)[:, 0, 1] / 0.5, rtol=1e-5, atol=1e-5)


# Arguments


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_defaults_are_the_oracle_s_too(case, close):
    arrays = [np.float32(a) if a.dtype == np.float64 else a for a in case.arrays(np.random.default_rng(12), 5)]
    close(case.loss(*arrays), case.oracle(*arrays), rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.hyper], ids=lambda case: case.title)
def test_hyper_parameters_may_be_traced_and_have_gradients(case):
    arrays = case.arrays(np.random.default_rng(13), 4)
    singles = [np.float32(a) if a.dtype == np.float64 else a for a in arrays]
    hyper = {name: jnp.float32(value) for name, value in case.hyper.items()}
    value, slopes = jax.jit(jax.value_and_grad(lambda hyper: case.loss(*singles, **hyper).sum()))(hyper)
    np.testing.assert_allclose(value, case.oracle(*arrays, **case.hyper).sum(), rtol=1e-5)
    for name, slope in slopes.items():
        up, down = (case.oracle(*arrays, **{**case.hyper, name: case.hyper[name] + s}).sum() for s in (1e-6, -1e-6))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-3, atol=1e-4, err_msg=name)


def test_wrong_arguments_are_answered_with_their_name():
    pair, three = jnp.zeros((3, 2)), jnp.zeros(3)
    with pytest.raises(ValueError, match=r"bradley_terry: rewards has shape \[3\]; expected \[B, 2\]"):
        losses.bradley_terry(three)
    with pytest.raises(ValueError, match=r"bradley_terry_margin: all shapes must be equal, got margins \[3, 2\]"):
        losses.bradley_terry_margin(pair, pair)
    with pytest.raises(ValueError, match=r"bradley_terry_scaled: .*margins \[2\]"):
        losses.bradley_terry_scaled(pair, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"bradley_terry_centred: coefficient is -0\.01"):
        losses.bradley_terry_centred(pair, coefficient=-0.01)
    with pytest.raises(ValueError, match=r"masked_regression: predictions has shape \[3\]; expected \[B, H\]"):
        losses.masked_regression(three, three, three > 0)
    with pytest.raises(ValueError, match="masked_regression: valid has dtype float32; expected bool"):
        losses.masked_regression(pair, pair, pair)
    with pytest.raises(ValueError, match=r"gpm_scores: embeddings has shape \[3, 2, 5\]; .* vectors of even length"):
        losses.gpm_scores(jnp.zeros((3, 2, 5)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"gpm: weights has shape \[3, 4\]; expected \[3, 2\]"):
        losses.gpm(jnp.zeros((3, 2, 4)), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"gpm: embeddings has shape \[3, 4, 2\]; expected \[B, 2, 2k\]"):
        losses.gpm(jnp.zeros((3, 4, 2)), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"gpm: temperature is 0\.0"):
        losses.gpm(jnp.zeros((3, 2, 2)), jnp.ones((3, 1)), temperature=0.0)
