"""The listwise losses: extremes, padding, invariances, and the identities that tie them to DPO and to each other."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from palign import losses
from tests.losses.cases.listwise import CASES as EVERY_CASE
from tests.oracles import listwise_losses as oracle

plackett_luce = jax.jit(losses.plackett_luce, static_argnames=("beta", "top"))
lipo_lambda = jax.jit(losses.lipo_lambda, static_argnames="beta")
lipo_pair_logistic = jax.jit(losses.lipo_pair_logistic, static_argnames="beta")
listnet = jax.jit(losses.listnet, static_argnames=("beta", "temperature"))
exo = jax.jit(losses.exo, static_argnames=("beta", "temperature"))
nca = jax.jit(losses.nca, static_argnames=("beta", "temperature"))

# name -> (loss, oracle), with the cases' hyper-parameters
CASES = {
    case.title: (jax.jit(functools.partial(case.loss, **case.hyper)), functools.partial(case.oracle, **case.hyper))
    for case in EVERY_CASE
}
LOSSES = list(CASES)
# Those that compare responses: nothing is paid for a list whose labels are all equal.
COMPARING = ["plackett_luce", "plackett_luce_top_2", "lipo_lambda", "lipo_pair_logistic", "lipo_pair_hinge"]
# Those of differences of scores: a constant added to all log-ratios of a prompt changes nothing.
RELATIVE = [*COMPARING, "lipo_softmax", "listnet", "info_nca", "exo"]
ABSOLUTE = [name for name in LOSSES if name not in RELATIVE]
# Those that look at the labels' differences only.
SHIFTED_LABELS = [*[n for n in COMPARING if n != "lipo_lambda"], "listnet", "info_nca", "nca", "exo"]


def lists(seed, size=40, length=6, dtype=np.float32):
    """Lists with ties among the labels, padding anywhere, and a few extreme log-ratios."""
    rng = np.random.default_rng(seed)
    policy = -rng.gamma(4.0, 6.0, (size, length))
    reference = policy + rng.normal(0.0, 5.0, (size, length))
    policy[:3] += rng.choice([-1e4, 0.0, 1e4], (3, length))
    labels = rng.integers(0, 4, (size, length)) / 4
    valid = rng.random((size, length)) < 0.7
    valid[3:6] = [[False], [True], [True]]
    labels[5] = 0.5
    arrays = (array.astype(np.float32).astype(dtype) for array in (policy, reference, labels))
    return *arrays, valid


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_oracle_s_in_f32_and_x64(name, close):
    loss, expected = CASES[name]
    arrays = lists(0)
    close(loss(*arrays), expected(*(np.float64(a) if a.dtype != bool else a for a in arrays)))
    with jax.enable_x64(True):
        arrays = lists(0, dtype=np.float64)
        actual = loss(*arrays)
        assert actual.dtype == jnp.float64
        close(actual, expected(*arrays), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_two_derivatives_agree_with_finite_differences(name):
    with jax.enable_x64(True):
        policy, *rest = (array[3:9, :4] for array in lists(1, dtype=np.float64))
        check_grads(lambda policy: CASES[name][0](policy, *rest), (policy,), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_the_probabilities_of_all_orders_sum_to_1(length):
    with jax.enable_x64(True):
        labels = np.array(list(itertools.permutations(range(length))), np.float64)
        policy = np.tile(np.random.default_rng(length).normal(0, 8, length), (len(labels), 1))
        loss = plackett_luce(policy, np.zeros_like(policy), labels, np.ones_like(labels, bool), beta=0.2)
        np.testing.assert_allclose(np.exp(-np.asarray(loss)).sum(), 1.0, rtol=1e-12)


def test_the_loss_of_each_place_adds_up_over_top():
    policy, reference, _, _ = lists(2, length=4)
    labels, valid = np.tile(np.float32([3, 2, 1, 0]), (len(policy), 1)), np.ones(policy.shape, bool)
    whole = plackett_luce(policy, reference, labels, valid)
    np.testing.assert_array_equal(plackett_luce(policy, reference, labels, valid, top=3), whole)
    np.testing.assert_array_equal(plackett_luce(policy, reference, labels, valid, top=99), whole)
    best_of_four = plackett_luce(policy, reference, labels, valid, top=1)
    tail = plackett_luce(policy[:, 1:], reference[:, 1:], labels[:, 1:], valid[:, 1:])
    np.testing.assert_allclose(best_of_four + tail, whole, rtol=2e-6, atol=1e-6)


def test_with_two_responses_plackett_luce_is_exactly_dpo():
    policy, reference, _, _ = lists(3, length=2)
    labels, valid = np.tile(np.float32([1, 0]), (len(policy), 1)), np.ones(policy.shape, bool)
    pairwise = losses.dpo(policy, reference, beta=0.1)
    np.testing.assert_array_equal(plackett_luce(policy, reference, labels, valid, beta=0.1), pairwise)
    swapped = plackett_luce(policy[:, ::-1], reference[:, ::-1], labels[:, ::-1], valid, beta=0.1)
    np.testing.assert_array_equal(swapped, pairwise)


def test_with_two_responses_lipo_is_dpo_times_a_constant(close):
    policy, reference, _, _ = lists(4, length=2)
    labels, valid = np.tile(np.float32([0.9, 0.3]), (len(policy), 1)), np.ones(policy.shape, bool)
    swap = (2**0.9 - 2**0.3) * (1 / np.log(2) - 1 / np.log(3))
    assert abs(1 / np.log(2) - 1 / np.log(3) - 0.53246) < 1e-5
    close(
        lipo_lambda(policy, reference, labels, valid, beta=0.1),
        swap * np.float64(losses.dpo(policy, reference, beta=0.1)),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_padding_adds_nothing_even_if_it_is_not_a_number(name, close, value_and_gradient):
    loss, _ = CASES[name]
    arrays = lists(5, size=8, length=4)[:3]
    valid = np.ones((8, 4), bool)
    expected, expected_gradient = value_and_gradient(loss, *arrays, valid)
    for filler in (np.nan, np.inf, -np.inf):
        padded = [np.insert(array, [0, 2, 4], np.float32(filler), axis=1) for array in arrays]
        keep = np.insert(valid, [0, 2, 4], False, axis=1)
        value, gradient = value_and_gradient(loss, *padded, keep)
        close(value, expected)
        close(gradient[keep].reshape(8, 4), expected_gradient)
        assert not gradient[~keep].any()


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_responses_does_not_matter(name, close, value_and_gradient):
    loss, _ = CASES[name]
    arrays = lists(6)
    expected, expected_gradient = value_and_gradient(loss, *arrays)
    order = np.random.default_rng(0).permutation(6)
    value, gradient = value_and_gradient(loss, *(array[:, order] for array in arrays))
    close(value, expected)
    close(gradient, expected_gradient[:, order])


def test_equal_scores_are_ranked_by_index_so_that_lipo_learns_from_the_first_step(close, value_and_gradient):
    zeros, valid = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
    ordered, reversed_ = jnp.array([[1.0, 0.5, 0.0]]), jnp.array([[0.0, 0.5, 1.0]])
    loss, gradient = value_and_gradient(lipo_lambda, zeros, zeros, ordered, valid)
    close(loss, oracle.lipo_lambda(zeros, zeros, ordered, valid, 0.05))
    assert gradient[0, 0] < 0 < gradient[0, 2]
    # Index order breaks the tie, so here, and only here, the order of the responses shows.
    other = lipo_lambda(zeros, zeros, reversed_, valid)
    close(other, oracle.lipo_lambda(zeros, zeros, reversed_, valid, 0.05))
    assert abs(float(other[0]) - float(loss[0])) > 1e-3
    # An invalid slot of equal score takes no rank.
    padded = lipo_lambda(
        jnp.zeros((1, 4)), jnp.zeros((1, 4)), jnp.array([[9.0, 1.0, 0.5, 0.0]]), jnp.array([[False, True, True, True]])
    )
    close(padded, loss)


@pytest.mark.parametrize("name", LOSSES)
def test_lists_without_a_preference_cost_nothing_and_pull_nowhere(name, run, value_and_gradient):
    loss, _ = CASES[name]
    policy = np.float32([[1e4, -3.0, 2.0], [np.nan, np.nan, np.nan], [np.nan, 5.0, np.inf]])
    labels = np.float32([[0.5, 0.5, 0.5], [np.nan, 1.0, 0.0], [1.0, 0.0, 2.0]])
    valid = np.array([[True, True, True], [False, False, False], [False, True, False]])
    value, gradient = value_and_gradient(run(loss), policy, np.zeros_like(policy), labels, valid)
    assert not value.any() and not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_for_the_whole_list_changes_nothing_and_gradients_sum_to_0(name, close, value_and_gradient):
    loss, _ = CASES[name]
    policy, *rest = (array[6:] for array in lists(7))
    value, gradient = value_and_gradient(loss, policy, *rest)
    close(loss(policy + 8, *rest), value, rtol=1e-5, atol=1e-5)
    close(gradient.sum(-1), np.zeros(len(gradient)))
    reference_gradient = jax.grad(lambda reference: loss(policy, reference, *rest[1:]).sum())(rest[0])
    assert not np.asarray(reference_gradient).any()


def test_tied_responses_share_a_denominator(close):
    zeros, valid = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
    close(plackett_luce(zeros, zeros, jnp.array([[1.0, 1.0, 0.0]]), valid), [2 * np.log(3)])
    close(plackett_luce(zeros, zeros, jnp.array([[1.0, 0.0, 0.0]]), valid), [np.log(3)])


def test_wrong_arguments_are_answered_with_their_name():
    logps, valid = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="plackett_luce: valid has dtype float32; expected bool"):
        losses.plackett_luce(logps, logps, logps, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"lipo_lambda: all shapes must be equal.*labels \[2, 1\]"):
        losses.lipo_lambda(logps, logps, logps[:, :1], valid)
    with pytest.raises(ValueError, match=r"lipo_lambda: policy_logps has shape \[6\]"):
        losses.lipo_lambda(logps.ravel(), logps, logps, valid)
    with pytest.raises(ValueError, match="top is 0"):
        losses.plackett_luce(logps, logps, logps, valid, top=0)
