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


# Arguments


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_defaults_are_the_oracle_s_too(case, close):
    arrays = [np.float32(a) if a.dtype == np.float64 else a for a in case.arrays(np.random.default_rng(24), 5)]
    close(case.loss(*arrays), case.oracle(*arrays))


@pytest.mark.parametrize("case", [case for case in CASES if case.hyper], ids=lambda case: case.title)
def test_hyper_parameters_may_be_traced_and_have_gradients(case):
    arrays = case.arrays(np.random.default_rng(25), 4)
    singles = [np.float32(a) if a.dtype == np.float64 else a for a in arrays]
    hyper = {name: jnp.float32(value) for name, value in case.hyper.items()}
    value, slopes = jax.jit(jax.value_and_grad(lambda hyper: case.loss(*singles, **hyper).sum()))(hyper)
    np.testing.assert_allclose(value, case.oracle(*arrays, **case.hyper).sum(), rtol=1e-5)
    for name, slope in slopes.items():
        up, down = (case.oracle(*arrays, **{**case.hyper, name: case.hyper[name] + s}).sum() for s in (1e-6, -1e-6))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-3, atol=1e-4, err_msg=name)


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
