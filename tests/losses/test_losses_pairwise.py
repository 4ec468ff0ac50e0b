"""Pairwise losses with a reference: the identities of their papers. Oracles and extremes are in test_every_loss.py."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from palign import losses
from tests.losses.cases import pairwise_shaped
from tests.losses.cases.pairwise import CASES, LOG_2, at_margin, averages, gradient_of, lengths_of, log_probs
from tests.oracles import pairwise_losses as oracle

EVERY_CASE = (*CASES, *pairwise_shaped.CASES)

# What holds for all that compare log-ratios.

RELATIVE = {
    "dpo": losses.dpo,
    "ipo": losses.ipo,
    "cdpo": losses.cdpo,
    "robust_dpo": losses.robust_dpo,
    "hinge": losses.hinge,
    "dpop": functools.partial(losses.dpop, penalty=2.0),
    "cal_dpo": functools.partial(losses.cal_dpo, beta=0.1),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_only_changes_against_the_reference_count(name, close):
    policy, reference = log_probs(3)
    together = RELATIVE[name](policy + 7.5, reference + 7.5)
    close(together, RELATIVE[name](policy, reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo", "cdpo", "robust_dpo", "hinge"])
def test_what_both_responses_gained_does_not_count(name, close):
    policy, reference = log_probs(3)
    close(RELATIVE[name](policy + 7.5, reference), RELATIVE[name](policy, reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust_dpo", "dpop"])
def test_training_starts_at_log_2_with_the_responses_pushed_apart(name, close):
    policy, _ = log_probs(4, 3)
    close(RELATIVE[name](policy, policy), np.full(3, LOG_2))
    gradient = gradient_of(RELATIVE[name], policy, policy)
    assert (gradient[:, 0] < 0).all() and (gradient[:, 1] > 0).all()


@pytest.mark.parametrize("name", ["dpo", "alphapo"])
def test_two_derivatives_agree_with_finite_differences(name):
    case = next(case for case in CASES if case.title == name)
    with jax.enable_x64(True):
        policy, *rest = case.arrays(np.random.default_rng(1), 4)
        check_grads(jax.jit(lambda policy: case.loss(policy, *rest, **case.hyper)), (policy,), order=2)


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.title)
def test_the_defaults_stay_finite_at_extremes_too(case):
    arrays = [np.float32(a) if a.dtype == np.float64 else a for a in case.extremes()]
    values, pull_back = jax.vjp(lambda policy: case.loss(policy, *arrays[1:]), arrays[0])
    assert np.isfinite(values).all() and np.isfinite(pull_back(jnp.ones_like(values))[0]).all()


# Not where a part of the value is stopped, so that finite differences see another slope.
@pytest.mark.parametrize("case", [c for c in EVERY_CASE if c.checks_gradient], ids=lambda case: case.title)
def test_hyper_parameters_may_be_traced_and_have_gradients(case):
    arrays = [np.float32(a) if a.dtype == np.float64 else a for a in case.arrays(np.random.default_rng(7), 4)]
    hyper = {name: jnp.float32(value) for name, value in case.hyper.items()}
    traced, slopes = jax.value_and_grad(lambda hyper: case.loss(*arrays, **hyper).sum())(hyper)
    np.testing.assert_allclose(traced, case.loss(*arrays, **case.hyper).sum(), rtol=1e-5)
    for name, slope in slopes.items():
        step = 1e-6
        up, down = (
            case.oracle(*map(np.float64, arrays), **{**case.hyper, name: case.hyper[name] + s}).sum()
            for s in (step, -step)
        )
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-3, atol=1e-4, err_msg=name)


# DPO, IPO, SimPO.


def test_dpo_s_gradient_is_beta_times_a_sigmoid(close):
    policy, reference = log_probs(4)
    gradient = gradient_of(losses.dpo, policy, reference, beta=0.1)
    close(gradient, oracle.dpo_gradient(np.float64(policy), np.float64(reference), 0.1))


def test_swapping_the_responses_changes_dpo_by_the_margin(close):
    policy, reference = log_probs(5)
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
    assert losses.ipo(at_target, zeros, beta=0.1) == 0
    assert not gradient_of(losses.ipo, at_target, zeros, beta=0.1).any()


def test_simpo_s_margin_is_not_scaled_by_beta(close):
    equal = jnp.full((1, 2), -1.5)
    close(losses.simpo(equal, beta=7.0, gamma=0.8), [np.log1p(np.exp(0.8))])
    ahead = jnp.array([[0.8 / 7.0, 0.0]])
    close(losses.simpo(ahead, beta=7.0, gamma=0.8), [LOG_2])
    policy, _ = log_probs(6)
    close(losses.simpo(policy, beta=0.3, gamma=0.0), losses.dpo(policy, np.zeros_like(policy), beta=0.3))


def test_implicit_rewards_are_scaled_log_ratios_without_gradient(close):
    policy = jnp.array([[-3.0, -5.0, -7.0]])
    reference = jnp.array([[-4.0, -5.0, -5.0]])
    close(losses.implicit_rewards(policy, reference, beta=0.5), [[0.5, 0.0, -1.0]])
    assert not gradient_of(losses.implicit_rewards, policy, reference, beta=0.5).any()


def test_nll_negates_any_shape_and_raises_bf16_to_f32():
    logps = jnp.array([[-1.0, -0.25], [0.0, -1e4]], jnp.bfloat16)
    assert losses.nll(logps).dtype == jnp.float32
    np.testing.assert_array_equal(losses.nll(logps), -np.asarray(logps, np.float32))
    assert losses.nll(jnp.float32(-2.0)) == 2.0


# Noisy labels.


def test_without_noise_cdpo_and_robust_dpo_are_dpo():
    policy, reference = log_probs(10)
    plain = losses.dpo(policy, reference, beta=0.3)
    np.testing.assert_array_equal(losses.cdpo(policy, reference, beta=0.3, label_smoothing=0.0), plain)
    np.testing.assert_array_equal(losses.robust_dpo(policy, reference, beta=0.3, label_smoothing=0.0), plain)


def test_cdpo_rests_where_the_policy_s_odds_are_the_label_s(close):
    noise, beta = 0.2, 0.5
    optimum = np.log((1 - noise) / noise) / beta
    policy, reference = at_margin([optimum - 1, optimum, optimum + 1])
    values = losses.cdpo(policy, reference, beta=beta, label_smoothing=noise)
    # At the minimum the loss is the entropy of the label.
    close(values[1], -(1 - noise) * np.log(1 - noise) - noise * np.log(noise))
    assert values[0] > values[1] < values[2]
    gradient = gradient_of(losses.cdpo, policy, reference, beta=beta, label_smoothing=noise)
    close(gradient[1], np.zeros(2), atol=1e-7)
    assert gradient[0, 0] < 0 < gradient[2, 0]


def test_cdpo_of_labels_that_tell_nothing_is_symmetric(close):
    policy, reference = log_probs(11)
    both_ways = [
        losses.cdpo(p, r, label_smoothing=0.5) for p, r in ((policy, reference), (policy[:, ::-1], reference[:, ::-1]))
    ]
    close(both_ways[0], both_ways[1])


@pytest.mark.parametrize("noise", [0.1, 0.2, 0.45])
def test_robust_dpo_is_an_unbiased_estimate_of_dpo(noise, close):
    policy, reference = log_probs(12)
    robust = functools.partial(losses.robust_dpo, beta=0.3, label_smoothing=noise)
    expected = (1 - noise) * robust(policy, reference) + noise * robust(policy[:, ::-1], reference[:, ::-1])
    close(expected, losses.dpo(policy, reference, beta=0.3), rtol=1e-5, atol=1e-5)


def test_robust_dpo_is_not_bounded_below(close):
    values = losses.robust_dpo(*at_margin([8.0, 80.0]), beta=1.0, label_smoothing=0.2)
    close(np.round(values, 2), [-2.67, -26.67])


def test_noise_out_of_range_is_answered_with_its_name():
    pair = jnp.zeros((1, 2))
    losses.cdpo(pair, pair, label_smoothing=0.5)
    for loss, wrong in ((losses.cdpo, (-0.1, 0.6, np.nan)), (losses.robust_dpo, (-0.1, 0.5, np.nan))):
        for noise in wrong:
            with pytest.raises(ValueError, match=rf"^{loss.__name__}: label_smoothing is {noise}"):
                loss(pair, pair, label_smoothing=noise)


# Margins that end.


def test_hinge_starts_at_one_and_ends_at_one_over_beta():
    policy, reference = at_margin([0.0, 9.0, 10.0, 11.0])
    np.testing.assert_allclose(losses.hinge(policy, reference, beta=0.1), [1.0, 0.1, 0.0, 0.0], atol=1e-6)
    gradient = gradient_of(losses.hinge, policy, reference, beta=0.1)
    np.testing.assert_allclose(gradient, [[-0.1, 0.1], [-0.1, 0.1], [0, 0], [0, 0]], atol=1e-7)


def test_hinge_is_slic_of_log_ratios_with_a_margin_of_one_over_beta(close):
    policy, reference = log_probs(13)
    beta = 0.2
    slic = losses.slic_hf(policy - reference, np.zeros(24, np.float32), delta=1 / beta, regularisation=0.0)
    close(losses.hinge(policy, reference, beta=beta), beta * slic, rtol=1e-5)


def test_slic_s_supervised_term_has_a_gradient_of_its_own():
    policy, target = jnp.array([[-5.0, -9.0], [-9.0, -5.0]]), jnp.array([-3.0, -4.0])
    slic = functools.partial(losses.slic_hf, delta=1.0, regularisation=0.1)
    np.testing.assert_allclose(slic(policy, target), [0.3, 5.4], rtol=1e-6)
    gradients = jax.grad(lambda *arrays: slic(*arrays).sum(), argnums=(0, 1))(policy, target)
    np.testing.assert_array_equal(gradients[0], [[0.0, 0.0], [-1.0, 1.0]])
    np.testing.assert_allclose(gradients[1], [-0.1, -0.1])


# Lengths.


def test_ln_dpo_of_single_tokens_is_dpo():
    policy, reference = log_probs(14)
    plain = losses.dpo(policy, reference, beta=0.3)
    for one in (np.ones((24, 2), np.int32), np.ones((24, 2), np.float32), np.zeros((24, 2), np.int32)):
        np.testing.assert_array_equal(losses.ln_dpo(policy, reference, one, beta=0.3), plain)


def test_ln_dpo_is_dpo_of_averages(close):
    (policy, reference), lengths = log_probs(15), lengths_of(15)
    per_token = losses.dpo(np.float32(policy / lengths), np.float32(reference / lengths), beta=5.0)
    close(losses.ln_dpo(policy, reference, lengths, beta=5.0), per_token, atol=3e-6)


def test_ln_dpo_with_the_same_reference_average_everywhere_is_simpo_without_a_margin(close):
    (policy, _), lengths = log_probs(16), lengths_of(16)
    reference = np.float32(-1.25 * lengths)
    simpo = losses.simpo(np.float32(policy / lengths), beta=2.0, gamma=0.0)
    close(losses.ln_dpo(policy, reference, lengths, beta=2.0), simpo, atol=3e-6)


def test_r_dpo_without_a_penalty_is_dpo_and_a_common_length_does_not_count(close):
    (policy, reference), lengths = log_probs(17), lengths_of(17)
    plain = losses.dpo(policy, reference, beta=0.3)
    np.testing.assert_array_equal(losses.r_dpo(policy, reference, lengths, beta=0.3, alpha=0.0), plain)
    close(losses.r_dpo(policy, reference, np.full((24, 2), 40), beta=0.3, alpha=0.5), plain)


def test_r_dpo_is_margin_dpo_of_lengths_as_costs(close):
    (policy, reference), lengths = log_probs(18), lengths_of(18)
    costs = losses.margin_dpo(policy, reference, np.float32(-lengths), beta=0.3, alpha=0.05)
    close(losses.r_dpo(policy, reference, lengths, beta=0.3, alpha=0.05), costs)


def test_r_dpo_pushes_less_towards_a_longer_response():
    policy = jnp.zeros((3, 2))
    lengths = jnp.array([[30, 10], [20, 20], [10, 30]])
    push = -gradient_of(losses.r_dpo, policy, policy, lengths, beta=0.1, alpha=0.05)[:, 0]
    assert 0 < push[0] < push[1] < push[2]
    np.testing.assert_allclose(push[1], 0.05, rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.ln_dpo, losses.r_dpo], ids=lambda loss: loss.__name__)
def test_lengths_may_be_floats_and_get_no_gradient(loss):
    (policy, reference), lengths = log_probs(19), lengths_of(19)
    np.testing.assert_array_equal(loss(policy, reference, np.float32(lengths)), loss(policy, reference, lengths))
    gradient = jax.grad(lambda lengths: loss(policy, reference, lengths).sum())(np.float32(lengths))
    assert not np.asarray(gradient).any()


def test_ld_dpo_with_all_of_the_tail_is_dpo_and_with_none_that_of_the_shared_part(close):
    (shared, ref_shared), (tail, ref_tail) = log_probs(20), log_probs(21)
    parts = shared, tail, ref_shared, ref_tail
    whole = losses.dpo(shared + tail, ref_shared + ref_tail, beta=0.3)
    close(losses.ld_dpo(*parts, beta=0.3, alpha=1.0), whole, rtol=1e-5, atol=1e-5)
    cut = losses.dpo(shared, ref_shared, beta=0.3)
    np.testing.assert_array_equal(losses.ld_dpo(*parts, beta=0.3, alpha=0.0), cut)


def test_ld_dpo_moves_the_tail_alpha_times_as_much(close):
    (shared, ref_shared), (tail, ref_tail) = log_probs(22, 4), log_probs(23, 4)
    of_shared, of_tail = jax.grad(
        lambda s, t: losses.ld_dpo(s, t, ref_shared, ref_tail, beta=0.3, alpha=0.4).sum(), argnums=(0, 1)
    )(shared, tail)
    assert np.asarray(of_shared).any()
    close(of_tail, 0.4 * of_shared)
    with pytest.raises(ValueError, match=r"^ld_dpo: alpha is 1.5"):
        losses.ld_dpo(shared, tail, ref_shared, ref_tail, alpha=1.5)


# Margins, references and betas of one's own.


def test_scaled_dpo_goes_from_no_reference_to_dpo(close):
    policy, reference = log_probs(24)
    zeros = np.zeros_like(policy)
    close(losses.scaled_dpo(policy, reference, beta=0.3, gamma=1.0), losses.dpo(policy, reference, beta=0.3))
    close(losses.scaled_dpo(policy, reference, beta=0.3, gamma=0.0), losses.dpo(policy, zeros, beta=0.3))
    close(losses.scaled_dpo(policy, reference, beta=0.3, gamma=0.5), losses.dpo(policy, reference / 2, beta=0.3))


def test_margin_dpo_without_an_offset_is_dpo_and_only_score_gaps_count(close):
    (policy, reference), scores = log_probs(25), averages(25)
    margin_dpo = functools.partial(losses.margin_dpo, policy, reference, beta=0.3)
    np.testing.assert_array_equal(margin_dpo(scores, alpha=0.0), losses.dpo(policy, reference, beta=0.3))
    close(margin_dpo(scores + 3, alpha=0.5), margin_dpo(scores, alpha=0.5), rtol=1e-5, atol=1e-5)


def test_margin_dpo_asks_for_a_margin_of_alpha_times_the_gap(close):
    scores = jnp.array([[4.0, 1.0]])
    close(losses.margin_dpo(*at_margin(0.5 * 3 / 0.1), scores, beta=0.1, alpha=0.5), [LOG_2])
    no_margin = losses.margin_dpo(*at_margin(0.0), scores, beta=0.1, alpha=0.5)
    close(no_margin, [np.log1p(np.exp(1.5))])


def test_margin_dpo_without_a_reference_is_simpo_for_a_constant_gap(close):
    policy = averages(26)
    gap_of_one = np.tile(np.float32([1.0, 0.0]), (24, 1))
    offset = losses.margin_dpo(policy, np.zeros_like(policy), gap_of_one, beta=2.0, alpha=1.2)
    close(offset, losses.simpo(policy, beta=2.0, gamma=1.2))


def test_mm_dpo_s_beta_is_the_oracle_s_and_grows_from_beta_to_its_bound(run, close):
    gaps = np.float32([-1e4, -1.0, 0.0, 0.1, 1.0, 3.0, 1e4])
    scores = np.stack([gaps, np.zeros_like(gaps)], axis=-1)
    hyper = {"beta": 0.2, "weight": 0.7, "rate": 0.9}
    betas = run(functools.partial(losses.mm_dpo_beta, **hyper))(scores)
    close(betas, oracle.mm_dpo_beta(scores, **hyper))
    np.testing.assert_allclose(betas[:3], 0.2, rtol=1e-6)
    assert (np.diff(betas[2:]) > 0).all()
    np.testing.assert_allclose(betas[-1], 0.2 * 1.7, rtol=1e-6)


def test_mm_dpo_s_beta_is_constant_at_both_ends_of_the_rate(close):
    scores = np.float32([[1.0, 0.0], [3.0, 0.5]])
    close(losses.mm_dpo_beta(scores, beta=0.2, weight=0.7, rate=1e-9), np.full(2, 0.2))
    close(losses.mm_dpo_beta(scores, beta=0.2, weight=0.7, rate=1e9), np.full(2, 0.2 * 1.7))


def test_mm_dpo_is_dpo_with_each_pair_s_beta(close):
    (policy, reference), scores = log_probs(27, 4), averages(27, 4)
    hyper = {"beta": 0.2, "weight": 0.7, "rate": 0.9}
    betas = losses.mm_dpo_beta(scores, **hyper)
    pairs = [losses.dpo(policy[i : i + 1], reference[i : i + 1], beta=betas[i])[0] for i in range(4)]
    close(losses.mm_dpo(policy, reference, scores, **hyper), np.array(pairs))
    # Before training the push is beta(delta) / 2.
    close(gradient_of(losses.mm_dpo, policy, policy, scores, **hyper)[:, 0], -np.asarray(betas) / 2)
    no_weight = losses.mm_dpo(policy, reference, scores, beta=0.2, weight=0.0, rate=0.9)
    np.testing.assert_array_equal(no_weight, losses.dpo(policy, reference, beta=0.2))


def test_mm_dpo_refuses_a_beta_without_bounds():
    pair = jnp.zeros((1, 2))
    for name, value in (("beta", 0.0), ("weight", -0.1), ("weight", np.inf), ("weight", np.nan), ("rate", -1.0)):
        with pytest.raises(ValueError, match=rf"^mm_dpo: {name} is"):
            losses.mm_dpo(pair, pair, pair, **{name: value})
        with pytest.raises(ValueError, match=rf"^mm_dpo_beta: {name} is"):
            losses.mm_dpo_beta(pair, **{name: value})
    with pytest.raises(ValueError, match=r"mm_dpo_beta: scores has shape \[3\]"):
        losses.mm_dpo_beta(jnp.zeros(3))


# Arguments.


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
    for loss, name in ((losses.cpo, "nll_logps"), (losses.slic_hf, "target_logps")):
        for wrong in (jnp.zeros(()), jnp.zeros(2), jnp.zeros((3, 1)), pair):
            with pytest.raises(ValueError, match=rf"{loss.__name__}: .*policy_logps\[:, 0\] \[3\], {name} "):
                loss(pair, wrong)


@pytest.mark.parametrize(
    "case", [c for c in EVERY_CASE if "beta" in c.hyper and not c.name], ids=lambda case: case.title
)
def test_a_beta_that_is_not_a_finite_number_above_0_is_refused(case):
    arrays = case.arrays(np.random.default_rng(0), 2)
    assert "beta" in inspect.signature(case.loss).parameters
    for beta in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^{case.loss.__name__}: beta is {beta}"):
            case.loss(*arrays, beta=beta)
