"""PLD against cross entropy, ListMLE, its gradient and its truncation; margin-MSE's two forms; BinaryKL-Norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from palign import losses
from tests.oracles import distill_losses
from tests.oracles import ranking_distill_losses as oracle

pld = jax.jit(losses.pld, static_argnames=("temperature", "top"))
margin_mse, pairwise_mse = jax.jit(losses.margin_mse), jax.jit(losses.pairwise_mse)
binary_kl_norm = jax.jit(losses.binary_kl_norm, static_argnames="temperature")
POSITIONS, VOCAB = 8, 6


def logits(seed, dtype=np.float64):
    """Student, teacher and labels of eight positions over six classes."""
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(0, 2, (POSITIONS, VOCAB)).astype(dtype) for _ in range(2))
    return student, teacher, rng.integers(0, VOCAB, POSITIONS)


def ranking_of(teacher, label):
    others = [v for v in np.argsort(-teacher) if v != label]
    return [label, *others]


def test_a_teacher_that_is_sure_of_the_label_gives_cross_entropy():
    with jax.enable_x64(True):
        student, teacher, labels = logits(0)
        np.put_along_axis(teacher, labels[:, None], 60.0, axis=-1)
        cross_entropy = -np.take_along_axis(np.asarray(jax.nn.log_softmax(student)), labels[:, None], axis=-1)[:, 0]
        for top in (None, 1, 3):
            np.testing.assert_allclose(pld(student, teacher, labels, top=top), cross_entropy, rtol=1e-12)


def test_a_teacher_that_is_sure_of_nothing_gives_listmle_over_the_number_of_classes():
    with jax.enable_x64(True):
        student, teacher, labels = logits(1)
        rank = np.array([np.argsort(ranking_of(*row)) for row in zip(teacher, labels, strict=True)])
        lists = student, np.zeros_like(student), -rank.astype(np.float64), np.ones(student.shape, bool)
        listmle = np.asarray(losses.plackett_luce(*lists, beta=1.0))
        np.testing.assert_allclose(pld(student, teacher, labels, temperature=1e9), listmle / VOCAB, rtol=1e-7)


def test_the_gradient_is_the_weighted_sum_of_softmaxes_over_what_is_left_less_the_choice():
    with jax.enable_x64(True):
        student, teacher, labels = logits(2)
        gradient = jax.grad(lambda s: pld(s, teacher, labels, temperature=1.5).sum())(student)
        expected = np.zeros_like(student)
        for n, (t, label) in enumerate(zip(teacher, labels, strict=True)):
            alpha, ranking = distill_losses.softmax((t / 1.5).tolist()), ranking_of(t, label)
            for k, chosen in enumerate(ranking):
                expected[n, ranking[k:]] += alpha[chosen] * np.array(distill_losses.softmax(student[n, ranking[k:]]))
                expected[n, chosen] -= alpha[chosen]
        np.testing.assert_allclose(gradient, expected, atol=1e-14)
        np.testing.assert_allclose(np.sum(gradient, axis=-1), 0, atol=1e-14)


def test_pld_is_convex_in_the_student_s_logits():
    with jax.enable_x64(True):
        student, teacher, labels = logits(3)
        hessian = jax.jit(jax.vmap(jax.hessian(losses.pld)))(student, teacher, labels)
        eigenvalues = np.linalg.eigvalsh(hessian)
        assert eigenvalues.min() > -1e-14
        # One direction is flat, that of a constant; the others curve.
        assert eigenvalues[:, 1].min() > 1e-6


def test_a_constant_added_to_a_position_of_either_model_changes_nothing():
    with jax.enable_x64(True):
        student, teacher, labels = logits(4)
        shift = np.arange(POSITIONS)[:, None] * 3.0
        expected = pld(student, teacher, labels)
        np.testing.assert_allclose(pld(student + shift, teacher - shift, labels), expected, rtol=1e-12)


def test_the_places_that_are_kept_are_exact_and_the_last_one_costs_nothing():
    with jax.enable_x64(True):
        student, teacher, labels = logits(5)
        whole = pld(student, teacher, labels)
        np.testing.assert_array_equal(pld(student, teacher, labels, top=VOCAB), whole)
        np.testing.assert_array_equal(pld(student, teacher, labels, top=VOCAB - 1), whole)
        np.testing.assert_array_equal(pld(student, teacher, labels, top=99), whole)
        previous = np.zeros(POSITIONS)
        for top in range(1, VOCAB):
            loss = np.asarray(pld(student, teacher, labels, top=top))
            np.testing.assert_allclose(loss, oracle.pld(student, teacher, labels, top=top), rtol=1e-12)
            assert (loss > previous).all()
            previous = loss


def test_the_tail_keeps_its_precision_next_to_a_favourite(close):
    # The tail's part of the sum is e^-30 of the whole: as a difference of two sums it would be lost.
    student, teacher = np.float32([[30.0, 0.0, -1.0, -2.0]]), np.float32([[5.0, 1.0, 0.5, 0.0]])
    labels = np.array([0])
    gradient = jax.grad(lambda s: losses.pld(s, teacher, labels, top=2).sum())(student)
    assert np.float64(gradient[0, 2]) > 0
    close(pld(student, teacher, labels, top=2), oracle.pld(np.float64(student), np.float64(teacher), labels, top=2))
    # The second place is decided among what the tail holds.
    alpha = distill_losses.softmax(teacher[0].tolist())[1]
    below = np.exp([0.0, -1.0, -2.0])
    np.testing.assert_allclose(gradient[0, 2:], alpha * (below / below.sum())[1:], rtol=1e-5)


def test_equal_teacher_logits_keep_the_order_of_the_classes():
    with jax.enable_x64(True):
        student, _, labels = logits(6)
        level = np.zeros_like(student)
        expected = oracle.pld(student, level, labels)
        np.testing.assert_allclose(pld(student, level, labels), expected, rtol=1e-12)
        assert not np.allclose(expected, oracle.pld(student[:, ::-1], level, VOCAB - 1 - labels))


def test_pld_takes_any_leading_axes_one_class_and_labels_that_are_no_class():
    student, teacher, labels = logits(7, np.float32)
    expected = pld(student, teacher, labels)
    folded = pld(student.reshape(2, 4, VOCAB), teacher.reshape(2, 4, VOCAB), labels.reshape(2, 4))
    np.testing.assert_array_equal(folded, np.reshape(expected, (2, 4)))
    np.testing.assert_array_equal(pld(student[0], teacher[0], labels[0]), expected[0])
    np.testing.assert_array_equal(pld(student, teacher, labels.astype(np.uint8)), expected)
    np.testing.assert_array_equal(pld(student[:, :1], teacher[:, :1], np.zeros(POSITIONS, int)), np.zeros(POSITIONS))
    # The teacher's own favourite is first then.
    unlabelled = pld(student, teacher, np.full(POSITIONS, -100))
    np.testing.assert_array_equal(unlabelled, pld(student, teacher, teacher.argmax(-1)))


@pytest.mark.parametrize("name", ["pld", "pld_top_2", "binary_kl_norm"])
def test_padding_of_the_vocabulary_is_as_good_as_absent(name, close):
    student, teacher, labels = logits(8, np.float32)
    loss = {
        "pld": lambda s, t: pld(s, t, labels),
        "pld_top_2": lambda s, t: pld(s, t, labels, top=2),
        "binary_kl_norm": binary_kl_norm,
    }[name]

    def padded(array, filler):
        return np.insert(array, [2, VOCAB], np.float32(filler), axis=1)

    labels_before = labels.copy()
    expected, gradient = loss(student, teacher), jax.grad(lambda s: loss(s, teacher).sum())(student)
    labels = labels + (labels >= 2)
    assert (labels != labels_before).any()
    for filler, other in ((-np.inf, -np.inf), (-1e9, -np.inf), (-1e30, -1e9)):
        wide = padded(student, filler), padded(teacher, other)
        close(loss(*wide), np.float64(expected))
        wide_gradient = np.asarray(jax.grad(lambda s, t=wide[1]: loss(s, t).sum())(wide[0]))
        close(np.delete(wide_gradient, [2, VOCAB + 1], axis=1), np.float64(gradient))
        assert not wide_gradient[:, [2, VOCAB + 1]].any()


def test_a_nan_is_not_hidden():
    student, teacher, labels = logits(9, np.float32)
    student[0, 0] = np.nan
    for loss in (pld(student, teacher, labels), pld(student, teacher, labels, top=1), binary_kl_norm(student, teacher)):
        np.testing.assert_array_equal(np.isnan(loss), [True] + [False] * (POSITIONS - 1))


def test_two_derivatives_agree_with_finite_differences():
    with jax.enable_x64(True):
        student, teacher, labels = logits(10)
        # Differences on both sides of where the two forms of log cosh meet.
        assert {True, False} == set((np.abs(student - teacher)[:3] / 4 < 1).ravel())
        for loss in (lambda s: pld(s, teacher[:3], labels[:3], top=3), lambda s: binary_kl_norm(s, teacher[:3])):
            check_grads(loss, (student[:3],), order=2, modes=("fwd", "rev"))


def test_the_margin_mse_is_the_list_form_of_two(close):
    rng = np.random.default_rng(11)
    scores, teacher = (np.float32(rng.normal(0, 2, (6, 2))) for _ in range(2))
    close(pairwise_mse(scores, teacher, np.ones((6, 2), bool)), np.float64(margin_mse(scores, teacher)))
    # Three slots of which one is padding are two.
    wide = [np.insert(array, 1, np.float32(np.nan), axis=1) for array in (scores, teacher)]
    valid = np.tile([True, False, True], (6, 1))
    close(pairwise_mse(*wide, valid), np.float64(margin_mse(scores, teacher)))
    gradient = jax.grad(lambda s: pairwise_mse(s, wide[1], valid).sum())(wide[0])
    close(gradient[:, [0, 2]], np.float64(jax.grad(lambda s: margin_mse(s, teacher).sum())(scores)))
    assert not np.asarray(gradient)[:, 1].any()


def test_the_margin_losses_know_margins_only(close):
    rng = np.random.default_rng(12)
    scores, teacher = (np.float32(rng.normal(0, 2, (6, 4))) for _ in range(2))
    valid = rng.random((6, 4)) < 0.8
    expected = np.float64(pairwise_mse(scores, teacher, valid))
    close(pairwise_mse(scores + 4, teacher - 2, valid), expected, rtol=1e-5)
    order = rng.permutation(4)
    close(pairwise_mse(scores[:, order], teacher[:, order], valid[:, order]), expected)
    gaps = np.where(valid, np.float64(scores) - teacher, np.nan)
    close(pairwise_mse(scores, teacher, valid), 2 * np.nanvar(gaps, axis=-1, ddof=1))
    close(margin_mse(scores[:, 1::-1], teacher[:, 1::-1]), np.float64(margin_mse(scores[:, :2], teacher[:, :2])))


def test_lists_of_fewer_than_two_responses_have_no_margin(value_and_gradient):
    scores, valid = np.float32([[np.nan, 3.0], [np.inf, np.nan]]), np.array([[False, True], [False, False]])
    value, gradient = value_and_gradient(pairwise_mse, scores, scores, valid)
    assert not value.any() and not gradient.any()


def test_binary_kl_norm_has_its_closed_form_gradient_and_is_no_softmax_loss(value_and_gradient, close):
    student, teacher, _ = logits(13, np.float32)
    value, gradient = value_and_gradient(binary_kl_norm, student, teacher)
    close(gradient, np.tanh((np.float64(student) - teacher) / 4))  # T / 2 = 1 at the default of 2
    assert (np.abs(np.asarray(binary_kl_norm(student + 4, teacher)) - value) > 0.1).all()
    level = np.float32(teacher + 1)
    close(binary_kl_norm(level, teacher, temperature=2.0), np.full(POSITIONS, 4 * VOCAB * np.log(np.cosh(0.25))))


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.3, 3.9, 4.0, 4.1, 40.0, 2e4])
def test_log_cosh_keeps_its_precision_from_the_smallest_to_the_largest_differences(gap):
    student, teacher = np.float32([[gap, -gap]]), np.zeros((1, 2), np.float32)
    x = np.float64(student[0, 0]) / 4
    # log cosh x = x^2 / 2 - x^4 / 12 + ..., where the cosine itself is 1 to the last digit.
    expected = x**2 / 2 - x**4 / 12 if x < 1e-2 else x + np.log1p(np.exp(-2 * x)) - np.log(2)
    np.testing.assert_allclose(binary_kl_norm(student, teacher), [2 * 4 * expected], rtol=1e-6)


def test_wrong_arguments_are_answered_with_their_name():
    three, four = jnp.zeros((2, 3)), jnp.zeros((2, 4))
    labels = jnp.zeros(2, int)
    with pytest.raises(ValueError, match=r"pld: .*student_logits \[2, 3\], teacher_logits \[2, 4\]"):
        losses.pld(three, four, labels)
    with pytest.raises(ValueError, match=r"pld: labels has shape \[2, 1\]; expected \[2\]"):
        losses.pld(three, three, labels[:, None])
    with pytest.raises(ValueError, match="pld: labels has dtype float32; expected integers"):
        losses.pld(three, three, jnp.zeros(2))
    with pytest.raises(ValueError, match="pld: top is 0"):
        losses.pld(three, three, labels, top=0)
    with pytest.raises(ValueError, match="pld: temperature is 0"):
        losses.pld(three, three, labels, temperature=0.0)
    with pytest.raises(ValueError, match=r"margin_mse: scores has shape \[2, 3\]; expected \[B, 2\]"):
        losses.margin_mse(three, three)
    with pytest.raises(ValueError, match="pairwise_mse: valid has dtype float32; expected bool"):
        losses.pairwise_mse(three, three, three)
    with pytest.raises(ValueError, match="binary_kl_norm: temperature is nan"):
        losses.binary_kl_norm(three, three, temperature=float("nan"))
