"""The loss at which a ranking turns: the theorems of the ranking paper, on random pairs."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from palign.eval import difficulty as module
from palign.eval.difficulty import difficulty, dpo_loss_bound, ipo_loss_bound
from palign.eval.ranking import ranking_accuracy
from tests.oracles import diagnostics as oracle


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def random_pairs(seed, pairs=400):
    """Policies that have moved from their references by more and by less than the references are wrong, float64."""
    rng = np.random.default_rng(seed)
    reference = -rng.gamma(4.0, 4.0, (pairs, 2))
    return reference + rng.normal(0.0, 8.0, (pairs, 2)), reference


def test_difficulty_is_the_log_of_a_ratio_of_probabilities():
    _, reference = random_pairs(0)
    expected = [np.log(np.exp(rejected) / np.exp(chosen)) for chosen, rejected in reference]
    with jax.enable_x64(True):
        found = jax.jit(difficulty)(reference)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert difficulty(jnp.array([[-1e4, 1e4]], jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_a_pair_is_ranked_right_if_and_only_if_its_dpo_loss_reaches_the_bound(beta):
    policy, reference = random_pairs(1)
    loss = oracle.dpo_loss(policy, reference, beta)
    with jax.enable_x64(True):
        reached = loss <= np.asarray(dpo_loss_bound(difficulty(reference), beta=beta))
        ours = np.asarray(losses.dpo(policy, reference, beta=beta) <= dpo_loss_bound(difficulty(reference), beta=beta))
    right = oracle.ranking_accuracy(policy)
    np.testing.assert_array_equal(reached, right)
    np.testing.assert_array_equal(ours, right)
    assert 0.2 < right.mean() < 0.8
    # The bound is about the ranking, not the reward: a falling loss alone does not tell.
    assert (right != (loss < np.log(2))).any()


def test_the_paper_s_numbers():
    bounds = dpo_loss_bound(jnp.array([0.0, 20.0, 100.0]), beta=0.1)
    np.testing.assert_allclose(bounds, [np.log(2), 0.127, 4.54e-5], rtol=2e-3)


def test_a_pair_that_the_reference_ranks_right_stays_right_at_a_loss_of_six_tenths():
    policy, reference = random_pairs(2)
    loss = oracle.dpo_loss(policy, reference, 0.1)
    low = (reference[:, 0] >= reference[:, 1]) & (loss <= 0.6)
    assert low.sum() > 20 and np.asarray(ranking_accuracy(policy[low])).all()
    assert (dpo_loss_bound(difficulty(reference[reference[:, 0] >= reference[:, 1]])) >= 0.693).all()
    # Without the first condition it does not hold.
    assert not np.asarray(ranking_accuracy(policy[loss <= 0.6])).all()


def test_an_ipo_loss_below_the_bound_ranks_right_and_one_of_zero_may_rank_wrong():
    tau = 0.1
    policy, reference = random_pairs(3)
    loss = oracle.ipo_loss(policy, reference, tau)
    with jax.enable_x64(True):
        bound = np.asarray(ipo_loss_bound(difficulty(reference), beta=tau))
    right = oracle.ranking_accuracy(policy)
    assert right[loss <= bound].all() and (loss <= bound).sum() > 20
    reachable = np.log(np.exp(reference[:, 0]) / np.exp(reference[:, 1])) >= -1 / (2 * tau)  # c' of the paper
    np.testing.assert_array_equal(bound >= 0, reachable)
    np.testing.assert_array_equal(bound[~reachable], -1.0)
    # Zero loss: the margin over the reference is exactly 1 / (2 tau).
    perfect = reference + np.array([1 / (2 * tau), 0.0])
    assert oracle.ipo_loss(perfect, reference, tau) == pytest.approx(np.zeros(400), abs=1e-20)
    np.testing.assert_array_equal(oracle.ranking_accuracy(perfect), reachable)
    # The bound is as high as it can be: just above it, on the side of too little margin, the ranking is wrong.
    short = reference[reachable] + np.stack([difficulty(reference[reachable]) - 0.01, np.zeros(reachable.sum())], 1)
    assert not oracle.ranking_accuracy(short).any()
    np.testing.assert_array_less(bound[reachable], oracle.ipo_loss(short, reference[reachable], tau))


def test_bounds_and_their_gradients_are_finite_for_extreme_difficulties():
    c = jnp.array([-1e4, -1.0, 0.0, 5.0, 1e4])
    for bound in (dpo_loss_bound, ipo_loss_bound):
        for beta in (0.01, 0.1, 10.0):
            values, gradient = jax.value_and_grad(lambda c, b=bound, beta=beta: b(c, beta=beta).sum())(c)
            assert np.isfinite(values) and np.isfinite(gradient).all()


def test_beta_may_be_traced_and_shapes_are_kept():
    c = jnp.arange(6.0).reshape(2, 3)
    for bound in (dpo_loss_bound, ipo_loss_bound):
        np.testing.assert_allclose(jax.jit(bound)(c, beta=jnp.float32(0.2)), bound(c, beta=0.2), rtol=1e-6)


def test_wrong_arguments_are_answered_with_their_name():
    with pytest.raises(ValueError, match=r"difficulty: ref_logps has shape \[3\]"):
        difficulty(jnp.zeros(3))
    with pytest.raises(ValueError, match="dpo_loss_bound: beta is 0"):
        dpo_loss_bound(jnp.zeros(3), beta=0.0)
    with pytest.raises(ValueError, match="ipo_loss_bound: beta is nan"):
        ipo_loss_bound(jnp.zeros(3), beta=float("nan"))


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(module)
    assert result.attempted > 5 and not result.failed
