"""What AlignDistil distils, state by state and over whole responses, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from palign import losses
from palign.eval import optima as optima_module
from palign.eval.enumerate import all_responses, along_responses
from palign.eval.optima import regularised_value
from tests.eval.test_enumerate import back_up, conditional_logits, draw, response_logps

soft_values, soft_value_teacher = jax.jit(optima_module.soft_values), jax.jit(optima_module.soft_value_teacher)

BETA, BETA0 = 0.5, 1.0


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def distilled():
    """A space of 7 states; tables of log-probabilities: student, DPO, reverse DPO, reference."""
    space = all_responses(3, 3)
    student, reference = log_softmax(draw(9, 2, 7, 3), axis=-1)
    ref, rewards = np.asarray(response_logps(space, jnp.asarray(reference))), draw(10, 15)
    dpo, reverse = (
        np.asarray(conditional_logits(space, jnp.asarray(log_softmax(ref + sign * rewards / BETA0))))
        for sign in (1, -1)
    )
    return space, student, dpo, reverse, reference


def numpy_kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("name", ["aligndistil_theorem1", "aligndistil_contrastive"])
def test_at_each_state_distillation_is_rlhf_with_the_models_reward_and_a_constant(name):
    _, student, dpo, reverse, reference = distilled()
    anchor, other = (reference, reference) if name == "aligndistil_theorem1" else (dpo, reverse)
    reward = BETA0 * (dpo - other)
    constant = BETA * logsumexp(anchor + reward / BETA, axis=-1)
    expected = BETA * numpy_kl(student, anchor) - (np.exp(student) * reward).sum(-1) + constant
    loss = functools.partial(getattr(losses, name), beta=BETA, beta0=BETA0)
    values, pull_back = jax.vjp(lambda z: loss(z, jnp.asarray(dpo), jnp.asarray(other)), jnp.asarray(student))
    np.testing.assert_allclose(values, expected, atol=1e-14)
    p = np.exp(student)
    gains = BETA * (student - anchor) - reward  # the slope of RLHF by p, up to a constant
    np.testing.assert_allclose(pull_back(jnp.ones(7))[0], p * (gains - (p * gains).sum(-1, keepdims=True)), atol=1e-14)


def test_the_teachers_are_on_one_line_and_end_at_the_dpo_model():
    student, dpo, reverse, reference = map(jnp.asarray, distilled()[1:])
    theorem1, contrastive = losses.theorem1_teacher, losses.contrastive_teacher
    exact = functools.partial(np.testing.assert_allclose, atol=1e-14)
    exact(contrastive(dpo, reference, ratio=1.7).logits, theorem1(dpo, reference, ratio=2.7).logits)
    mirrored = 2 * reference - dpo
    exact(contrastive(dpo, mirrored, ratio=1.7).logits, theorem1(dpo, reference, ratio=4.4).logits)
    exact(theorem1(dpo, reference, ratio=1.0).logits, dpo)
    on_dpo = losses.aligndistil_theorem1(student, dpo, reference, beta=0.3, beta0=0.3)
    exact(on_dpo, 0.3 * numpy_kl(student, dpo))
    agreed = losses.adaptive_teacher(dpo, dpo + 3.0, scale=20.0, epsilon=1e-3)
    exact(agreed.alpha, 1e-3)
    exact(jax.nn.log_softmax(agreed.logits), dpo)
    exact(losses.aligndistil(student, dpo, dpo, beta0=0.1), 0.1 / 1e-3 * numpy_kl(student, dpo), rtol=1e-12)
    nearly = losses.adaptive_teacher(dpo, reverse, scale=1e-9, epsilon=1e-9).logits
    np.testing.assert_allclose(nearly, dpo, atol=1e-7)


def test_constants_of_a_state_change_nothing_and_the_gradient_has_its_closed_form():
    _, student, dpo, reverse, _ = distilled()
    shifts = 5 * draw(11, 3, 7, 1)
    loss = jax.jit(jax.value_and_grad(lambda *z: losses.aligndistil(*z, scale=3.0).sum()))
    value, gradient = loss(student, dpo, reverse)
    shifted, same = loss(*(z + shift for z, shift in zip((student, dpo, reverse), shifts, strict=True)))
    assert float(shifted) == pytest.approx(float(value), rel=1e-12)
    np.testing.assert_allclose(same, gradient, atol=1e-13)
    alpha = 3.0 * 0.5 * np.abs(np.exp(dpo) - np.exp(reverse)).sum(-1, keepdims=True) + 1e-3
    teacher = log_softmax(dpo + alpha * (dpo - reverse), axis=-1)
    kl = numpy_kl(student, teacher)[:, None]
    np.testing.assert_allclose(gradient, 0.1 / alpha * np.exp(student) * (student - teacher - kl), atol=1e-13)
    np.testing.assert_allclose(np.asarray(gradient).sum(-1), 0.0, atol=1e-14)


def sequence_optimum(space, *weighted):
    """`prod_i pi_i^(w_i) / Z` over whole responses."""
    return log_softmax(sum(w * np.asarray(response_logps(space, jnp.asarray(table))) for w, table in weighted))


# Teacher, from log-probabilities; and the distribution over whole responses that it stands for.
TEACHERS = {
    "theorem1": (
        lambda dpo, reverse, reference: losses.theorem1_teacher(dpo, reference, ratio=BETA0 / BETA).logits,
        lambda dpo, reverse, reference: ((BETA0 / BETA, dpo), (1 - BETA0 / BETA, reference)),
    ),
    "contrastive": (
        lambda dpo, reverse, reference: losses.contrastive_teacher(dpo, reverse, ratio=0.5).logits,
        lambda dpo, reverse, reference: ((1.5, dpo), (-0.5, reverse)),
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_composed_state_by_state_is_not_the_optimum_until_soft_values_are_put_back(name):
    space, _, *tables = distilled()
    compose, weights = TEACHERS[name]
    teacher = compose(*map(jnp.asarray, tables))
    best = sequence_optimum(space, *weights(*tables))
    corrected = soft_value_teacher(space, teacher, beta=BETA)
    np.testing.assert_allclose(response_logps(space, corrected), best, atol=1e-13)
    # Both were made to tilt the reference by r / beta: the optimum of RLHF itself.
    ref = np.asarray(response_logps(space, jnp.asarray(tables[2])))
    np.testing.assert_allclose(best, log_softmax(ref + draw(10, 15) / BETA), atol=1e-13)
    composed = np.asarray(response_logps(space, teacher))
    lost = (np.exp(best) - np.exp(composed)) @ draw(10, 15)
    assert numpy_kl(composed, best) > 1e-3 and lost > 1e-3


def test_theorem_1_is_exact_over_responses_where_beta_is_that_of_dpo_and_the_further_off_the_further_from_it():
    space, _, dpo, _, reference = distilled()
    gaps = []
    for ratio in (1.0, 1.25, 2.0, 4.0):
        teacher = losses.theorem1_teacher(jnp.asarray(dpo), jnp.asarray(reference), ratio=ratio).logits
        best = sequence_optimum(space, (ratio, dpo), (1 - ratio, reference))
        gaps.append(numpy_kl(np.asarray(response_logps(space, teacher)), best))
    assert abs(gaps[0]) < 1e-14 and np.all(np.diff(gaps) > 1e-4)


def test_the_gradients_of_theorem_1_and_of_rlhf_agree_at_last_states_and_differ_at_the_first():
    space, *tables = distilled()
    student, dpo, _, reference = map(jnp.asarray, tables)
    reward = BETA0 * (response_logps(space, dpo) - response_logps(space, reference))
    ref = response_logps(space, reference)

    def over_responses(z, per_state):
        return jnp.exp(response_logps(space, z)) @ along_responses(space, per_state)

    def value(z):
        return -regularised_value(response_logps(space, z), ref, reward, beta=BETA)

    def theorem1(z):
        return over_responses(z, losses.aligndistil_theorem1(z, dpo, reference, beta=BETA, beta0=BETA0))

    def corrected(z):
        teacher = losses.theorem1_teacher(dpo, reference, ratio=BETA0 / BETA).logits
        return over_responses(z, BETA * losses.reverse_kl(z, soft_value_teacher(space, teacher, beta=BETA)))

    right, paper, closed = (np.asarray(jax.jit(jax.grad(f))(student)) for f in (value, theorem1, corrected))
    np.testing.assert_allclose(closed, right, atol=1e-14)
    last = slice(*space.levels[-1])
    np.testing.assert_allclose(paper[last], right[last], atol=1e-14)
    assert np.abs(paper[0] - right[0]).max() > 1e-2 and np.abs(right[0]).max() > 1e-2


def test_soft_values_are_sums_over_all_continuations():
    space, *_ = distilled()
    scores = 2 * draw(12, 7, 3)
    found, nodes = np.asarray(soft_values(space, jnp.asarray(scores), beta=0.3)), {}
    for s, prefix in enumerate(space.prefixes):
        below = [r for r in space.responses if r[: len(prefix)] == prefix and len(r) > len(prefix)]
        paths = [sum(scores[space.prefixes.index(r[:t]), r[t]] for t in range(len(prefix), len(r))) for r in below]
        nodes[prefix] = 0.3 * logsumexp(paths)
        assert found[s] == pytest.approx(nodes[prefix], rel=1e-13)
    ends = draw(13, 15)
    values = np.asarray(back_up(space, jnp.zeros((7, 3)), jnp.asarray(ends)))
    np.testing.assert_array_equal(values[7:], ends)
    assert values[0] == pytest.approx(logsumexp(ends), rel=1e-14)


def test_with_a_weight_of_its_own_at_each_state_the_adaptive_teacher_solves_its_problem_over_responses():
    space, _, dpo, reverse, _ = distilled()
    teacher = losses.adaptive_teacher(jnp.asarray(dpo), jnp.asarray(reverse), scale=3.0)
    beta = losses.adaptive_weight(teacher.alpha, beta=BETA0)

    def value(z):  # reward beta0 log pi_dpo / pi_reverse, penalty of each state beta KL(pi || pi_dpo)
        policy = jax.nn.log_softmax(z)
        gains = (jnp.exp(policy) * (BETA0 * (dpo - reverse) - beta[:, None] * (policy - dpo))).sum(-1)
        return jnp.exp(response_logps(space, z)) @ along_responses(space, gains)

    value_and_grad = jax.jit(jax.value_and_grad(value))
    best, slope = value_and_grad(soft_value_teacher(space, teacher.logits, beta=beta))
    assert np.abs(slope).max() < 1e-13
    assert float(best) == pytest.approx(float(soft_values(space, teacher.logits, beta=beta)[0]), rel=1e-13)
    composed, slope = value_and_grad(teacher.logits)
    assert composed < best and np.abs(slope).max() > 1e-3
