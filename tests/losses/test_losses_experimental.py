"""The reconstructed losses: what ties them to their known relatives. Oracles and extremes are in test_every_loss.py."""

import ast
import inspect
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from palign.losses import experimental
from tests.losses.cases.case import pair_logps
from tests.losses.cases.experimental import CASES, demonstrations, lists
from tests.losses.cases.experimental import F_SFT as EVERY_F_SFT
from tests.oracles import experimental_losses as oracle

F_SFT = {loss.__name__.removeprefix("f_sft_"): loss for loss in EVERY_F_SFT}
ZERO = np.zeros(1, np.float32)


def f32(arrays):
    return [np.float32(a) if a.dtype == np.float64 else a for a in arrays]


def ranked(seed, size=12):
    return f32(lists(np.random.default_rng(seed), size))


def without_ties(seed, size=10, length=5):
    """Scores, labels that all differ, `valid`."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.permutation(length) for _ in range(size)])
    return np.float32(rng.normal(0, 2, labels.shape)), np.float32(labels), rng.random(labels.shape) < 0.8


# The package


def test_the_package_and_each_module_say_first_that_they_are_reconstructions():
    files = sorted(pathlib.Path(experimental.__path__[0]).glob("*.py"))
    assert len(files) == 4
    for file in files:
        first = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).splitlines()[0].lower()
        assert "reconstruction" in first and "not the paper" in first and "letter" in first, file


def test_the_experimental_functions_tell_all_that_a_borrower_needs():
    assert len(experimental.__all__) == 8
    for name in experimental.__all__:
        function = getattr(experimental, name)
        parameters = [f"{parameter}:" for parameter in inspect.signature(function).parameters]
        for section in ("Args:", "Returns:", "Raises:", "References:", "Examples:", *parameters):
            assert section in function.__doc__, (name, section)
        assert name not in losses.__all__


# RankList


def test_rank_list_of_two_neighbours_is_ranknet_and_bradley_terry(close):
    scores = np.float32(np.random.default_rng(0).normal(0, 2, (8, 2)))
    labels, valid = np.tile(np.float32([1, 0]), (8, 1)), np.ones((8, 2), bool)
    close(experimental.rank_list(scores, labels, valid, skips=1), losses.bradley_terry(scores))
    close(experimental.rank_list(scores, labels[:, ::-1], valid), losses.bradley_terry(scores[:, ::-1]))


def test_the_log_sum_exp_form_is_list_mle(close):
    scores, labels, valid = without_ties(1)
    list_mle = losses.plackett_luce(scores, np.zeros_like(scores), labels, valid, beta=1.0)
    close(experimental.rank_list_lse(scores, labels, valid), list_mle, rtol=2e-6, atol=2e-6)


def test_with_enough_skips_all_pairs_are_compared(close):
    scores, labels, valid = without_ties(2)
    for skips in (4, 9):
        every_pair = losses.lipo_pair_logistic(scores, np.zeros_like(scores), labels, valid, beta=1.0)
        close(experimental.rank_list(scores, labels, valid, skips=skips), every_pair, rtol=2e-6, atol=2e-6)
    per_skip = [experimental.rank_list(scores, labels, valid, skips=skips) for skips in (1, 2, 3, 4)]
    assert all((more >= less).all() for less, more in itertools.pairwise(per_skip))
    assert (per_skip[3] > per_skip[0]).any()


def test_a_single_jump_is_bounded_by_the_log_sum_exp_form():
    # log(1 + sum_j exp(s_j - s_i)) is at least the term of the next place alone, and at most the sum of all terms.
    scores, labels, valid = without_ties(3)
    middle = experimental.rank_list_lse(scores, labels, valid)
    assert (experimental.rank_list(scores, labels, valid) <= middle + 1e-5).all()
    assert (middle <= experimental.rank_list(scores, labels, valid, skips=4) + 1e-5).all()


def test_a_margin_leaves_out_close_labels_and_ties_never_count(close):
    scores, valid = np.float32([[0.5, 2.0, 1.0]]), np.ones((1, 3), bool)
    labels = np.float32([[1.0, 0.75, 0.0]])
    softplus = np.logaddexp(0, np.float64([2.0 - 0.5, 1.0 - 2.0]))
    close(experimental.rank_list(scores, labels, valid, margin=0.0), [softplus.sum()])
    close(experimental.rank_list(scores, labels, valid, margin=0.25), [softplus.sum()])  # at least: equal counts
    close(experimental.rank_list(scores, labels, valid, margin=0.5), [softplus[1]])
    close(experimental.rank_list(scores, labels, valid, margin=2.0), [0])
    for loss in (experimental.rank_list, experimental.rank_list_lse):
        close(loss(scores, np.ones_like(labels), valid), [0])


@pytest.mark.parametrize("name", ["rank_list", "rank_list_3_skips", "rank_list_lse"])
def test_order_and_padding_of_a_list_do_not_matter(name, close):
    case = next(case for case in CASES if case.title == name)
    loss = jax.jit(lambda *arrays: case.loss(*arrays, **case.hyper))
    scores, labels, valid = without_ties(4)
    expected = loss(scores, labels, valid)
    order = np.random.default_rng(5).permutation(scores.shape[1])
    close(loss(scores[:, order], labels[:, order], valid[:, order]), expected, rtol=2e-6, atol=2e-6)
    for rubbish in (np.nan, np.inf):
        close(loss(np.where(valid, scores, rubbish), np.where(valid, labels, rubbish), valid), expected)
    wider = [np.pad(array, ((0, 0), (0, 2))) for array in (scores, labels, valid)]
    close(loss(*wider), expected)


@pytest.mark.parametrize("loss", [experimental.rank_list, experimental.rank_list_lse], ids=lambda loss: loss.__name__)
def test_lists_without_a_preference_cost_nothing_and_get_no_gradient(loss):
    scores = jnp.array([[1e4, -1e4, 3.0], [1.0, 2.0, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]])
    labels = jnp.array([[0.5, 0.5, 0.5], [1.0, jnp.nan, 0.0], [jnp.nan, jnp.nan, jnp.nan]])
    valid = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    value, gradient = jax.value_and_grad(lambda scores: loss(scores, labels, valid).sum())(scores)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("loss", [experimental.rank_list, experimental.rank_list_lse], ids=lambda loss: loss.__name__)
def test_nothing_on_the_way_is_nan_so_that_jax_s_own_search_for_nan_stays_quiet(loss):
    scores = jnp.array([[1e4, -1e4, 3.0], [1e4, -1e4, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    labels = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0], [0.5, 0.5, 0.5], [1.0, 0.5, 0.0]])
    valid = jnp.array([[True, True, True], [True, True, True], [True, True, True], [False, True, False]])
    with jax.debug_nans(True), jax.disable_jit():
        jax.grad(lambda scores: loss(scores, labels, valid).sum())(scores)


def test_a_list_of_one_place_has_nothing_to_compare(close):
    one = np.ones((3, 1), np.float32)
    for loss in (experimental.rank_list, experimental.rank_list_lse):
        close(loss(one, one, one > 0), np.zeros(3))


def test_constants_added_to_a_list_s_scores_change_nothing(close):
    scores, labels, valid = ranked(6)
    for loss in (experimental.rank_list, experimental.rank_list_lse):
        close(loss(scores + 4, labels, valid), loss(scores, labels, valid), rtol=1e-5, atol=1e-5)


# MAPL, between samples


def test_a_gap_of_0_under_the_second_prompt_leaves_dpo_under_the_first(close):
    policy, reference = f32(pair_logps(np.random.default_rng(7), 6))
    flat = reference + np.float32(3)  # both responses gained the same: what the prompt alone decides cancels
    both = np.stack([policy, flat], axis=1), np.stack([reference, reference], axis=1)
    close(experimental.mapl_inter(*both, beta=0.3), losses.dpo(policy, reference, beta=0.3), rtol=1e-5, atol=1e-5)


def test_swapping_the_prompts_or_both_pairs_of_responses_turns_the_preference_round(close):
    rng = np.random.default_rng(8)
    policy, reference = np.float32(rng.normal(0, 5, (2, 6, 2, 2)))
    here = experimental.mapl_inter(policy, reference, beta=0.2)
    turned = experimental.mapl_inter(policy[:, ::-1], reference[:, ::-1], beta=0.2)
    ratios = np.float64(policy) - reference
    gaps = 0.2 * (ratios[:, :, 0] - ratios[:, :, 1])
    close(turned - here, gaps[:, 0] - gaps[:, 1], rtol=1e-5, atol=1e-5)
    close(experimental.mapl_inter(policy[..., ::-1], reference[..., ::-1], beta=0.2), turned)
    close(experimental.mapl_inter(policy, policy), np.full(6, math.log(2)))


# Supervised losses from f-divergences


def slope_at(loss, u, beta=0.5):
    """dL/d(policy_logps) / beta, where the implicit reward is u: minus the weight of SFT's gradient."""
    gradient = jax.grad(lambda policy: loss(policy, ZERO, beta=beta).sum())(np.float32([u / beta]))
    return float(gradient[0]) / beta


@pytest.mark.parametrize(
    ("name", "weight"),
    [("chi2", 1.0), ("hellinger", 1.0), ("reverse_kl", 1 / math.e), ("forward_kl", 10.0), ("js", 1.0)],
)
def test_training_starts_with_sft_s_gradient_times_a_constant(name, weight):
    np.testing.assert_allclose(slope_at(F_SFT[name], 0.0), -weight, rtol=1e-6)


@pytest.mark.parametrize("u", [-0.5, 0.25, 1.0, 3.0])
def test_the_weights_are_the_closed_forms(u):
    weights = {
        "chi2": 1 - u / 2,
        "hellinger": (1 + u) ** -2,
        "reverse_kl": math.exp(-(u + 1)),
        "forward_kl": 1 / u if u > 0 else 10.0,
        "js": 1 / (2 * math.exp(u) - 1),
    }
    for name, weight in weights.items():
        np.testing.assert_allclose(slope_at(F_SFT[name], u), -weight, rtol=1e-5, err_msg=name)


# phi(u) = inf over t > 0 of u t + f(t), of the divergence that is the mean of f(ratio of the probabilities).
GENERATORS = {
    "chi2": lambda t: (t - 1) ** 2,
    "hellinger": lambda t: (np.sqrt(t) - 1) ** 2,
    "reverse_kl": lambda t: t * np.log(t),
    "forward_kl": lambda t: -np.log(t),
    "js": lambda t: t * np.log(t) - (t + 1) * np.log((t + 1) / 2),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_phi_is_the_conjugate_of_its_divergence(name):
    ratios = np.exp(np.linspace(-9, 9, 400_001))
    for u in (0.15, 0.5, 1.0, 1.9):
        phi = (u * ratios + GENERATORS[name](ratios)).min()
        with jax.enable_x64(True):
            loss = F_SFT[name](np.float64(u), np.float64(0.0), beta=1.0)
        np.testing.assert_allclose(-loss, phi, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "curvature"), [("chi2", 0.5), ("hellinger", 2.0), ("js", 2.0), ("reverse_kl", 1 / math.e)]
)
def test_the_curvature_at_the_reference(name, curvature):
    # That of -phi: phi'' is -1/2 for chi2, -2 for Hellinger.
    second = jax.grad(jax.grad(lambda policy: F_SFT[name](policy, np.float32(0.0), beta=1.0)))(np.float32(0.0))
    np.testing.assert_allclose(second, curvature, rtol=1e-6)


def test_chi2_rests_at_an_implicit_reward_of_2(close):
    assert slope_at(F_SFT["chi2"], 2.0) == 0 and slope_at(F_SFT["chi2"], 1.9) < 0 < slope_at(F_SFT["chi2"], 2.1)
    close(F_SFT["chi2"](np.float32([4.0]), ZERO, beta=0.5), [-1.0])


@pytest.mark.parametrize("name", ["chi2", "hellinger", "js"])
def test_a_small_beta_gives_sft_scaled(name, close):
    policy, reference = f32(demonstrations(np.random.default_rng(9), 6))
    with jax.enable_x64(True):
        policy, reference = np.float64(policy), np.float64(reference)
        close(F_SFT[name](policy, reference, beta=1e-6) / 1e-6, reference + losses.nll(policy), rtol=1e-4, atol=1e-4)
        gradient = jax.grad(lambda p: F_SFT[name](p, reference, beta=1e-6).sum() / 1e-6)(policy)
        close(gradient, np.full(6, -1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "lowest"), [("hellinger", -0.9), ("reverse_kl", -71.0), ("forward_kl", 0.1), ("js", 0.1 - math.log(2))]
)
def test_the_loss_goes_on_along_its_tangent(name, lowest, close):
    loss = F_SFT[name]
    with jax.enable_x64(True):

        def at(u):
            return loss(jnp.float64(u), jnp.float64(0.0), beta=1.0)

        value, slope = at(lowest), jax.grad(at)(jnp.float64(lowest))
        # Value and slope meet from both sides; below both stay what they are at the edge.
        for side in (-1e-9, 1e-9):
            close(at(lowest + side), value, rtol=1e-6)
            close(jax.grad(at)(jnp.float64(lowest + side)), slope, rtol=1e-6)
        for below in (0.5, 3.0, 1e4):
            close(at(lowest - below), value - slope * below, rtol=1e-9)
            close(jax.grad(at)(jnp.float64(lowest - below)), slope, rtol=1e-9)
        assert slope < 0


@pytest.mark.parametrize("name", F_SFT)
def test_pulls_weaken_as_the_implicit_reward_grows(name):
    # phi is concave, so the loss is convex, on its tangent too.
    u = np.linspace(-3, 3, 61, dtype=np.float32)
    slopes = np.asarray(jax.grad(lambda u: F_SFT[name](u, jnp.zeros_like(u), beta=1.0).sum())(u))
    assert (np.diff(slopes) >= -1e-5).all() and slopes[0] < slopes[-1]


@pytest.mark.parametrize("name", F_SFT)
def test_tokens_or_sequences_any_shape_is_taken_elementwise(name, close):
    policy, reference = f32(demonstrations(np.random.default_rng(10), 6))
    flat = F_SFT[name](policy, reference)
    close(F_SFT[name](policy.reshape(2, 3), reference.reshape(2, 3)), np.reshape(flat, (2, 3)))
    close(F_SFT[name](policy[0], reference[0]), flat[0])


# Arguments


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_defaults_are_the_oracle_s_too(case, close):
    arrays = case.arrays(np.random.default_rng(11), 5)
    close(case.loss(*f32(arrays)), case.oracle(*arrays), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "beta" in case.hyper], ids=lambda case: case.title)
def test_hyper_parameters_may_be_traced_and_have_gradients(case):
    arrays = case.arrays(np.random.default_rng(12), 4)
    hyper = {name: jnp.float32(value) for name, value in case.hyper.items()}
    value, slopes = jax.jit(jax.value_and_grad(lambda hyper: case.loss(*f32(arrays), **hyper).sum()))(hyper)
    np.testing.assert_allclose(value, case.oracle(*arrays, **case.hyper).sum(), rtol=1e-5)
    for name, slope in slopes.items():
        up, down = (case.oracle(*arrays, **{**case.hyper, name: case.hyper[name] + s}).sum() for s in (1e-6, -1e-6))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-3, atol=1e-4, err_msg=name)


def test_wrong_arguments_are_answered_with_their_name():
    scores, valid = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    for skips in (0, -1, 1.5):
        with pytest.raises(ValueError, match="rank_list: skips is"):
            experimental.rank_list(scores, scores, valid, skips=skips)
    for margin in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="rank_list: margin is"):
            experimental.rank_list(scores, scores, valid, margin=margin)
    with pytest.raises(ValueError, match=r"rank_list_lse: valid has dtype float32"):
        experimental.rank_list_lse(scores, scores, scores)
    with pytest.raises(ValueError, match=r"mapl_inter: policy_logps has shape \[2, 3\]; expected \[B, 2, 2\]"):
        experimental.mapl_inter(scores, scores)
    with pytest.raises(ValueError, match=r"f_sft_js: all shapes must be equal"):
        F_SFT["js"](scores, scores[:1])
    with pytest.raises(ValueError, match="f_sft_chi2: beta is 0"):
        F_SFT["chi2"](scores, scores, beta=0)


def test_the_oracle_of_the_tangent_is_not_the_formula():
    # Guards the guard: the formulas have no value there.
    assert oracle.f_sft_forward_kl(np.zeros(1), np.zeros(1)) == pytest.approx(math.log(10))
