"""Ranking accuracies against loops, and how they differ from one another."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.eval import ranking as module
from palign.eval.ranking import (
    flip_buckets,
    full_ranking_accuracy,
    idealised_accuracy_range,
    idealised_ranking_accuracy,
    implicit_reward_accuracy,
    ranking_accuracy,
)
from tests.oracles import diagnostics as oracle


def random_logps(seed, pairs=64):
    rng = np.random.default_rng(seed)
    policy = -rng.gamma(4.0, 4.0, (pairs, 2)).astype(np.float32)
    return policy, (policy + rng.normal(0.0, 4.0, (pairs, 2))).astype(np.float32)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_ranking_accuracy_counts_equal_log_probabilities_as_right():
    policy, _ = random_logps(0)
    policy[:2] = -3.0
    found = jax.jit(ranking_accuracy)(policy)
    assert found.dtype == bool and found[:2].all() and not found.all()
    np.testing.assert_array_equal(found, oracle.ranking_accuracy(policy))
    assert ranking_accuracy(jnp.array([[1e4, -1e4], [-1e4, 1e4]])).tolist() == [True, False]


def test_reward_accuracy_is_strict_and_not_ranking_accuracy():
    policy, reference = random_logps(1)
    found = jax.jit(implicit_reward_accuracy)(policy, reference)
    np.testing.assert_array_equal(found, oracle.implicit_reward_accuracy(policy, reference, 0.1))
    assert (np.asarray(found) != np.asarray(ranking_accuracy(policy))).any()
    assert not implicit_reward_accuracy(policy, policy).any()


def test_a_full_ranking_is_right_only_if_every_place_is():
    rng = np.random.default_rng(2)
    scores, valid = rng.integers(0, 3, (256, 4)).astype(np.float32), rng.random((256, 4)) < 0.8
    policy = (scores + rng.integers(-1, 2, (256, 4)) * 0.75).astype(np.float32)  # some in order, some tied
    policy[~valid], scores[~valid] = np.nan, np.nan
    found = np.asarray(jax.jit(full_ranking_accuracy)(policy, scores, valid))
    np.testing.assert_array_equal(found, oracle.full_ranking_accuracy(policy, scores, valid))
    assert 0.1 < found.mean() < 0.9


def test_a_full_ranking_of_two_is_ranking_accuracy_and_nothing_to_rank_is_right():
    policy, _ = random_logps(3)
    policy[0] = -2.0
    scores, valid = np.tile(np.float32([1.0, 0.0]), (64, 1)), np.ones((64, 2), bool)
    np.testing.assert_array_equal(full_ranking_accuracy(policy, scores, valid), ranking_accuracy(policy))
    assert full_ranking_accuracy(policy, scores, np.zeros((64, 2), bool)).all()
    assert full_ranking_accuracy(policy, scores * 0, valid).all()


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.5, "each"])
def test_idealised_accuracy_is_the_ratio_of_probabilities_of_the_paper(beta, alpha):
    _, reference = random_logps(4)
    alpha = np.random.default_rng(5).uniform(0.5, 0.99, 64).astype(np.float32) if alpha == "each" else alpha
    found = jax.jit(lambda r: idealised_ranking_accuracy(r, beta=beta, alpha=alpha))(reference)
    np.testing.assert_array_equal(found, oracle.idealised_ranking_accuracy(reference, beta, alpha))


def test_idealised_accuracy_is_strict_where_raters_are_divided():
    assert not idealised_ranking_accuracy(jnp.full((1, 2), -3.0), beta=0.1, alpha=0.5).any()
    ahead = jnp.array([[-3.0, -3.5]])
    assert idealised_ranking_accuracy(ahead, beta=0.1, alpha=0.5).all()
    np.testing.assert_array_equal(ranking_accuracy(ahead), idealised_ranking_accuracy(ahead, beta=0.1, alpha=0.5))


def test_certain_labels_mean_999_in_a_thousand():
    nats = np.log(0.999 / 0.001) / 0.5
    around = jnp.array([[-nats - 0.01, 0.0], [-nats + 0.01, 0.0]], jnp.float32)
    for alpha in (1.0, 1, jnp.float32(1.0), jnp.ones(2)):
        assert idealised_ranking_accuracy(around, beta=0.5, alpha=alpha).tolist() == [False, True]
    np.testing.assert_array_equal(
        idealised_ranking_accuracy(around, beta=0.5), idealised_ranking_accuracy(around, beta=0.5, alpha=0.999)
    )
    # Raters who all prefer the rejected response undo as much.
    assert idealised_ranking_accuracy(-around, beta=0.5, alpha=0.0).tolist() == [True, False]


def test_idealised_accuracy_is_defined_at_the_ends_of_beta_and_of_margins():
    reference = jnp.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]])
    for beta in (1e-4, 0.01, 10.0):
        for alpha in (0.0, 0.5, 1.0):
            idealised = idealised_ranking_accuracy(reference, beta=beta, alpha=alpha)
            assert idealised[0] == (not (beta == 1e-4 and alpha == 0.0))
            assert idealised[1] == (beta == 1e-4 and alpha == 1.0)
            assert idealised[2] == (alpha == 1.0)


def test_the_range_over_beta_is_that_of_the_means():
    _, reference = random_logps(6)
    means = sorted(float(np.mean(oracle.idealised_ranking_accuracy(reference, b, 1.0))) for b in (0.1, 1.0, 5.0, 10.0))
    found = jax.jit(lambda r: idealised_accuracy_range(r, betas=(5.0, 0.1, 10.0, 1.0)))(reference)
    np.testing.assert_allclose(found, [means[0], (means[1] + means[2]) / 2, means[3]], rtol=1e-6)
    whole = idealised_accuracy_range(reference)
    assert 0 < whole.minimum < whole.median < whole.maximum == 1


def test_every_pair_is_in_exactly_one_bucket():
    policy, reference = random_logps(7)
    now, before = ranking_accuracy(policy), ranking_accuracy(reference)
    buckets = jax.jit(flip_buckets)(now, before)
    np.testing.assert_array_equal(np.sum(buckets, axis=0), 1)
    np.testing.assert_array_equal(buckets.stayed_right | buckets.turned_right, now)
    np.testing.assert_array_equal(buckets.stayed_right | buckets.turned_wrong, before)
    assert all(bucket.any() for bucket in buckets)


def test_f64_is_kept_where_f32_would_round_a_margin_away():
    with jax.enable_x64(True):
        close = np.array([[1e4 + 1e-9, 1e4]])
        assert ranking_accuracy(close[:, ::-1]).tolist() == [False]
        assert idealised_ranking_accuracy(close, beta=1.0, alpha=0.5).tolist() == [True]


def test_wrong_arguments_are_answered_with_their_name():
    pair, mask = jnp.zeros((3, 2)), jnp.ones(3, bool)
    with pytest.raises(ValueError, match=r"ranking_accuracy: policy_logps has shape \[3\]"):
        ranking_accuracy(jnp.zeros(3))
    with pytest.raises(ValueError, match="implicit_reward_accuracy: all shapes must be equal"):
        implicit_reward_accuracy(pair, jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="full_ranking_accuracy: valid has dtype float32; expected bool"):
        full_ranking_accuracy(pair, pair, pair)
    with pytest.raises(ValueError, match=r"full_ranking_accuracy: scores has shape \[3\]"):
        full_ranking_accuracy(pair, jnp.zeros(3), pair > 0)
    with pytest.raises(ValueError, match=r"idealised_ranking_accuracy: ref_logps has shape \[2, 3\]"):
        jax.jit(lambda r: idealised_ranking_accuracy(r, beta=0.1))(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"idealised_ranking_accuracy: alpha has shape \[2\].*\[3\]"):
        idealised_ranking_accuracy(pair, beta=0.1, alpha=jnp.ones(2))
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"idealised_ranking_accuracy: alpha is .* from 0 to 1"):
            idealised_ranking_accuracy(pair, beta=0.1, alpha=alpha)
    with pytest.raises(ValueError, match="idealised_ranking_accuracy: beta is 0"):
        idealised_ranking_accuracy(pair, beta=0.0)
    with pytest.raises(ValueError, match=r"idealised_accuracy_range: ref_logps has shape \[0, 2\]"):
        idealised_accuracy_range(jnp.zeros((0, 2)))
    with pytest.raises(ValueError, match="there are 0 betas"):
        idealised_accuracy_range(pair, betas=())
    with pytest.raises(ValueError, match=r"flip_buckets: ref_correct has shape \[2\], policy_correct \[3\]"):
        flip_buckets(mask, mask[:2])
    with pytest.raises(ValueError, match=r"flip_buckets: policy_correct has shape \[3, 2\]"):
        flip_buckets(pair > 0, pair > 0)
    with pytest.raises(ValueError, match="flip_buckets: policy_correct has dtype float32"):
        flip_buckets(pair[:, 0], mask)


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(module)
    assert result.attempted > 10 and not result.failed
