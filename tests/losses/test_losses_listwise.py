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
info_nca = jax.jit(losses.info_nca, static_argnames=("beta", "temperature"))
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
def test_the_loss_is_the_oracle_s_where_log_ratios_are_extreme_and_lists_are_empty(name, close):
    loss, expected = CASES[name]
    arrays = lists(0)
    close(loss(*arrays), expected(*(np.float64(a) if a.dtype != bool else a for a in arrays)))


# The sums of squares, and the losses that are the same function, have nothing new here; the hinge has no curvature.
@pytest.mark.parametrize("name", ["plackett_luce", "plackett_luce_top_2", "lipo_lambda", "listnet", "nca", "exo"])
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


def two_responses(best, seed=9):
    """Lists of two with the better one at `best`, and the same as pairs: better first."""
    policy, reference, _, _ = lists(seed, length=2)
    labels, valid = np.tile(np.float32([1, 0]), (len(policy), 1)), np.ones(policy.shape, bool)
    arrays = [array if best == 0 else array[:, ::-1] for array in (policy, reference, labels)]
    return (*arrays, valid), (policy, reference)


@pytest.mark.parametrize("best", [0, 1])
def test_with_two_responses_the_other_losses_of_the_table_are_dpo_and_its_hinge(best, close):
    lists_of_two, pairs = two_responses(best)
    dpo = np.float64(losses.dpo(*pairs, beta=0.1))
    close(lipo_pair_logistic(*lists_of_two, beta=0.1), dpo)
    close(losses.lipo_softmax(*lists_of_two, beta=0.1), dpo)
    # A hard choice: at this temperature the weights are 1 and 0.
    close(listnet(*lists_of_two, beta=0.1, temperature=1e-3), dpo)
    close(info_nca(*lists_of_two, beta=0.1, temperature=1e-3), dpo)
    close(losses.lipo_pair_hinge(*lists_of_two, beta=0.1), np.float64(losses.hinge(*pairs, beta=0.1)))


@pytest.mark.parametrize("best", [0, 1])
def test_with_two_responses_and_a_hard_choice_nca_is_the_one_for_pairs(best, close):
    lists_of_two, pairs = two_responses(best)
    close(nca(*lists_of_two, beta=0.1, temperature=1e-3), np.float64(losses.nca_pair(*pairs, beta=0.1)))


def test_with_two_responses_and_sure_matches_self_play_is_half_the_one_for_pairs(close):
    lists_of_two, pairs = two_responses(best=1)
    close(losses.sppo(*lists_of_two, beta=0.02), 0.5 * np.float64(losses.sppo_hard(*pairs, beta=0.02)))


def test_with_two_responses_exo_is_a_binary_kl_and_stationary_where_the_policy_has_the_target_s_odds(
    close, value_and_gradient
):
    epsilon, beta = 0.01, 0.1
    policy, reference, _, _ = lists(10, length=2)
    policy, reference = policy[3:], reference[3:]
    labels = np.tile(np.log(np.float32([1 - epsilon, epsilon])), (len(policy), 1))
    valid = np.ones(policy.shape, bool)
    gap = beta * np.diff(np.float64(reference) - np.float64(policy))[:, 0]
    log_p, log_q = -np.logaddexp(0, -gap), -np.logaddexp(0, gap)
    expected = np.exp(log_p) * (log_p - np.log(1 - epsilon)) + np.exp(log_q) * (log_q - np.log(epsilon))
    close(exo(policy, reference, labels, valid, beta=beta), expected)
    pairwise = losses.exo_pair(policy, reference, beta=beta, label_smoothing=epsilon)
    close(exo(policy, reference, labels, valid, beta=beta), np.float64(pairwise))
    at = np.float32([[np.log((1 - epsilon) / epsilon) / beta, 0.0]])
    value, gradient = value_and_gradient(exo, at, np.zeros_like(at), labels[:1], valid[:1])
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_lipo_lambda_is_the_pair_losses_weighed_by_what_a_swap_does(close):
    policy, reference, labels, valid = lists(11, length=4)
    ratios = np.where(valid, np.float64(policy) - reference, -np.inf)
    rank = np.argsort(np.argsort(-ratios, axis=-1, kind="stable"), axis=-1) + 1
    discount, gain = 1 / np.log1p(rank), 2 ** np.float64(labels)
    total = np.zeros(len(policy))
    for i, j in itertools.combinations(range(4), 2):
        pair = valid & np.isin(np.arange(4), (i, j))
        swap = np.abs(gain[:, i] - gain[:, j]) * np.abs(discount[:, i] - discount[:, j])
        total += swap * np.float64(lipo_pair_logistic(policy, reference, labels, pair, beta=0.1))
    close(lipo_lambda(policy, reference, labels, valid, beta=0.1), total)


def test_listnet_at_a_low_temperature_is_the_first_place_of_plackett_luce(close):
    policy, reference, _, valid = lists(12)
    labels = np.tile(np.float32([3, 1, 5, 2, 0, 4]), (len(policy), 1))
    expected = np.float64(plackett_luce(policy, reference, labels, valid, beta=0.1, top=1))
    close(listnet(policy, reference, labels, valid, beta=0.1, temperature=0.02), expected)


def test_exo_and_info_nca_are_the_two_kl_divergences_between_the_same_distributions():
    rewards = np.array([[0.3, -1.0, 2.0, 0.5]])
    valid = np.ones((1, 4), bool)
    with jax.enable_x64(True):
        policy = np.array([[-20.0, -31.0, -25.0, -28.0]])
        p, w = (jax.nn.softmax(x[0]) for x in (0.1 * policy, rewards / 0.5))
        arrays = (policy, np.zeros((1, 4)), rewards, valid)
        np.testing.assert_allclose(exo(*arrays, beta=0.1, temperature=0.5)[0], (p * jnp.log(p / w)).sum(), rtol=1e-12)
        forward = info_nca(*arrays, beta=0.1, temperature=0.5)[0] + (w * jnp.log(w)).sum()
        np.testing.assert_allclose(forward, (w * jnp.log(w / p)).sum(), rtol=1e-12)
        # Both have their minimum at the policy of the rewards.
        best = (rewards / 0.5 / 0.1, *arrays[1:])
        for loss in (exo, info_nca):
            gradient = jax.grad(lambda x, loss=loss: loss(x, *best[1:], beta=0.1, temperature=0.5).sum())(best[0])
            np.testing.assert_allclose(gradient, 0, atol=1e-15)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_a_partial_ranking_has_the_probability_of_all_the_orders_that_begin_with_it(length):
    with jax.enable_x64(True):
        scores = np.random.default_rng(length).normal(0, 1.5, length)
        orders = list(itertools.permutations(range(length)))
        weights = np.exp(scores)
        chances = [np.prod([weights[o[k]] / weights[list(o[k:])].sum() for k in range(length)]) for o in orders]
        labels = -np.argsort(np.array(orders), axis=-1).astype(np.float64)  # order o has its place for a label
        policy = np.tile(scores / 0.5, (len(orders), 1))
        others = np.zeros_like(policy), labels, np.ones_like(labels, bool)
        for top in range(1, length):
            begins = [sum(c for o, c in zip(orders, chances, strict=True) if o[:top] == p[:top]) for p in orders]
            loss = plackett_luce(policy, *others, beta=0.5, top=top)
            np.testing.assert_allclose(np.exp(-np.asarray(loss)), begins, rtol=1e-12)
            # The same as a tie for all places after the first ones: equal last labels state no preference.
            tied = np.where(labels > -top, labels, -float(length))
            np.testing.assert_allclose(plackett_luce(policy, others[0], tied, others[2], beta=0.5), loss, rtol=1e-12)


def test_self_play_is_at_its_minimum_where_log_ratios_are_what_the_matches_say(value_and_gradient):
    rates, valid = np.float32([[1.0, 0.5, 0.0]]), np.ones((1, 3), bool)
    optimum = (rates - np.float32(0.5)) * 8  # beta 1/8: 1 / (2 beta) = 4 nats for a sure win
    np.testing.assert_array_equal(optimum, [[4, 0, -4]])
    sppo = functools.partial(losses.sppo, beta=0.125)
    value, gradient = value_and_gradient(sppo, optimum, np.zeros_like(optimum), rates, valid)
    assert not value.any() and not gradient.any()
    policy = np.float32([[3.0, -2.0, 1.0]])
    np.testing.assert_array_equal(
        losses.gpo(policy, optimum, rates - np.float32(0.5), valid, beta=0.125),
        sppo(policy, optimum, rates, valid),
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
def test_a_list_of_padding_costs_nothing_and_pulls_nowhere(name, run, value_and_gradient):
    loss, _ = CASES[name]
    policy = np.float32([[np.nan, np.nan, np.nan], [np.inf, 5.0, -np.inf], [9.0, -3.0, 2.0]])
    labels = np.float32([[np.nan, 1.0, 0.0], [1.0, 0.0, np.inf], [1.0, 0.5, 0.0]])
    valid = np.array([[False] * 3, [False] * 3, [True] * 3])
    value, gradient = value_and_gradient(run(loss), policy, np.zeros_like(policy), labels, valid)
    assert not value[:2].any() and not gradient[:2].any()
    assert value[2] > 0 and gradient[2].any() and np.isfinite(gradient).all()


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.title)
def test_nothing_on_the_way_is_nan_so_that_jax_s_own_search_for_nan_stays_quiet(case):
    policy, reference, labels, valid = (np.float32(a) if a.dtype == float else a for a in case.extremes())
    with jax.debug_nans(True), jax.disable_jit():
        jax.grad(lambda policy: case.loss(policy, reference, labels, valid, **case.hyper).sum())(policy)


@pytest.mark.parametrize("name", COMPARING)
def test_lists_without_a_preference_cost_nothing_and_pull_nowhere(name, value_and_gradient):
    policy = np.float32([[1e4, -3.0, 2.0], [np.nan, 5.0, np.inf]])
    labels = np.float32([[0.5, 0.5, 0.5], [1.0, 0.0, 2.0]])
    valid = np.array([[True, True, True], [False, True, False]])
    value, gradient = value_and_gradient(CASES[name][0], policy, np.zeros_like(policy), labels, valid)
    assert not value.any() and not gradient.any()


@pytest.mark.parametrize("name", ["lipo_softmax", "listnet", "info_nca", "exo"])
def test_a_softmax_of_equal_labels_draws_the_scores_together_but_not_that_of_one_response(name, value_and_gradient):
    policy = np.float32([[3.0, -3.0, 0.0], [7.0, 1.0, 2.0], [2.0, 2.0, 2.0]])
    labels, valid = np.full((3, 3), np.float32(0.5)), np.array([[True] * 3, [True, False, False], [True] * 3])
    value, gradient = value_and_gradient(CASES[name][0], policy, np.zeros_like(policy), labels, valid)
    assert gradient[0, 0] > 0 > gradient[0, 1]
    assert value[1] == 0 and not gradient[1].any()
    np.testing.assert_allclose(gradient[2], 0, atol=1e-7)


@pytest.mark.parametrize("name", ABSOLUTE)
def test_a_loss_of_single_responses_pulls_one_response_alone(name, value_and_gradient):
    labels, valid = np.float32([[0.75, 0.0]]), np.array([[True, False]])
    policy = np.float32([[40.0, np.nan]])
    value, gradient = value_and_gradient(CASES[name][0], policy, np.zeros_like(policy), labels, valid)
    assert value[0] > 0 and gradient[0, 0] > 0 and gradient[0, 1] == 0


@pytest.mark.parametrize("name", RELATIVE)
def test_a_constant_for_the_whole_list_changes_nothing_and_gradients_sum_to_0(name, close, value_and_gradient):
    loss, _ = CASES[name]
    policy, *rest = (array[6:] for array in lists(7))
    value, gradient = value_and_gradient(loss, policy, *rest)
    close(loss(policy + 8, *rest), value, rtol=1e-5, atol=1e-5)
    close(gradient.sum(-1), np.zeros(len(gradient)))


@pytest.mark.parametrize("name", ABSOLUTE)
def test_a_constant_for_the_whole_list_counts_where_responses_stand_for_themselves(name):
    loss, _ = CASES[name]
    policy, *rest = (array[6:] for array in lists(7))
    moved = np.abs(np.asarray(loss(policy + 8, *rest)) - np.asarray(loss(policy, *rest)))
    assert (moved[rest[2].any(-1)] > 1e-3).all()


@pytest.mark.parametrize("name", SHIFTED_LABELS)
def test_a_constant_added_to_the_rewards_of_a_list_changes_nothing(name, close):
    loss, _ = CASES[name]
    policy, reference, labels, valid = (array[6:] for array in lists(8))
    close(loss(policy, reference, labels + 4, valid), np.float64(loss(policy, reference, labels, valid)), rtol=2e-6)


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
