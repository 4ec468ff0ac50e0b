"""Divergences and AlignDistil against the oracles, their closed forms, limits, padding and AlignDistil's identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from palign import losses
from tests.oracles import distill_losses as oracle

forward_kl, reverse_kl = jax.jit(losses.forward_kl), jax.jit(losses.reverse_kl)
generalised_jsd = jax.jit(losses.generalised_jsd)
scaled_jsd = jax.jit(losses.scaled_jsd)
theorem1_teacher = jax.jit(losses.theorem1_teacher)
contrastive_teacher = jax.jit(losses.contrastive_teacher)
adaptive_teacher = jax.jit(losses.adaptive_teacher)
aligndistil = jax.jit(losses.aligndistil)

# name -> (loss, oracle, number of arrays of logits)
CASES = {
    "forward_kl": (forward_kl, oracle.forward_kl, 2),
    "reverse_kl": (reverse_kl, oracle.kl, 2),
    "jsd": (functools.partial(generalised_jsd, beta=0.3), functools.partial(oracle.jsd, beta=0.3), 2),
    "scaled_jsd": (
        functools.partial(scaled_jsd, beta=0.3),
        functools.partial(oracle.scaled_jsd, beta=0.3),
        2,
    ),
    "theorem1": (
        jax.jit(functools.partial(losses.aligndistil_theorem1, beta=0.04, beta0=0.1)),
        functools.partial(oracle.theorem1, beta=0.04, beta0=0.1),
        3,
    ),
    "contrastive": (
        jax.jit(functools.partial(losses.aligndistil_contrastive, beta=0.05, beta0=0.1)),
        functools.partial(oracle.contrastive, beta=0.05, beta0=0.1),
        3,
    ),
    "aligndistil": (
        functools.partial(aligndistil, beta0=0.2),
        functools.partial(oracle.aligndistil, beta0=0.2, scale=20.0, epsilon=1e-3),
        3,
    ),
    "constant": (
        jax.jit(functools.partial(losses.aligndistil_constant, beta0=0.2, scale=5.0)),
        functools.partial(oracle.aligndistil_constant, beta0=0.2, scale=5.0),
        3,
    ),
    "capped": (
        jax.jit(functools.partial(losses.aligndistil_capped, beta0=0.2, cap=0.05)),
        functools.partial(oracle.aligndistil_capped, beta0=0.2, cap=0.05),
        3,
    ),
}


def logits(seed, count, positions=16, vocab=9, padded=2, padding=-np.inf, extremes=True):
    """Related logits of `count` models; the last `padded` tokens are excluded in all of them."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 2, (positions, vocab))
    arrays = [base + rng.normal(0, 0.7, base.shape) for _ in range(count)]
    if extremes:
        for array in arrays:
            array[:2] *= 3000.0
    for array in arrays:
        array[:, vocab - padded :] = padding
    return [array.astype(np.float32) for array in arrays]


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_oracle_s_in_f32_and_x64(name, close):
    loss, expected, count = CASES[name]
    arrays = logits(0, count)
    close(loss(*arrays), oracle.per_position(expected, *arrays))
    with jax.enable_x64(True):
        arrays = [np.float64(array) for array in arrays]
        actual = loss(*arrays)
        assert actual.dtype == jnp.float64
        close(actual, oracle.per_position(expected, *arrays), rtol=1e-11, atol=1e-12)


# The other losses are these with another constant weight.
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "aligndistil"])
def test_two_derivatives_agree_with_finite_differences(name):
    loss, _, count = CASES[name]
    with jax.enable_x64(True):
        student, *rest = (np.float64(array[2:5]) for array in logits(1, count, padded=0))
        check_grads(lambda student: loss(student, *rest), (student,), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("name", CASES)
def test_padding_of_any_depth_is_as_good_as_absent(name, value_and_gradient, close):
    loss, _, count = CASES[name]
    arrays = logits(2, count, padded=2, padding=0.0)
    expected, expected_gradient = value_and_gradient(loss, *(array[:, :-2] for array in arrays))
    depths = [-np.inf, -1e30, -1e9, np.finfo(np.float32).min]
    for shift, padding in enumerate(depths):
        for k, array in enumerate(arrays):
            # The first depth is the same in all models, the others meet each other.
            array[:, -2:] = padding if shift == 0 else depths[(shift + k) % len(depths)]
        value, gradient = value_and_gradient(loss, *arrays)
        close(value, np.float64(expected))
        close(gradient[:, :-2], np.float64(expected_gradient))
        assert not gradient[:, -2:].any()


@pytest.mark.parametrize("name", CASES)
def test_extreme_and_bf16_logits_give_finite_f32_values_and_gradients(name, value_and_gradient):
    loss, _, count = CASES[name]
    arrays = [jnp.asarray(array * 1e4, jnp.bfloat16) for array in logits(4, count, positions=4, padded=1)]
    value, gradient = value_and_gradient(loss, *arrays)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert np.isfinite(value).all() and np.isfinite(np.float32(gradient)).all()


def test_a_teacher_and_its_weights_are_constants():
    dpo, other = logits(17, 2, positions=3, extremes=False)

    def everything(dpo, other):
        teachers = [
            losses.theorem1_teacher(dpo, other, ratio=2.0),
            losses.contrastive_teacher(dpo, other, ratio=2.0),
            losses.adaptive_teacher(dpo, other),
        ]
        return sum((teacher.logits[:, :-2].sum() + teacher.alpha.sum() for teacher in teachers), start=jnp.zeros(()))

    assert not any(np.asarray(gradient).any() for gradient in jax.jit(jax.grad(everything, argnums=(0, 1)))(dpo, other))
    alpha = jnp.array([0.5, 2.0])
    for weight in (losses.adaptive_weight, losses.constant_weight, losses.capped_weight):
        assert not jax.grad(lambda alpha, weight=weight: weight(alpha, beta=0.1).sum())(alpha).any()


def test_a_nan_is_not_hidden():
    student, teacher = logits(5, 2, positions=2)
    student[0, 0] = np.nan
    np.testing.assert_array_equal(np.isnan(reverse_kl(student, teacher)), [True, False])


def test_the_gradients_have_their_closed_forms(value_and_gradient, close):
    student, teacher = logits(6, 2, padded=0, extremes=False)
    q, p = np.float64(jax.nn.softmax(student)), np.float64(jax.nn.softmax(teacher))
    value, gradient = value_and_gradient(reverse_kl, student, teacher)
    close(gradient, q * (np.log(q) - np.log(p) - np.float64(value)[:, None]))
    close(gradient.sum(-1), np.zeros(len(q)))
    close(value_and_gradient(forward_kl, student, teacher)[1], q - p)


def test_constants_of_a_position_change_nothing(close):
    arrays = logits(7, 3, padded=0, extremes=False)
    shifts = np.random.default_rng(0).normal(0, 5, (3, 16, 1)).astype(np.float32)
    with jax.enable_x64(True):
        arrays = [np.float64(array) for array in arrays]
        shifted = [array + shift for array, shift in zip(arrays, np.float64(shifts), strict=True)]
        for loss, _, count in CASES.values():
            close(loss(*shifted[:count]), loss(*arrays[:count]), rtol=1e-10, atol=1e-10)


def test_equal_distributions_are_no_divergence_apart():
    student, _ = logits(8, 2)
    for loss in (forward_kl, reverse_kl, generalised_jsd, scaled_jsd):
        assert not np.asarray(loss(student, student)).any()


def test_jsd_is_symmetric_at_one_half_bounded_and_finite_on_disjoint_supports(close):
    student, teacher = logits(9, 2)
    close(generalised_jsd(student, teacher), np.float64(generalised_jsd(teacher, student)))
    apart = jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0])
    close(generalised_jsd(*apart), np.log(2))
    close(generalised_jsd(*apart, beta=0.1), -0.1 * np.log(0.1) - 0.9 * np.log(0.9))


def test_scaled_jsd_runs_from_the_forward_to_the_reverse_kl(value_and_gradient, close):
    student, teacher = logits(10, 2, padded=1)
    close(scaled_jsd(student, teacher, beta=0.5), 4 * np.float64(generalised_jsd(student, teacher)))
    mild = [array[2:] for array in (student, teacher)]
    for end, kl in ((1e-6, forward_kl), (1 - 1e-6, reverse_kl)):
        near_end = jax.jit(functools.partial(losses.scaled_jsd, beta=end))
        value, gradient = value_and_gradient(near_end, *mild)
        expected, expected_gradient = value_and_gradient(kl, *mild)
        close(value, np.float64(expected), rtol=1e-4)
        close(gradient, np.float64(expected_gradient), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [1e-5, 1e-2, 0.99, 1 - 1e-5])
def test_scaled_jsd_keeps_its_precision_near_the_ends(beta, close):
    student, teacher = logits(11, 2)
    loss = jax.jit(functools.partial(losses.scaled_jsd, beta=beta))
    with jax.enable_x64(True):
        expected = loss(np.float64(student), np.float64(teacher))
        by_entropies = oracle.per_position(functools.partial(oracle.jsd, beta=beta), student, teacher)
        close(expected, by_entropies / (beta * (1 - beta)), rtol=1e-9, atol=1e-9)
    close(loss(student, teacher), np.asarray(expected), atol=3e-6)


def per_state_rlhf(student, rewarded, base, beta, beta0):
    """The RLHF objective of one state (negated): beta KL(student || base) less beta0 times the expected log-ratio."""
    reward = oracle.combine(oracle.log_softmax(rewarded[0]), oracle.log_softmax(rewarded[1]), 1, -1)
    expected = sum(p * r for p, r in zip(oracle.softmax(student), reward, strict=True))
    return beta * oracle.kl(student, base) - beta0 * expected


@pytest.mark.parametrize("name", ["theorem1", "contrastive"])
def test_distillation_is_rlhf_in_every_state(name):
    # Identity 1: the two differ by beta times the log-partition function, whatever the student.
    dpo, other, first, second = logits(12, 4, positions=1, padded=0, extremes=False)
    loss, beta = {
        "theorem1": (losses.aligndistil_theorem1, 0.04),
        "contrastive": (losses.aligndistil_contrastive, 0.05),
    }[name]
    base = other[0] if name == "theorem1" else dpo[0]
    with jax.enable_x64(True):
        gaps = [
            float(loss(*map(np.float64, (student, dpo, other)), beta=beta, beta0=0.1)[0])
            - per_state_rlhf(np.float64(student[0]), np.float64((dpo[0], other[0])), np.float64(base), beta, 0.1)
            for student in (first, second)
        ]
        log_base, log_dpo, log_other = (
            np.array(oracle.log_softmax(np.float64(z).tolist())) for z in (base, dpo[0], other[0])
        )
        partition = np.log(np.exp(log_base + 0.1 / beta * (log_dpo - log_other)).sum())
    np.testing.assert_allclose(gaps, beta * partition, atol=1e-12)


def test_the_contrastive_teacher_is_theorem_1_s_one_step_further(close):
    # Identity 2.
    dpo, other = logits(13, 2, padded=0, extremes=False)
    further = np.float64(theorem1_teacher(dpo, other, ratio=2.5).logits)
    close(contrastive_teacher(dpo, other, ratio=1.5).logits, further, atol=5e-6)
    reverse = 2 * other - dpo
    twice = np.float64(theorem1_teacher(dpo, other, ratio=4.0).logits)
    close(contrastive_teacher(dpo, reverse, ratio=1.5).logits, twice, atol=5e-6)


def test_the_teacher_is_the_dpo_model_where_it_should_be(close):
    # Identity 3: beta = beta0; and models that agree, weighed beta0 / epsilon.
    student, dpo, other = logits(14, 3)
    kl = np.float64(reverse_kl(student, dpo))
    same_beta = jax.jit(functools.partial(losses.aligndistil_theorem1, beta=0.1, beta0=0.1))
    close(same_beta(student, dpo, other), 0.1 * kl)
    teacher = adaptive_teacher(dpo, dpo)
    np.testing.assert_array_equal(teacher.logits[:, :-2], dpo[:, :-2])
    close(teacher.alpha, np.full(16, 1e-3), atol=0)
    close(losses.adaptive_weight(teacher.alpha, beta=0.1), np.full(16, 100.0))
    close(aligndistil(student, dpo, dpo, beta0=0.1), 100 * kl, atol=1e-5)
    nearly = adaptive_teacher(dpo[2:], other[2:], scale=1e-12, epsilon=1e-12)
    close(reverse_kl(student[2:], nearly.logits), kl[2:])


def test_alpha_keeps_its_precision_where_the_models_nearly_agree(close):
    dpo, other = (array[2:, :-2] for array in logits(16, 2))
    for distance in (1e-2, 1e-4, 1e-6):
        reverse = np.float32(dpo + distance * other)
        expected = oracle.per_position(functools.partial(oracle.alpha, scale=20.0, epsilon=1e-3), dpo, reverse)
        close(adaptive_teacher(dpo, reverse).alpha, expected, rtol=2e-6, atol=0)


def test_alpha_grows_with_the_disagreement_and_the_weights_follow(close):
    apart = jnp.array([[0.0, -1e4], [0.0, 0.0], [jnp.log(3.0), 0.0]])
    alpha = adaptive_teacher(apart, apart[:, ::-1]).alpha
    close(alpha, [20.001, 0.001, 10.001], atol=1e-5)
    close(losses.adaptive_weight(alpha, beta=0.1), [0.1 / 20.001, 100.0, 0.1 / 10.001])
    close(losses.constant_weight(alpha, beta=0.1), [0.1, 0.1, 0.1])
    close(losses.capped_weight(alpha, beta=0.1), [0.1 / 20.001, 1.0, 0.1 / 10.001])
    for teacher in (theorem1_teacher, contrastive_teacher):
        close(teacher(apart, apart, ratio=2.0).alpha, [2.0, 2.0, 2.0])


def test_hyper_parameters_may_be_traced(close):
    student, dpo, reverse = logits(15, 3)
    by_value = losses.aligndistil_capped(student, dpo, reverse, beta0=0.2, scale=5.0, epsilon=0.01, cap=0.05)
    traced = jax.jit(losses.aligndistil_capped)(student, dpo, reverse, beta0=0.2, scale=5.0, epsilon=0.01, cap=0.05)
    close(traced, np.float64(by_value))
    traced = jax.jit(losses.aligndistil_constant)(student, dpo, reverse, beta0=0.2)
    close(traced, np.float64(losses.aligndistil_constant(student, dpo, reverse, beta0=0.2)))
    traced = jax.jit(losses.theorem1_teacher)(dpo, reverse, ratio=2.0)
    close(traced.alpha, np.full(16, 2.0))


def test_wrong_arguments_are_answered_with_their_name():
    three, four = jnp.zeros((2, 3)), jnp.zeros((2, 4))
    with pytest.raises(ValueError, match=r"reverse_kl: .*student_logits \[2, 3\], teacher_logits \[2, 4\]"):
        losses.reverse_kl(three, four)
    with pytest.raises(ValueError, match=r"aligndistil: .*reverse_logits \[2, 4\]"):
        losses.aligndistil(three, three, four)
    with pytest.raises(ValueError, match=r"adaptive_teacher: .*reverse_logits \[2, 4\]"):
        losses.adaptive_teacher(three, four)
    for beta in (0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"generalised_jsd: beta is .*forward_kl.*reverse_kl"):
            losses.generalised_jsd(three, three, beta=beta)
    with pytest.raises(ValueError, match="aligndistil: beta0 is 0"):
        losses.aligndistil(three, three, three, beta0=0.0)
    with pytest.raises(ValueError, match="adaptive_teacher: epsilon is 0"):
        losses.aligndistil(three, three, three, epsilon=0.0)
    with pytest.raises(ValueError, match="aligndistil_capped: cap is nan"):
        losses.aligndistil_capped(three, three, three, cap=float("nan"))
