"""The identities and limits of f-DPO, TDPO, EXO, NCA, APO, SPPO, WPO, DiscoPOP, MAPL and BVPO."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.losses.cases.pairwise_shaped import LOG_2, gradient, log_probs, ratios
from tests.oracles import pairwise_shaped_losses as oracle

# What changes when the same amount is added to the log-ratios of both responses: the normaliser of the prompt cancels
# from differences only.

DIFFERENCES = {
    "exo_pair": losses.exo_pair,
    "discopop": losses.discopop,
    "mapl_intra": losses.mapl_intra,
    "tdpo1": lambda p, r: losses.tdpo1(p, r, jnp.abs(r)),
    "tdpo2": lambda p, r: losses.tdpo2(p, r, jnp.abs(r)),
    "wpo": lambda p, r: losses.wpo(p, r, r / 100),
    "aot": lambda p, r: losses.aot(p, r[:, 0] - r[:, 1]),
    "spa": lambda p, r: losses.spa(p, r, p, 0.1),
}
ABSOLUTE = {
    "nca_pair": losses.nca_pair,
    "apo_zero": losses.apo_zero,
    "apo_down": losses.apo_down,
    "sppo_hard": functools.partial(losses.sppo_hard, beta=0.1),
    "f_dpo_forward_kl": losses.f_dpo_forward_kl,
    "f_dpo_js": losses.f_dpo_js,
    "f_dpo_alpha": losses.f_dpo_alpha,
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_shift_of_both_log_ratios_leaves_losses_of_differences_alone(name, close):
    policy, reference = log_probs(0)
    loss = DIFFERENCES[name]
    close(loss(policy + 4.0, reference), np.float64(loss(policy, reference)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ABSOLUTE)
def test_a_shift_of_both_log_ratios_changes_losses_of_absolute_rewards(name):
    policy, reference = log_probs(1)
    loss = ABSOLUTE[name]
    assert (np.abs(loss(policy + 4.0, reference) - loss(policy, reference)) > 1e-4).all()


# f-DPO


def test_alpha_runs_from_dpo_to_the_forward_kl(close):
    policy, reference = log_probs(2)
    alpha = jax.jit(lambda alpha: losses.f_dpo_alpha(policy, reference, beta=0.3, alpha=alpha))
    dpo = np.float64(losses.dpo(policy, reference, beta=0.3))
    close(alpha(0.0), dpo)
    close(losses.f_dpo_alpha(policy, reference, beta=0.3, alpha=0), dpo)
    close(alpha(1e-6), dpo, rtol=1e-4, atol=1e-4)
    close(alpha(1.0), np.float64(losses.f_dpo_forward_kl(policy, reference, beta=0.3)))
    at_zero = gradient(lambda p, r: losses.f_dpo_alpha(p, r, beta=0.3, alpha=0.0), policy, reference)
    close(at_zero, np.float64(gradient(lambda p, r: losses.dpo(p, r, beta=0.3), policy, reference)))


def test_trl_s_alpha_is_one_less_ours(close):
    policy, reference = log_probs(3)
    for alpha in (0.25, 0.5, 0.8):
        ours = losses.f_dpo_alpha(policy, reference, beta=0.3, alpha=alpha)
        close(ours, oracle.trl_alpha_divergence(policy, reference, 0.3, 1.0 - alpha), rtol=5e-6, atol=5e-6)
        same_number = oracle.trl_alpha_divergence(policy, reference, 0.3, alpha)
        assert (np.abs(ours - same_number).max() > 0.1) == (alpha != 0.5)


def test_every_divergence_starts_at_log_2_and_js_with_half_of_dpo_s_gradient(close):
    zeros = np.zeros((1, 2), np.float32)
    for loss, share in (
        (losses.f_dpo_forward_kl, 1.0),
        (losses.f_dpo_alpha, 1.0),
        (functools.partial(losses.f_dpo_alpha, alpha=0.9), 1.0),
        (losses.f_dpo_js, 0.5),
    ):
        close(loss(zeros, zeros, beta=0.2), [LOG_2])
        slope = share * 0.2 / 2
        close(gradient(functools.partial(loss, beta=0.2), zeros, zeros), [[-slope, slope]])


def test_the_forward_kl_is_clamped_only_where_float32_would_overflow(close):
    forward_kl = functools.partial(losses.f_dpo_forward_kl, beta=0.1)
    policy, zeros = ratios((-79.0, 0.0), (-81.0, 0.0), (-500.0, 0.0))
    values = np.float64(forward_kl(policy, zeros))
    close(values / np.exp(79.0), [0.1, 0.1 * np.e, 0.1 * np.e], rtol=1e-5)
    slopes = np.asarray(gradient(forward_kl, policy, zeros))
    assert slopes[0, 0] < -1e30 and slopes[1, 0] == 0 and slopes[2, 0] == 0


# TDPO


@pytest.mark.parametrize("loss", [losses.tdpo1, losses.tdpo2], ids=["tdpo1", "tdpo2"])
def test_token_level_dpo_without_divergence_is_dpo(loss, close):
    policy, reference = log_probs(4)
    none = np.zeros_like(policy)
    close(loss(policy, reference, none, beta=0.2), np.float64(losses.dpo(policy, reference, beta=0.2)))
    close(loss(policy, policy, none, beta=0.2), np.full(len(policy), LOG_2))


def test_tdpo2_without_weight_is_dpo_and_with_weight_one_has_tdpo1_s_value(close):
    policy, reference = log_probs(5)
    divergence = np.abs(reference) / 10
    without = losses.tdpo2(policy, reference, divergence, beta=0.2, alpha=0.0)
    close(without, np.float64(losses.dpo(policy, reference, beta=0.2)))
    first = losses.tdpo1(policy, reference, divergence, beta=0.2)
    close(losses.tdpo2(policy, reference, divergence, beta=0.2, alpha=1.0), np.float64(first))


def test_only_tdpo1_differentiates_the_chosen_response_s_divergence(close):
    policy, reference = log_probs(6)
    divergence = np.abs(reference) / 10
    h = np.float64((policy - reference)[:, 0] - (policy - reference)[:, 1])
    drift = np.float64(divergence[:, 1] - divergence[:, 0])
    first = gradient(functools.partial(losses.tdpo1, beta=0.2), policy, reference, divergence, argnums=2)
    slope = 0.2 / (1 + np.exp(0.2 * (h - drift)))
    close(first, np.stack([-slope, slope], axis=1))
    second = gradient(functools.partial(losses.tdpo2, beta=0.2, alpha=0.7), policy, reference, divergence, argnums=2)
    slope = 0.7 * 0.2 / (1 + np.exp(0.2 * (h - 0.7 * drift)))
    close(second, np.stack([0 * slope, slope], axis=1))
    # Neither has lost the gradient of the log-ratios.
    of_policy = gradient(functools.partial(losses.tdpo2, beta=0.2, alpha=0.7), policy, reference, divergence)
    close(of_policy, np.stack([-slope / 0.7, slope / 0.7], axis=1))


# EXO, NCA, APO, SPPO


def test_exo_rests_where_the_policy_s_preference_is_the_label_s(close):
    for epsilon in (0.3, 0.05, 1e-3):
        rest = np.log((1 - epsilon) / epsilon)
        exo = functools.partial(losses.exo_pair, beta=0.5, label_smoothing=epsilon)
        policy, zeros = ratios((rest / 0.5, 0.0), (rest / 0.5 - 1, 0.0), (rest / 0.5 + 1, 0.0))
        close(exo(policy, zeros)[:1], [0.0])
        slopes = np.asarray(gradient(exo, policy, zeros))
        np.testing.assert_allclose(slopes[0], 0.0, atol=1e-7)
        assert slopes[1, 0] < 0 < slopes[2, 0] and slopes[2, 1] < 0 < slopes[1, 1]
    policy, zeros = ratios((-1e4, 1e4))
    close(losses.exo_pair(policy, zeros, label_smoothing=0.01), [-np.log(0.01)])


def test_exo_is_a_reverse_kl_and_conservative_dpo_the_forward_one(close):
    policy, reference = log_probs(7)
    gap = 0.2 * np.float64((policy - reference)[:, 0] - (policy - reference)[:, 1])
    epsilon, p = 0.1, 1 / (1 + np.exp(-gap))
    reverse = p * np.log(p / (1 - epsilon)) + (1 - p) * np.log((1 - p) / epsilon)
    close(losses.exo_pair(policy, reference, beta=0.2, label_smoothing=epsilon), reverse, rtol=1e-5)
    entropy = -(1 - epsilon) * np.log(1 - epsilon) - epsilon * np.log(epsilon)
    forward = (1 - epsilon) * np.log((1 - epsilon) / p) + epsilon * np.log(epsilon / (1 - p))
    close(losses.cdpo(policy, reference, beta=0.2, label_smoothing=epsilon) - entropy, forward, rtol=1e-5)


def test_nca_starts_at_2_log_2_and_holds_the_chosen_reward_at_log_2(close):
    nca = functools.partial(losses.nca_pair, beta=0.5)
    policy, zeros = ratios((0.0, 0.0), (2 * LOG_2, -3.0), (2 * LOG_2, 3.0))
    close(nca(policy, zeros)[:1], [2 * LOG_2])
    slopes = np.asarray(gradient(nca, policy, zeros))
    # Before training: -sigmoid(0) + sigmoid(0) / 2 for the chosen reward, sigmoid(0) / 2 for the rejected one.
    close(slopes[0], [0.5 * -0.25, 0.5 * 0.25])
    close(slopes[1:, 0], [0.0, 0.0], atol=1e-7)
    assert (slopes[1:, 1] > 0).all()


def test_apo_is_one_at_the_start_and_apo_zero_counts_the_other_way_for_swapped_pairs(close):
    policy, reference = log_probs(8)
    for loss in (losses.apo_zero, losses.apo_down):
        close(loss(policy, policy), np.ones(len(policy)))
        values = np.asarray(loss(policy * 100, reference))
        assert (values >= 0).all() and (values <= 2).all()
    swapped = losses.apo_zero(policy[:, ::-1], reference[:, ::-1])
    close(losses.apo_zero(policy, reference) + swapped, np.full(len(policy), 2.0))


def test_apo_zero_lifts_the_chosen_response_and_apo_down_lowers_both(close):
    policy, zeros = ratios((1.0, -1.0))
    zero = np.asarray(gradient(losses.apo_zero, policy, zeros))
    assert zero[0, 0] < 0 < zero[0, 1]
    # At a fixed margin apo_down falls with both log-probabilities: its gradients add up to that of sigmoid(r_w).
    down = np.asarray(gradient(losses.apo_down, policy, zeros))
    slope = 1 / (1 + np.exp(-0.1))
    close(down.sum(), 0.1 * slope * (1 - slope))
    assert down[0, 1] > 0


def test_sppo_rests_at_plus_and_minus_one_over_two_beta(close):
    for beta in (0.1, 1e-3):
        sppo = functools.partial(losses.sppo_hard, beta=beta)
        policy, zeros = ratios((1 / (2 * beta), -1 / (2 * beta)), (0.0, 0.0))
        close(sppo(policy, zeros), [0.0, 1 / (2 * beta**2)])
        slopes = np.asarray(gradient(sppo, policy, zeros))
        close(slopes, [[0.0, 0.0], [-1 / beta, 1 / beta]])


def test_sppo_s_optimum_is_ipo_s_too(close):
    # (rho_w - t)^2 + (rho_l + t)^2 at rho_l = -rho_w is half of (h - 2t)^2, which is IPO with half the beta.
    policy, zeros = ratios((3.0, -3.0), (-1.5, 1.5))
    halves = np.float64(losses.ipo(policy, zeros, beta=0.05)) / 2
    close(losses.sppo_hard(policy, zeros, beta=0.1), halves)


def test_stored_constants_of_the_losses_that_libraries_get_wrong(close):
    policy, zeros = ratios((3.0, -2.0), (-4.0, 1.0))
    close(losses.apo_down(policy, zeros, beta=0.1), [0.9519833, 1.0237717])
    close(losses.apo_zero(policy, zeros, beta=0.1), [0.8757236, 1.1236666])
    close(losses.nca_pair(policy, zeros, beta=0.1), [1.2806023, 1.5417212])
    close(losses.discopop(policy, zeros, beta=0.05, temperature=0.05), [0.7774431, 0.8290053])


# WPO


def test_wpo_is_dpo_at_weight_one_and_proportional_to_its_weight(close):
    policy, reference = log_probs(9)
    dpo = np.float64(losses.dpo(policy, reference, beta=0.2))
    close(losses.wpo(policy, reference, np.zeros_like(policy), beta=0.2), dpo)
    alignment = np.full_like(policy, -0.35)
    close(losses.wpo(policy, reference, alignment, beta=0.2), dpo * np.exp(-0.7))
    weighted = gradient(losses.wpo, policy, reference, alignment)
    close(weighted, np.exp(-0.7) * np.float64(gradient(losses.dpo, policy, reference)))


def test_greedy_tokens_have_more_than_weight_one_and_are_clamped(close):
    p = np.array([0.4, 0.3, 0.1, 0.1, 0.1], np.float32)
    logits = np.tile(np.log(p), (1, 4, 1))
    ids, mask = np.zeros((1, 4), np.int32), np.array([[False, True, True, True]])
    greedy = jax.jit(losses.dense.alignment_logps)(logits, ids, mask)
    close(np.exp(greedy), [0.4 / 0.28])  # 1.43 per token
    both = jnp.stack([greedy, greedy], axis=1)
    close(losses.wpo_weights(both), [1.0])
    close(losses.wpo_weights(both - 1.0), [(0.4 / 0.28) ** 2 * np.exp(-2.0)])
    close(losses.wpo_weights(jnp.full((1, 2), 1e4)), [1.0])


# DiscoPOP


def test_discopop_starts_between_its_two_losses_and_is_not_convex(close):
    policy, zeros = ratios((0.0, 0.0), (2.0, 0.0), (20.0, 0.0))
    values = np.asarray(losses.discopop(policy, zeros, beta=0.05, temperature=0.05))
    close(values[0], (LOG_2 + 1) / 2)
    assert values[1] > values[0] > values[2]


def test_discopop_is_logistic_for_wrong_pairs_and_exponential_for_right_ones(close):
    policy, zeros = ratios((-40.0, 0.0), (-1e4, 1e4), (40.0, 0.0), (1e4, -1e4))
    expected = [np.logaddexp(0, 2.0), 1000.0, np.exp(-2.0), 0.0]
    close(losses.discopop(policy, zeros, beta=0.05, temperature=0.05), expected)
    slopes = np.asarray(gradient(losses.discopop, policy, zeros))
    close(slopes[1], [-0.05, 0.05])


# MAPL, BVPO


def test_mapl_within_a_sample_is_dpo_on_prompts_in_place_of_responses(close):
    policy, reference = log_probs(18)
    close(losses.mapl_intra(policy, reference, beta=0.2), np.float64(losses.dpo(policy, reference, beta=0.2)))
    close(losses.mapl_intra(policy, policy), np.full(len(policy), LOG_2))


def test_bvpo_mixes_losses_and_gradients_linearly(close):
    policy, reference = log_probs(19)

    def mixed(alpha):
        def loss(p):
            trace, empty = losses.dpo(p, reference), losses.dpo(p[:, ::-1] / 2, reference)
            return losses.bvpo(trace, empty, alpha=alpha)

        return loss(policy), gradient(loss, policy)

    (trace, trace_slopes), (empty, empty_slopes) = mixed(1.0), mixed(0.0)
    close(trace, np.float64(losses.dpo(policy, reference)))
    close(empty, np.float64(losses.dpo(policy[:, ::-1] / 2, reference)))
    value, slopes = mixed(0.3)
    close(value, 0.3 * np.float64(trace) + 0.7 * np.float64(empty))
    close(slopes, 0.3 * np.float64(trace_slopes) + 0.7 * np.float64(empty_slopes))
    assert losses.bvpo(jnp.float32(1.0), jnp.float32(3.0), alpha=0.25) == 2.5


def sampled_gradients(seed, bias):
    """Gradients of many draws, correlated, and the one that they estimate: two `[N, D]` and `[D]`."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0.0, 0.5, (500, 3))
    trace = 0.1 * bias + shared + rng.normal(0.0, 1.5, (500, 3))
    empty = bias + shared + rng.normal(0.0, 0.3, (500, 3))
    return trace, empty, np.zeros(3)


@pytest.mark.parametrize("bias", [(0.3, -0.2, 0.1), (1.0, 0.5, -1.0)])
def test_bvpo_s_weight_minimises_the_mean_squared_error_of_sampled_gradients(bias):
    trace, empty, true = sampled_gradients(0, np.array(bias))
    b_t, b_e = trace.mean(0) - true, empty.mean(0) - true
    s_t, s_e = trace.var(0).sum(), empty.var(0).sum()
    s_te = ((trace - trace.mean(0)) * (empty - empty.mean(0))).mean(0).sum()
    with jax.enable_x64(True):
        best = float(losses.bvpo_weight(b_t, b_e, s_t, s_e, s_te))
    grid = np.linspace(0.0, 1.0, 2001)
    errors = [((a * trace + (1 - a) * empty - true) ** 2).sum(1).mean() for a in grid]
    assert 0.01 < best < 0.99
    assert abs(best - grid[np.argmin(errors)]) <= 1 / 2000


def test_bvpo_s_weight_without_bias_and_covariance_of_the_empty_trace(close):
    b_t = np.array([1.0, -2.0], np.float32)
    close(losses.bvpo_weight(b_t, jnp.zeros(2), 3.0, 2.0, 0.0), 2.0 / (5.0 + 3.0 + 2.0))


def test_bvpo_s_weight_is_clipped_and_defined_where_every_weight_is_as_good(close):
    zeros, one = jnp.zeros(2), jnp.ones(2)
    # A trace without error, and an empty trace without error.
    close(losses.bvpo_weight(zeros, one, 0.0, 1.0, 0.0), 1.0)
    close(losses.bvpo_weight(one, zeros, 1.0, 0.0, 0.0), 0.0)
    # Optima outside: the covariance exceeds the smaller variance.
    close(losses.bvpo_weight(zeros, zeros, 4.0, 1.0, 1.5), 0.0)
    close(losses.bvpo_weight(zeros, zeros, 1.0, 4.0, 1.5), 1.0)
    close(losses.bvpo_weight(one, one, 2.0, 2.0, 2.0), 0.5)
    slopes = jax.grad(lambda b: losses.bvpo_weight(b, one, 1.0, 1.0, 0.0))(zeros)
    assert not slopes.any()


def test_bvpo_s_weight_takes_moments_of_any_type(close):
    b_t, b_e = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25], jnp.bfloat16)
    expected = np.float64(losses.bvpo_weight(b_t, b_e.astype(jnp.float32), 3.0, 2.0, 1.0))
    assert 0.1 < expected < 0.9
    moments = jnp.bfloat16(3.0), np.int32(2), np.float64(1.0)
    actual = losses.bvpo_weight(b_t, b_e, *moments)
    assert actual.dtype == jnp.float32
    close(actual, expected)
    with jax.enable_x64(True):
        close(losses.bvpo_weight(np.float32(b_t), np.float32(b_e), *moments), expected)


# Arguments


def test_numbers_out_of_range_are_refused_by_name():
    pair = jnp.zeros((3, 2))
    for loss, message in (
        (lambda: losses.f_dpo_alpha(pair, pair, alpha=1.5), r"f_dpo_alpha: alpha is 1.5; .*\[0.0, 1.0\]"),
        (lambda: losses.f_dpo_js(pair, pair, beta=0.0), "f_dpo_js: beta is 0.0"),
        (lambda: losses.tdpo2(pair, pair, pair, alpha=-0.1), "tdpo2: alpha is -0.1"),
        (lambda: losses.tdpo2(pair, pair, pair, alpha=float("inf")), "tdpo2: alpha is inf"),
        (lambda: losses.exo_pair(pair, pair, label_smoothing=0.0), "exo_pair: label_smoothing is 0.0"),
        (lambda: losses.exo_pair(pair, pair, label_smoothing=0.6), "exo_pair: label_smoothing is 0.6"),
        (lambda: losses.aot(pair, jnp.zeros(3), label_smoothing=-0.1), "aot: label_smoothing is -0.1"),
        (lambda: losses.discopop(pair, pair, temperature=0.0), "discopop: temperature is 0.0"),
        (lambda: losses.spa(pair, pair, pair, 0.0, alpha=float("nan")), "spa: alpha is nan"),
        (lambda: losses.spa_threshold(losses.spa_history(), quantile=1.1), "spa_threshold: quantile is 1.1"),
        (lambda: losses.spa_threshold(losses.spa_history(), start=-1), "spa_threshold: start is -1"),
        (lambda: losses.bvpo(pair, pair, alpha=1.01), "bvpo: alpha is 1.01"),
    ):
        with pytest.raises(ValueError, match=message):
            loss()


def test_wrong_shapes_are_answered_with_the_argument_s_name():
    pair, listed = jnp.zeros((3, 2)), jnp.ones(3, bool)
    for loss, message in (
        (lambda: losses.wpo_weights(jnp.zeros(3)), r"wpo_weights: alignment has shape \[3\]"),
        (lambda: losses.aot_matched_margins(pair, pair, listed[:2]), r"aot_matched_margins: listed has shape \[2\]"),
        (lambda: losses.aot_matched_margins(pair, pair, jnp.ones(3)), "listed has dtype float32; expected bool"),
        (lambda: losses.aot_matched_ratios(pair, pair[:1], listed), r"aot_matched_ratios: .*ref_logps \[1, 2\]"),
        (lambda: losses.aot(pair, jnp.zeros((3, 1))), r"aot: matched_margins has shape \[3, 1\]"),
        (lambda: losses.spa(pair, pair, pair, jnp.zeros(3)), r"spa: threshold has shape \[3\]; expected a scalar"),
        (lambda: losses.spa_remember(losses.spa_history(), jnp.zeros(3)), "spa_remember: mean_margin has shape"),
        (lambda: losses.bvpo_weight(pair, pair, 1.0, 1.0, 0.0), r"bvpo_weight: trace_bias has shape \[3, 2\]"),
        (lambda: losses.bvpo_weight(pair[0], pair[0], pair[0], 1.0, 0.0), "bvpo_weight: trace_variance has shape"),
        (lambda: losses.bvpo_weight(jnp.zeros(2), jnp.zeros(3), 1.0, 1.0, 0.0), r"empty_bias \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            loss()
