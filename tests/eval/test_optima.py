"""What palign's losses find in expectation, against NumPy in float64 that lists responses by recursion.

What a sum of some hundred float64 terms of size 1 leaves is a few 1e-15; the tolerances are ten to a hundred times
that, and looser only where a solver stops.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from palign import losses
from palign.eval.enumerate import all_responses
from palign.eval.optima import (
    bradley_terry_preference,
    compare_lists,
    compare_pairs,
    divergence,
    ipo_optimum,
    kl_regularised_optimum,
    regularised_value,
    winner_logps,
)
from tests.eval.test_enumerate import conditional_logits, draw, response_logps, walk

BETA = 0.5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def small():
    """A space of 3 states and 7 responses, log-probabilities of the reference, rewards, and the optimum by hand."""
    space = all_responses(3, 2)
    table, rewards = draw(0, 3, 3), draw(1, 7)
    found = dict(walk(table, space.prefixes, 2))
    ref = np.array([found[response] for response in space.responses])
    return space, table, ref, rewards, log_softmax(ref + rewards / BETA)


def numpy_value(logps, ref, rewards):
    return np.exp(logps) @ rewards - BETA * np.exp(logps) @ (logps - ref)


def at_table(space, function):
    """Value and gradient, compiled, of a function of log-probabilities by the table behind them."""
    return jax.jit(jax.value_and_grad(lambda z: function(response_logps(space, z))))


def in_expectation(law, loss, ref):
    """The population value of a pairwise loss, or of a listwise one with its labels given."""
    return lambda policy: law.probability @ loss(policy[law.responses], jnp.asarray(ref)[law.responses])


def solve(space, function, start):
    """The distribution where a Newton method, from the start, finds no slope."""
    shape = np.shape(start)
    value_and_grad = at_table(space, function)
    hessian = jax.jit(jax.hessian(lambda z: function(response_logps(space, z.reshape(shape)))))

    def flat(z):
        value, gradient = value_and_grad(z.reshape(shape))
        return float(value), np.asarray(gradient).ravel()

    found = minimize(
        flat, np.ravel(start), jac=True, hess=lambda z: np.asarray(hessian(z)), method="trust-exact",
        options={"gtol": 1e-13, "maxiter": 100},
    )  # fmt: skip
    return np.asarray(response_logps(space, jnp.asarray(found.x.reshape(shape))))


def test_the_kl_regularised_optimum_is_the_tilted_reference_and_every_other_policy_loses_by_its_divergence():
    space, _, ref, rewards, best = small()
    found = kl_regularised_optimum(jnp.asarray(ref), jnp.asarray(rewards), beta=BETA)
    np.testing.assert_allclose(found.logps, best, rtol=1e-13)
    assert float(found.value) == pytest.approx(numpy_value(best, ref, rewards), rel=1e-13)
    value_and_grad = at_table(space, lambda p: regularised_value(p, jnp.asarray(ref), jnp.asarray(rewards), beta=BETA))
    table = np.asarray(conditional_logits(space, found.logps))
    value, gradient = value_and_grad(table)
    assert float(value) == pytest.approx(float(found.value), rel=1e-13)
    assert np.abs(gradient).max() < 1e-14
    for seed, size in itertools.product(range(5), (1e-3, 0.1, 3.0)):
        value, gradient = value_and_grad(table + size * draw(100 + seed, 3, 3))
        other = np.asarray(response_logps(space, table + size * draw(100 + seed, 3, 3)))
        loss = BETA * np.exp(other) @ (other - best)
        assert float(found.value - value) == pytest.approx(loss, rel=1e-9, abs=1e-14) and value < found.value
        assert np.abs(gradient).max() > 1e-6
        assert float(divergence(other, found.logps)) == pytest.approx(loss / BETA, rel=1e-9, abs=1e-15)


def test_dpo_finds_the_kl_regularised_optimum_whatever_pairs_are_drawn():
    space, table, ref, rewards, best = small()
    preference = 1 / (1 + np.exp(-(rewards[:, None] - rewards)))
    np.testing.assert_allclose(bradley_terry_preference(jnp.asarray(rewards)), preference, rtol=1e-14)
    drawn = log_softmax(draw(5, 7))
    law = compare_pairs(jnp.asarray(preference), jnp.asarray(drawn))
    population = in_expectation(law, functools.partial(losses.dpo, beta=BETA), ref)
    by_hand = weight = 0.0
    for i, j in itertools.permutations(range(7), 2):
        p = np.exp(drawn[i] + drawn[j]) * preference[i, j]
        by_hand, weight = by_hand + p * np.log1p(np.exp(-(rewards[i] - rewards[j]))), weight + p
    value, gradient = at_table(space, population)(conditional_logits(space, jnp.asarray(best)))
    assert float(value) == pytest.approx(by_hand / weight, rel=1e-13)
    assert np.abs(gradient).max() < 1e-14
    assert np.abs(at_table(space, population)(jnp.asarray(table))[1]).max() > 1e-3
    np.testing.assert_allclose(solve(space, population, table), best, atol=1e-10)


def test_ipo_finds_the_reference_tilted_by_the_chance_to_win_even_where_no_reward_explains_the_preferences():
    space, table, ref, _, _ = small()
    upper = np.triu(draw(6, 7, 7), 1)
    preference = 1 / (1 + np.exp(-3 * (upper - upper.T)))
    assert ((preference > 0.5) @ (preference > 0.5) & (preference.T > 0.5)).any()  # cycles
    drawn = log_softmax(draw(7, 7))
    target = log_softmax(ref + preference @ np.exp(drawn) / 0.1)
    found = ipo_optimum(jnp.asarray(ref), jnp.asarray(preference), jnp.asarray(drawn), beta=0.1)
    np.testing.assert_allclose(found, target, rtol=1e-13)
    law = compare_pairs(jnp.asarray(preference), jnp.asarray(drawn))
    population = in_expectation(law, functools.partial(losses.ipo, beta=0.1), ref)
    assert np.abs(at_table(space, population)(conditional_logits(space, found))[1]).max() < 1e-13  # losses are near 25
    np.testing.assert_allclose(solve(space, population, table), target, atol=1e-10)
    assert (target - ref).max() - (target - ref).min() < 1 / 0.1


@functools.cache
def rankings():
    """All rankings of three responses of `small`, drawn from an uneven law."""
    *_, rewards, _ = small()
    return compare_lists(jnp.asarray(rewards), jnp.asarray(log_softmax(draw(8, 7))), size=3)


def test_rankings_are_drawn_best_first_and_any_two_are_in_the_proportion_of_their_rewards():
    *_, rewards, _ = small()
    law, drawn = rankings(), softmax(draw(8, 7))
    assert law.responses.shape == (210, 3)
    by_hand = []
    for order in law.responses:
        worth = np.exp(rewards[order])
        by_hand.append(np.prod(drawn[order]) * np.prod([worth[k] / worth[k:].sum() for k in range(3)]))
    np.testing.assert_allclose(law.probability, np.asarray(by_hand) / np.sum(by_hand), rtol=1e-13)
    probability = np.asarray(law.probability)
    for i, j in ((0, 1), (3, 6)):
        both = (law.responses == i).any(-1) & (law.responses == j).any(-1)
        first = (law.responses == i).argmax(-1) < (law.responses == j).argmax(-1)
        share = probability[both & first].sum() / probability[both].sum()
        assert share == pytest.approx(1 / (1 + np.exp(rewards[j] - rewards[i])), rel=1e-13)
    won = [probability[law.responses[:, 0] == n].sum() for n in range(7)]
    np.testing.assert_allclose(np.exp(winner_logps(law, 7)), won, rtol=1e-13)


def on_rankings(loss, labels):
    """A listwise loss, in expectation, with labels `[210, 3]`."""
    given, valid = jnp.asarray(labels), jnp.ones(np.shape(labels), bool)
    return in_expectation(rankings(), lambda policy, ref: loss(policy, ref, given, valid, beta=BETA), small()[2])


def by_rank(*values):
    return np.tile(np.asarray(values, np.float64), (210, 1))


def of_responses(values):
    return np.asarray(values)[rankings().responses]


# Loss -> labels under which its population optimum is the KL-regularised one. `normalised` is r - beta log Z.
CALIBRATED = {
    "plackett_luce": lambda rewards, normalised: by_rank(2, 1, 0),
    "lipo_pair_logistic": lambda rewards, normalised: by_rank(2, 1, 0),
    "lipo_softmax": lambda rewards, normalised: by_rank(1, 0, 0),
    "listnet": lambda rewards, normalised: of_responses(rewards),
    "lipo_pointwise_mse": lambda rewards, normalised: of_responses(normalised),
    "lipo_pointwise_sigmoid": lambda rewards, normalised: of_responses(1 / (1 + np.exp(-normalised))),
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_listwise_losses_are_at_rest_at_the_optimum_when_their_labels_state_the_reward(name):
    space, table, ref, rewards, best = small()
    labels = CALIBRATED[name](rewards, BETA * (best - ref))
    value_and_grad = at_table(space, on_rankings(getattr(losses, name), labels))
    value, gradient = value_and_grad(conditional_logits(space, jnp.asarray(best)))
    assert np.abs(gradient).max() < 1e-14
    start, slope = value_and_grad(jnp.asarray(table))
    assert start > value and np.abs(slope).max() > 1e-3


def test_plackett_luce_reaches_the_optimum():
    space, table, _, _, best = small()
    population = on_rankings(losses.plackett_luce, by_rank(2, 1, 0))
    np.testing.assert_allclose(solve(space, population, table), best, atol=1e-10)


def test_lipo_softmax_on_win_rates_finds_the_reference_times_their_power_and_not_the_optimum():
    space, _, ref, rewards, best = small()
    rates = (1 / (1 + np.exp(-(rewards[:, None] - rewards)))).mean(-1)
    target = log_softmax(ref + np.log(rates) / BETA)
    value_and_grad = at_table(space, on_rankings(losses.lipo_softmax, of_responses(rates)))
    assert np.abs(value_and_grad(conditional_logits(space, jnp.asarray(target)))[1]).max() < 1e-14
    assert np.abs(value_and_grad(conditional_logits(space, jnp.asarray(best)))[1]).max() > 1e-3


def test_pointwise_regression_on_rewards_that_are_not_normalised_misses_the_optimum():
    space, _, _, rewards, best = small()
    at_best = conditional_logits(space, jnp.asarray(best))
    _, slope = at_table(space, on_rankings(losses.lipo_pointwise_mse, of_responses(rewards)))(at_best)
    assert np.abs(slope).max() > 1e-2  # a policy's probabilities sum to 1: it cannot take up the constant


@pytest.mark.parametrize("probability", [0.55, 0.9])
def test_the_hinge_sees_who_wins_and_not_how_often(probability):
    preference = jnp.array([[0.5, probability], [1 - probability, 0.5]])
    law, even = compare_pairs(preference, jnp.zeros(2)), np.log([0.5, 0.5])
    ratios = np.linspace(-3, 3, 121)  # of the first response's scores to the second's
    policies = log_softmax(np.stack([ratios, 0 * ratios], -1) / BETA, axis=-1)
    labels = jnp.broadcast_to(jnp.array([1.0, 0.0]), (2, 2))

    def population(policy):
        given = policy[law.responses], jnp.asarray(even)[law.responses]
        return law.probability @ losses.lipo_pair_hinge(*given, labels, labels >= 0, beta=BETA)

    values = np.asarray(jax.jit(jax.vmap(population))(policies))
    assert ratios[values.argmin()] == pytest.approx(1.0, abs=1e-12)


def lambda_slope(scores, weights):
    """Gradient by scores of `sum W_ij log(1 + exp(-(s_i - s_j)))`, and its Hessian."""
    sigma = 1 / (1 + np.exp(scores[:, None] - scores))
    pulls, bends = weights * sigma, weights * sigma * (1 - sigma)
    bends = bends + bends.T
    return pulls.sum(0) - pulls.sum(1), np.diag(bends.sum(1)) - bends


def lambda_weights(scores, law, labels):
    """The expected weight of each ordered pair, with the ranks that the scores have now."""
    weights = np.zeros((len(scores), len(scores)))
    for order, probability in zip(law.responses, np.asarray(law.probability), strict=True):
        rank = 1 + np.argsort(np.argsort(-scores[order]))
        for a, b in itertools.combinations(range(len(order)), 2):
            gain = 2.0 ** labels[a] - 2.0 ** labels[b]
            weights[order[a], order[b]] += probability * gain * abs(1 / np.log1p(rank[a]) - 1 / np.log1p(rank[b]))
    return weights


def test_lipo_lambda_comes_to_rest_beside_the_optimum_on_lists_and_at_it_on_pairs():
    space, _, ref, rewards, best = small()
    scores = rewards.copy()
    for _ in range(30):
        gradient, hessian = lambda_slope(scores, lambda_weights(scores, rankings(), (1.0, 0.5, 0.0)))
        scores = scores - np.linalg.pinv(hessian) @ gradient
    at_rest = log_softmax(ref + scores / BETA)
    slope = at_table(space, on_rankings(losses.lipo_lambda, by_rank(1.0, 0.5, 0.0)))
    assert np.abs(slope(conditional_logits(space, jnp.asarray(at_rest)))[1]).max() < 1e-14
    assert np.abs(slope(conditional_logits(space, jnp.asarray(best)))[1]).max() > 1e-4
    assert 1e-4 < float(divergence(jnp.asarray(at_rest), jnp.asarray(best))) < 0.1
    assert (np.argsort(at_rest - ref) == np.argsort(best - ref)).all()  # the order of the rewards is kept

    pairs = compare_pairs(bradley_terry_preference(jnp.asarray(rewards)), jnp.asarray(ref))
    labels = jnp.broadcast_to(jnp.array([1.0, 0.0]), (42, 2))
    loss = lambda policy, ref: losses.lipo_lambda(policy, ref, labels, labels >= 0, beta=BETA)
    of_pairs = at_table(space, in_expectation(pairs, loss, ref))
    assert np.abs(of_pairs(conditional_logits(space, jnp.asarray(best)))[1]).max() < 1e-14


@pytest.mark.parametrize("name", ["plackett_luce", "lipo_pair_logistic", "lipo_lambda"])
def test_labels_without_noise_have_no_optimum_the_further_apart_the_better(name):
    _, _, ref, rewards, _ = small()
    population = jax.jit(on_rankings(getattr(losses, name), of_responses(softmax(rewards))))
    values = [float(population(jnp.asarray(log_softmax(ref + c * rewards)))) for c in 4.0 ** np.arange(7)]
    assert np.all(np.diff(values) < 0) and values[-1] < 1e-9
