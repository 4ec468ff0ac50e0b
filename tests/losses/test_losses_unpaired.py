"""KTO, BCO and what they need of a whole batch: identities. Oracles and extremes are in test_every_loss.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.losses.cases.case import pair_logps
from tests.losses.cases.unpaired import CASES, responses
from tests.oracles import unpaired_losses as oracle

ZERO = np.float32(0.0)


def singles(seed, size):
    policy, reference, desirable = responses(np.random.default_rng(seed), size)
    return np.float32(policy), np.float32(reference), desirable


def pairs(seed, size):
    return tuple(np.float32(array) for array in pair_logps(np.random.default_rng(seed), size))


def gradient_of(loss, policy, *rest):
    return np.asarray(jax.grad(lambda policy: loss(policy, *rest).sum())(policy))


# KTO


def test_kto_s_kl_is_the_oracle_s_and_never_looks_at_padding(run, close):
    policy, reference, listed = singles(0, 11)
    policy = policy + 9  # a positive mean, which the clamp leaves alone
    expected = oracle.kto_kl(policy, reference, listed)
    assert expected > 1
    for rubbish in (np.nan, np.inf):
        padded = np.where(listed, policy, rubbish), np.where(listed, reference, rubbish), listed
        close(run(losses.kto_kl)(*padded), expected)


def test_kto_s_kl_keeps_float64():
    policy, reference, listed = singles(0, 11)
    with jax.enable_x64(True):
        kl = losses.kto_kl(np.float64(policy) + 9, np.float64(reference), listed)
        assert kl.dtype == jnp.float64
        np.testing.assert_allclose(kl, oracle.kto_kl(np.float64(policy) + 9, np.float64(reference), listed), rtol=1e-12)


def test_kto_s_kl_is_0_for_a_negative_mean_and_where_nothing_is_listed():
    policy, nothing = jnp.array([-14.0, -11.0]), jnp.zeros(2, bool)
    assert losses.kto_kl(policy, jnp.full(2, -12.0), ~nothing) == 0
    assert losses.kto_kl(jnp.full(2, jnp.nan), policy, nothing) == 0


def test_no_gradient_flows_through_kto_s_kl():
    policy, reference, listed = singles(1, 6)
    both = jax.grad(losses.kto_kl, argnums=(0, 1))(policy + 50, reference, listed)
    assert not np.any(both)
    # Nor where the same log-probabilities are in the loss and in its reference point.
    through = gradient_of(lambda p: losses.kto(p, reference, listed, losses.kto_kl(p, reference, listed)), policy + 50)
    kl = losses.kto_kl(policy + 50, reference, listed)
    np.testing.assert_array_equal(through, gradient_of(losses.kto, policy + 50, reference, listed, kl))


def test_kto_with_a_reference_point_of_0_is_apo_zero_unpaired():
    arrays = singles(2, 9)
    np.testing.assert_array_equal(losses.kto(*arrays, ZERO, beta=0.3), losses.apo_zero_unpaired(*arrays, beta=0.3))


def test_apo_zero_unpaired_over_both_responses_of_a_pair_is_apo_zero(close):
    policy, reference = pairs(3, 7)
    good = np.ones(7, bool)
    halves = [
        losses.apo_zero_unpaired(policy[:, k], reference[:, k], good if k == 0 else ~good, beta=0.3) for k in range(2)
    ]
    close(halves[0] + halves[1], losses.apo_zero(policy, reference, beta=0.3))


def test_kto_starts_at_half_its_weights(close):
    policy, _, desirable = singles(4, 8)
    start = losses.kto(policy, policy, desirable, ZERO, desirable_weight=1.3, undesirable_weight=0.6)
    close(start, np.where(desirable, 0.65, 0.3))


def test_kto_lies_between_0_and_its_weight_and_both_kinds_add_up_to_it(close):
    policy, reference, desirable = singles(5, 20)
    kl, weights = np.float32(2.0), dict(desirable_weight=1.5, undesirable_weight=1.5)
    one, other = (losses.kto(policy, reference, kind, kl, beta=0.7, **weights) for kind in (desirable, ~desirable))
    assert (one >= 0).all() and (one <= 1.5).all()
    close(one + other, np.full(20, 1.5))


def test_kto_s_weights_scale_each_kind_alone():
    policy, reference, desirable = singles(6, 10)
    kl = np.float32(1.0)
    plain = np.asarray(losses.kto(policy, reference, desirable, kl))
    weighed = losses.kto(policy, reference, desirable, kl, desirable_weight=2.0)
    np.testing.assert_array_equal(weighed, np.where(desirable, 2 * plain, plain))
    weighed = losses.kto(policy, reference, desirable, kl, undesirable_weight=4.0)
    np.testing.assert_array_equal(weighed, np.where(desirable, plain, 4 * plain))


def test_kto_s_gradient_is_steepest_at_the_reference_point(close):
    policy, reference, desirable = singles(7, 10)
    kl, beta = 1.5, 0.2
    value = 1 / (1 + np.exp(-beta * (np.float64(policy) - reference - kl)))
    expected = np.where(desirable, -1, 1) * beta * value * (1 - value)
    close(gradient_of(lambda p: losses.kto(p, reference, desirable, np.float32(kl), beta=beta), policy), expected)
    at_point = gradient_of(losses.kto, reference + np.float32(kl), reference, desirable, np.float32(kl))
    close(np.abs(at_point), np.full(10, 0.1 / 4))


@pytest.mark.parametrize("size", [7, 1])  # an odd batch, and a micro-batch of one example
@pytest.mark.parametrize("kinds", ["mixed", "desirable", "undesirable"])
def test_kto_and_bco_take_any_number_of_each_kind(size, kinds, close):
    policy, reference, desirable = singles(8, size)
    desirable = {"mixed": desirable, "desirable": np.ones(size, bool), "undesirable": np.zeros(size, bool)}[kinds]
    weights = np.linspace(0.5, 2, size, dtype=np.float32)
    kl = losses.kto_kl(policy + 20, reference, np.ones(size, bool))
    close(losses.kto(policy, reference, desirable, kl), oracle.kto(policy, reference, desirable, np.float64(kl)))
    close(losses.bco(policy, reference, desirable, weights, ZERO), oracle.bco(policy, reference, desirable, weights, 0))


def test_kto_of_micro_batches_with_the_whole_batch_s_kl_is_kto_of_the_whole(close):
    policy, reference, desirable = singles(9, 9)
    policy[:5] += 25  # halves that differ
    everything = np.ones(9, bool)
    kl = losses.kto_kl(policy, reference, everything)
    whole = losses.kto(policy, reference, desirable, kl)
    parts = [slice(0, 5), slice(5, 9)]
    together = [losses.kto(policy[p], reference[p], desirable[p], kl) for p in parts]
    np.testing.assert_array_equal(np.concatenate(together), whole)
    gradients = [gradient_of(losses.kto, policy[p], reference[p], desirable[p], kl) for p in parts]
    close(np.concatenate(gradients), gradient_of(losses.kto, policy, reference, desirable, kl))
    # A KL per micro-batch would be another loss.
    alone = [losses.kto_kl(policy[p], reference[p], everything[p]) for p in parts]
    assert abs(alone[0] - kl) > 1 and abs(alone[1] - kl) > 1


# BCO


@pytest.mark.parametrize("shift", [-30.0, -0.4, 0.0, 0.7, 30.0])
def test_bco_is_never_below_dpo(shift):
    policy, reference = (np.float64(array) for array in pairs(10, 40))
    with jax.enable_x64(True):
        bound = losses.bco_pair(policy, reference, np.float64(shift), beta=0.3)
        assert (bound > losses.dpo(policy, reference, beta=0.3)).all()


def test_bco_s_best_shift_is_the_mean_of_the_two_rewards(close):
    policy, reference = (np.float64(array) for array in pairs(11, 6))
    with jax.enable_x64(True):
        rewards = 0.3 * (policy - reference)
        for row in range(6):

            def at(shift, row=row):
                return losses.bco_pair(policy[row : row + 1], reference[row : row + 1], np.float64(shift), beta=0.3)[0]

            best = rewards[row].mean()
            others = [at(best + step) for step in (-2.0, -0.1, -1e-3, 1e-3, 0.1, 2.0)]
            assert all(at(best) < other for other in others)
            # There the bound is DPO's at half the margin, for each of the two responses.
            close(at(best), 2 * np.logaddexp(0.0, -(rewards[row, 0] - rewards[row, 1]) / 2), rtol=1e-12, atol=1e-12)


def test_bco_of_the_two_responses_of_a_pair_adds_up_to_bco_pair(close):
    policy, reference = pairs(12, 8)
    good, ones, shift = np.ones(8, bool), np.ones(8, np.float32), np.float32(0.4)
    chosen = losses.bco(policy[:, 0], reference[:, 0], good, ones, shift)
    rejected = losses.bco(policy[:, 1], reference[:, 1], ~good, ones, shift)
    close(chosen + rejected, losses.bco_pair(policy, reference, shift))


def test_bco_s_weights_scale_each_response(close):
    policy, reference, desirable = singles(13, 6)
    weights, shift = np.array([0, 0.5, 1, 2, 10, 0], np.float32), np.float32(-0.2)
    plain = losses.bco(policy, reference, desirable, np.ones(6, np.float32), shift)
    close(losses.bco(policy, reference, desirable, weights, shift), weights * np.asarray(plain))


def test_a_shift_moves_all_rewards(close):
    policy, reference, desirable = singles(14, 6)
    ones = np.ones(6, np.float32)
    moved = losses.bco(policy + 3, reference, desirable, ones, np.float32(0.3), beta=0.1)
    close(moved, losses.bco(policy, reference, desirable, ones, ZERO, beta=0.1), rtol=1e-5)


# BCO's shift


def test_the_shift_starts_at_0_with_nothing_seen():
    start = losses.bco_shift_start()
    assert not np.any(start.means) and not np.any(start.weights)
    assert losses.bco_shift(start) == 0


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.9])
def test_the_shift_s_means_are_the_oracle_s_under_scan(decay, close):
    rng = np.random.default_rng(15)
    counts = rng.integers(0, 3, (12, 2))  # a kind is absent from a third of the steps
    sums = np.float32(rng.normal(1.0, 2.0, (12, 2)) * counts)
    assert (counts == 0).any(0).all()
    states = jax.jit(
        lambda sums, counts: jax.lax.scan(
            lambda state, step: (losses.bco_shift_update(state, *step, decay=decay),) * 2,
            losses.bco_shift_start(),
            (sums, counts),
        )[1]
    )(sums, counts)
    for step in range(12):
        expected = oracle.bco_means(list(zip(sums, counts, strict=True))[: step + 1], decay)
        close(states.means[step], expected, rtol=1e-5, atol=1e-5)
        now = losses.BcoShift(states.means[step], states.weights[step])
        close(losses.bco_shift(now), 0.5 * (expected[0] + expected[1]), rtol=1e-5, atol=1e-5)


def test_equal_rewards_are_their_own_mean_from_the_first_step(close):
    state = losses.bco_shift_start()
    for counts in ([1, 3], [4, 2], [2, 2]):
        state = losses.bco_shift_update(
            state, jnp.array([1.5, -0.5]) * jnp.array(counts, jnp.float32), jnp.array(counts)
        )
        close(state.means, [1.5, -0.5])
        close(losses.bco_shift(state), 0.5)


def test_a_kind_that_a_step_lacks_keeps_its_mean_and_its_weight():
    before = losses.bco_shift_update(losses.bco_shift_start(), jnp.array([2.0, -3.0]), jnp.array([2, 3]))
    after = losses.bco_shift_update(before, jnp.array([8.0, jnp.nan]), jnp.array([2, 0]))
    assert after.means[1] == before.means[1] and after.weights[1] == before.weights[1]
    assert after.means[0] > before.means[0] and after.weights[0] > before.weights[0]


def test_with_one_kind_alone_the_shift_is_half_its_mean():
    state = losses.bco_shift_update(losses.bco_shift_start(), jnp.array([0.0, -6.0]), jnp.array([0, 2]))
    assert losses.bco_shift(state) == -1.5


def test_the_shift_s_state_keeps_its_type_and_no_gradient_flows_through_it():
    with jax.enable_x64(True):
        state = losses.bco_shift_update(losses.bco_shift_start(), np.array([2.0, 3.0]), np.array([1, 1]))
        assert state.means.dtype == state.weights.dtype == jnp.float32

    def through(sums):
        return losses.bco_shift(losses.bco_shift_update(losses.bco_shift_start(), sums, jnp.ones(2)))

    assert not np.any(jax.grad(through)(jnp.array([2.0, 3.0])))


# Underlying-distribution matching

fit = jax.jit(losses.fit_prompt_classifier)


def prompts(seed, size, width, *, scale=1.0, offset=0.0):
    """Embeddings, a fifth or so of them desirable, told apart by the first coordinate but not entirely."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(0.0, 1.0, (size, width))
    desirable = embeddings[:, 0] + rng.normal(0.0, 0.5, size) > 0.9
    return np.float32(scale * embeddings + offset), desirable


@pytest.mark.parametrize(
    ("size", "width", "regularisation"), [(40, 3, 1.0), (40, 3, 0.1), (6, 9, 2.5)], ids=["plain", "weak", "wide"]
)
def test_the_prompt_classifier_is_the_oracle_s(size, width, regularisation, close):
    embeddings, desirable = prompts(16, size, width)
    assert 0 < desirable.sum() < size / 2
    kernel, bias = oracle.fit_prompt_classifier(np.float64(embeddings), desirable, regularisation)
    actual = fit(embeddings, desirable, regularisation=regularisation)
    close(actual.kernel, kernel, rtol=1e-5, atol=1e-5)
    close(actual.bias, bias, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        actual = fit(np.float64(embeddings), desirable, regularisation=regularisation)
        assert actual.kernel.dtype == actual.bias.dtype == jnp.float64
        close(actual.kernel, kernel, rtol=1e-7, atol=1e-7)
        close(actual.bias, bias, rtol=1e-7, atol=1e-7)


# Scales of raw embeddings; (17, 8) can barely be separated, which takes the largest logits, 400 and 1357.
LAYOUTS = {
    "unit": dict(),
    "small": dict(scale=0.01),
    "large": dict(scale=100.0),
    "huge": dict(scale=1000.0),
    "far_away": dict(scale=30.0, offset=1e3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("width", [8, 50], ids=["narrow", "wide"])
def test_the_newton_steps_arrive_in_float32(layout, width):
    embeddings, desirable = prompts(17, 40, width, **layout)
    classifier = fit(embeddings, desirable)
    parts = np.float64(classifier.kernel), float(classifier.bias)
    _, gradient = oracle.balanced_logistic(*parts, np.float64(embeddings), desirable, 1.0)
    # Residuals of 40 examples times their embeddings, each rounded to float32's seven digits.
    assert np.abs(gradient).max() < 2e-6 * len(desirable) * np.abs(embeddings).max()


def test_separable_prompts_are_told_apart_where_the_penalty_is_small():
    embeddings, _ = prompts(18, 40, 8)
    desirable = embeddings[:, 0] > 0.8
    for scale, mistakes in ((0.1, True), (1000.0, False)):
        classifier = fit(np.float32(scale) * embeddings, desirable)
        probability = np.asarray(losses.desirable_probability(classifier, np.float32(scale) * embeddings))
        assert ((probability > 0.5) != desirable).any() == mistakes


def test_rare_and_frequent_kinds_weigh_the_same(close):
    # Without information in the prompts both kinds are equally probable, however many there are of each.
    desirable = np.arange(20) < 3
    classifier = fit(np.zeros((20, 2), np.float32), desirable)
    close(losses.desirable_probability(classifier, np.zeros((1, 2), np.float32)), [0.5])
    # Each of the rare ones repeated is the same fit.
    embeddings, desirable = prompts(19, 20, 2)
    twice = np.concatenate([np.arange(20), np.flatnonzero(desirable)])
    plain = fit(embeddings, desirable, regularisation=2.0)
    share = len(twice) / 20
    again = fit(embeddings[twice], desirable[twice], regularisation=2.0 * share)
    close(again.kernel, plain.kernel, rtol=1e-5, atol=1e-5)


def test_moving_the_origin_of_the_embeddings_changes_no_probability(close):
    embeddings, desirable = prompts(20, 30, 4)
    here, there = (fit(e, desirable) for e in (embeddings, embeddings + np.float32(64)))
    close(there.kernel, here.kernel, rtol=1e-4, atol=1e-5)
    probabilities = losses.desirable_probability(there, embeddings + np.float32(64))
    close(probabilities, losses.desirable_probability(here, embeddings), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [True, False])
def test_one_kind_of_prompts_alone_gives_a_finite_classifier(kind):
    embeddings, _ = prompts(21, 10, 3)
    classifier = fit(embeddings, np.full(10, kind))
    assert np.isfinite(classifier.kernel).all() and np.isfinite(classifier.bias)
    probability = np.asarray(losses.desirable_probability(classifier, embeddings))
    assert (probability > 0.999).all() if kind else (probability < 0.001).all()


def test_bf16_embeddings_are_fitted_in_f32():
    embeddings, desirable = prompts(22, 20, 3)
    classifier = fit(jnp.asarray(embeddings, jnp.bfloat16), desirable)
    assert classifier.kernel.dtype == jnp.float32
    assert losses.desirable_probability(classifier, jnp.asarray(embeddings, jnp.bfloat16)).dtype == jnp.float32


def test_matching_weighs_undesirable_prompts_by_their_odds(run, close):
    probability = np.array([0.0, 0.1, 0.4, 0.8, 0.9, 0.95, 1.0, 0.0, 0.7, 1.0], np.float32)
    desirable = np.arange(10) >= 7
    close(run(losses.udm_weights)(probability, desirable), oracle.udm_weights(probability, desirable), rtol=2e-6)
    limits = dict(low=0.25, high=2.0)
    close(losses.udm_weights(probability, desirable, **limits), oracle.udm_weights(probability, desirable, **limits))


def test_matched_undesirable_prompts_have_the_mean_of_the_desirable_ones():
    # Two groups of prompts: desirable responses come from group 1 in 3 of 4, undesirable ones in 1 of 4.
    group = np.array([0] * 10 + [1] * 30 + [0] * 30 + [1] * 10)
    desirable = np.arange(80) < 40
    odds = np.where(group, 3.0, 1 / 3)  # of being desirable, known here
    weights = np.asarray(losses.udm_weights(np.float32(odds / (1 + odds)), desirable, low=0.01))
    assert np.average(group[~desirable]) == 0.25
    np.testing.assert_allclose(np.average(group[~desirable], weights=weights[~desirable]), 0.75, rtol=1e-5)


def test_no_gradient_flows_through_the_matching():
    embeddings, desirable = prompts(23, 12, 3)

    def through(embeddings):
        classifier = fit(embeddings, desirable)
        return losses.udm_weights(losses.desirable_probability(classifier, embeddings), desirable, low=0.01).sum()

    assert not np.any(jax.grad(through)(embeddings))


# Arguments


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_defaults_are_the_oracle_s_too(case, close):
    arrays = [np.float32(a) if a.dtype == np.float64 else a for a in case.arrays(np.random.default_rng(24), 5)]
    close(case.loss(*arrays), case.oracle(*arrays))


def test_wrong_arguments_are_answered_with_their_name():
    three, good = jnp.zeros(3), jnp.ones(3, bool)
    with pytest.raises(ValueError, match=r"kto_kl: listed has dtype float32; expected bool"):
        losses.kto_kl(three, three, three)
    with pytest.raises(ValueError, match=r"kto: policy_logps has shape \[3, 2\]; expected \[B\]"):
        losses.kto(jnp.zeros((3, 2)), three, good, ZERO)
    with pytest.raises(ValueError, match=r"kto: kl has shape \[3\]; expected a scalar of the whole batch"):
        losses.kto(three, three, good, three)
    with pytest.raises(ValueError, match=r"kto: undesirable_weight is -1\.0"):
        losses.kto(three, three, good, ZERO, undesirable_weight=-1.0)
    with pytest.raises(ValueError, match="apo_zero_unpaired: beta is 0"):
        losses.apo_zero_unpaired(three, three, good, beta=0)
    with pytest.raises(ValueError, match=r"bco: all shapes must be equal, .* weights \[2\]"):
        losses.bco(three, three, good, jnp.ones(2), ZERO)
    with pytest.raises(ValueError, match=r"bco_pair: shift has shape \[2\]"):
        losses.bco_pair(jnp.zeros((3, 2)), jnp.zeros((3, 2)), jnp.zeros(2))
    state = losses.bco_shift_start()
    with pytest.raises(ValueError, match=r"bco_shift_update: counts has shape \[\]; expected \[2\]"):
        losses.bco_shift_update(state, jnp.zeros(2), jnp.float32(3))
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="bco_shift_update: decay is"):
            losses.bco_shift_update(state, jnp.zeros(2), jnp.ones(2), decay=decay)


def test_wrong_arguments_of_the_matching_are_answered_with_their_name():
    good = jnp.ones(3, bool)
    with pytest.raises(ValueError, match=r"fit_prompt_classifier: embeddings has shape \[3\]; expected \[N, D\]"):
        losses.fit_prompt_classifier(jnp.zeros(3), good)
    with pytest.raises(ValueError, match=r"fit_prompt_classifier: desirable has shape \[3\]; expected \[4\]"):
        losses.fit_prompt_classifier(jnp.zeros((4, 2)), good)
    with pytest.raises(ValueError, match="fit_prompt_classifier: regularisation is 0"):
        losses.fit_prompt_classifier(jnp.zeros((3, 2)), good, regularisation=0.0)
    classifier = losses.PromptClassifier(jnp.zeros(2), jnp.float32(0))
    with pytest.raises(ValueError, match="desirable_probability: embeddings have 5 dimensions"):
        losses.desirable_probability(classifier, jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"udm_weights: probability has shape \[3, 1\]"):
        losses.udm_weights(jnp.zeros((3, 1)), good)
    with pytest.raises(ValueError, match=r"udm_weights: all shapes must be equal, .* desirable \[3\]"):
        losses.udm_weights(jnp.zeros(4), good)
    with pytest.raises(ValueError, match=r"udm_weights: low is 3\.0 and high is 2\.0"):
        losses.udm_weights(jnp.zeros(3), good, low=3.0, high=2.0)
