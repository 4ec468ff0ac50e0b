"""Distillation of a ranking or of raw scores: the teacher's order of the classes, its margins, its logits.

The losses on logits map `[..., V]` to one value per position `[...]`, as those of `losses.distill`, and treat padded
vocabulary entries as they do: at or below -1e9, -inf included, in both models, they cost nothing and receive no
gradient. Teachers receive no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from palign.losses.checks import (
    as_float,
    check_lists,
    check_pairs,
    check_positive,
    check_same_shape,
    check_shape,
    check_type,
)
from palign.losses.distill import floored


def pld(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    labels: Int[Array, "*batch"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top: int | None = None,
) -> Float[Array, "*batch"]:
    """Plackett-Luce distillation: the label first, then the teacher's order, each place weighed by its confidence.

    `L = sum_k alpha_k [ log sum_{j >= k} exp(s_pi(j)) - s_pi(k) ]`, where pi is the label followed by the other classes
    from the teacher's highest logit to its lowest, s the student's logits and
    `alpha_k = softmax(teacher_logits / temperature)_pi(k)`.

    Args:
        student_logits: `[..., V]`, any real numbers; adding a constant to a position changes nothing.
        teacher_logits: `[..., V]`, likewise. Equal ones keep the order of their index. Receives no gradient.
        labels: `[...]` int, the true classes, from 0 to V - 1. Another number (-100 at positions that do not count)
            puts no class first; the value is finite there, for the caller to mask.
        temperature: of the teacher in the weights, above 0. 1 is the paper's best; large treats all places alike.
        top: with a number m, the first m places only. Each is exact, as the rest of the vocabulary stays in its sum;
            what is dropped has the weight of the teacher's tail. None takes the whole vocabulary, and sorts it.

    Returns:
        `[...]` in nats per position, at least 0. Convex in the student's logits, with the gradient
        `sum_k alpha_k (sigma_k - e_pi(k))`, sigma_k the softmax over the classes from place k on.

    Raises:
        ValueError: the logits differ in shape, `labels` is not their shape without the last axis or not of integers,
            `temperature` is a plain number that is not finite and above 0, or `top` is below 1.

    References:
        Bassam, Zhu and Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", arXiv 2506.12542.

    Notes:
        Takes the place of cross entropy and distillation together, with no weight to tune between them. All weight on
        the label gives cross entropy, equal weights ListMLE over V. A teacher that disagrees with the label gives it
        little weight: a higher temperature helps. TRL, tunix and EasyDeL do not have it.

    Examples:
        The teacher has 3/4 and 1/4, the student 1/2 and 1/2. With the teacher's favourite for the label the first
        place costs 3/4 log 2 = 0.5199, and the last is no choice any more. With the other label, 1/4 log 2 = 0.1733.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> student, teacher = jnp.zeros((2, 2)), jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0]]))
        >>> print(np.asarray(losses.pld(student, teacher, jnp.array([0, 1]))).round(4))
        [0.5199 0.1733]
    """
    check_same_shape("pld", student_logits=student_logits, teacher_logits=teacher_logits)
    _check_labels("pld", labels, student_logits)
    check_positive("pld", temperature=temperature)
    if top is not None and top < 1:
        raise ValueError(f"pld: top is {top}; expected None (the whole vocabulary) or at least 1")
    student, teacher = floored(student_logits), jax.lax.stop_gradient(floored(teacher_logits))
    size = student.shape[-1]
    # The last place is no choice and costs nothing, so the whole ranking is its first V - 1 places.
    places = size - 1 if top is None else min(top, size - 1)
    classes = jax.lax.broadcasted_iota(jnp.int32, student.shape, student.ndim - 1)
    is_label = classes == jnp.asarray(labels).astype(jnp.int32)[..., None]
    order = jax.lax.top_k(jnp.where(is_label, jnp.inf, teacher), places)[1]
    alpha = jnp.take_along_axis(jax.nn.softmax(teacher / temperature), order, axis=-1)
    ranked = jnp.take_along_axis(student, order, axis=-1)
    below = _log_sum_below(student, ranked, order)
    # log(exp(s_k) + below) - s_k as a softplus: exact where place k wins by far.
    return (alpha * jax.nn.softplus(below - ranked)).sum(-1)


def margin_mse(scores: Float[Array, "B 2"], teacher_scores: Float[Array, "B 2"]) -> Float[Array, " B"]:
    """Margin-MSE: the student's margin of a pair is drawn to the teacher's.

    `L = ((s_w - s_l) - (t_w - t_l))^2`

    Args:
        scores: `[B, 2]`, the student's raw scores of the two responses, any scale that the teacher's has. Rewards of a
            reward model, or `beta (policy_logps - ref_logps)` to regress an implicit reward.
        teacher_scores: `[B, 2]`, the teacher's. Receives no gradient.

    Returns:
        `[B]` in units of score squared, at least 0.

    Raises:
        ValueError: a shape is not `[B, 2]`.

    References:
        Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation",
        arXiv 2010.02666.

    Notes:
        Only margins count: each side may add its own constant to both scores. Columns may be swapped, together, in both
        arrays. With implicit rewards for scores and a reward model for the teacher it is the regression of REBEL.
        `pairwise_mse` is the form for lists. TRL, tunix and EasyDeL do not have it.

    Examples:
        A margin of 3 where the teacher has 1: (3 - 1)^2 = 4.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.margin_mse(jnp.array([[5.0, 2.0]]), jnp.array([[0.0, -1.0]]))))
        [4.]
    """
    check_pairs("margin_mse", scores=scores, teacher_scores=teacher_scores)
    errors = as_float(scores) - jax.lax.stop_gradient(as_float(teacher_scores))
    return jnp.square(errors[:, 0] - errors[:, 1])


def pairwise_mse(
    scores: Float[Array, "B K"], teacher_scores: Float[Array, "B K"], valid: Bool[Array, "B K"]
) -> Float[Array, " B"]:
    """Margin-MSE over all pairs of a list: every margin of the student is drawn to the teacher's.

    `L = mean_{i < j} ((s_i - s_j) - (t_i - t_j))^2` over the pairs of valid responses.

    Args:
        scores: `[B, K]`, the student's raw scores, any scale that the teacher's has.
        teacher_scores: `[B, K]`, the teacher's. Receives no gradient.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.

    Returns:
        `[B]` in units of score squared, at least 0; 0, with zero gradient, for a list with fewer than two valid
        responses. Equal scores of the teacher state a margin of 0, and count.

    Raises:
        ValueError: shapes are not the same `[B, K]`, or `valid` is not boolean.

    References:
        Hofstätter et al., arXiv 2010.02666, for pairs.

    Notes:
        K = 2 is `margin_mse`. Twice the variance of s - t over the list (with K - 1 for its divisor), so each side may
        add its own constant. RAX's `pairwise_mse_loss` takes its mean over all ordered pairs, each response with itself
        included: (K - 1) / K of this one for a list by itself.

    Examples:
        The student has the margins (1, 1, 2) where the teacher has none: (1 + 1 + 4) / 3 = 2.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> scores, valid = jnp.array([[2.0, 1.0, 0.0]]), jnp.ones((1, 3), bool)
        >>> print(np.asarray(losses.pairwise_mse(scores, jnp.zeros((1, 3)), valid)))
        [2.]
    """
    check_lists("pairwise_mse", valid, scores=scores, teacher_scores=teacher_scores)
    student, teacher = (jnp.where(valid, as_float(array), 0.0) for array in (scores, teacher_scores))
    errors = student - jax.lax.stop_gradient(teacher)
    index = jnp.arange(valid.shape[1])
    pairs = valid[:, :, None] & valid[:, None, :] & (index[:, None] < index[None, :])[None]
    squares = jnp.where(pairs, jnp.square(errors[:, :, None] - errors[:, None, :]), 0.0)
    return squares.sum((-2, -1)) / jnp.maximum(pairs.sum((-2, -1)), 1).astype(errors.dtype)


def binary_kl_norm(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    *,
    temperature: float | Float[Array, ""] = 2.0,
) -> Float[Array, "*batch"]:
    """BinaryKL-Norm of dual-head distillation: the raw logits are drawn together, each by itself.

    `L = T^2 sum_v KL(1/2 || sigmoid((s_v - t_v) / T)) = T^2 sum_v log cosh((s_v - t_v) / (2 T))`, T the temperature.

    Args:
        student_logits: `[..., V]`, raw logits of the student's auxiliary head. A constant added to them counts.
        teacher_logits: `[..., V]`, raw logits of the teacher. Receives no gradient.
        temperature: in units of the logits, above 0; differences well below it are squared, / 8, those well above it
            cost T / 2 for each unit. The authors have 2.

    Returns:
        `[...]` per position, at least 0; the gradient is `(T / 2) tanh((s - t) / (2 T))`.

    Raises:
        ValueError: the shapes differ, or `temperature` is a plain number that is not finite and above 0.

    References:
        Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
        arXiv 2411.08937.

    Notes:
        Meant for a second head, with cross entropy on the first; the authors' weight for it is 1 on CIFAR-100 and 0.1
        on ImageNet, and their mean is over the batch. On one head the two losses work against each other. TRL, tunix
        and EasyDeL do not have it.

    Examples:
        One logit is 2 log 2 too high, T = 1: cosh(log 2) = (2 + 1/2) / 2 = 5/4, and log 5/4 = 0.2231.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> student, teacher = 2 * jnp.log(jnp.array([2.0, 1.0])), jnp.zeros(2)
        >>> print(np.asarray(losses.binary_kl_norm(student, teacher, temperature=1.0)).round(4))
        0.2231
    """
    check_same_shape("binary_kl_norm", student_logits=student_logits, teacher_logits=teacher_logits)
    check_positive("binary_kl_norm", temperature=temperature)
    gaps = floored(student_logits) - jax.lax.stop_gradient(floored(teacher_logits))
    return temperature**2 * _log_cosh(gaps / (2 * temperature)).sum(-1)


def _check_labels(loss: str, labels: Int[Array, "*batch"], logits: Float[Array, "*batch V"]) -> None:
    expected = jnp.shape(logits)[:-1]
    check_shape(loss, f"{list(expected)}, one class for each position of the logits", expected, labels=labels)
    check_type(loss, "integers, the true classes", int, labels=labels)


def _log_sum_below(
    student: Float[Array, "*batch V"], ranked: Float[Array, "*batch M"], order: Int[Array, "*batch M"]
) -> Float[Array, "*batch M"]:
    """Return, for each place of a ranking, the log-sum-exp of the student over all classes that come after it.

    The classes without a place are summed by masking: as a difference of two sums they would be lost to rounding.
    """
    mark = jnp.vectorize(lambda row: jnp.zeros(student.shape[-1], bool).at[row].set(True), signature="(m)->(v)")
    placed = mark(order)
    tail = jax.nn.logsumexp(jnp.where(placed, -jnp.inf, student), axis=-1, keepdims=True)
    after = jnp.concatenate([ranked[..., 1:], tail], axis=-1)
    return jax.lax.cumlogsumexp(after, axis=after.ndim - 1, reverse=True)


def _log_cosh(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return `log(cosh(values))` with its relative precision kept near 0, and without overflow far from it.

    Two forms are needed, and each gets an argument that is harmless where the other one is taken.
    """
    size = jnp.abs(values)
    near = size < 1
    small = jnp.log1p(2 * jnp.square(jnp.sinh(jnp.where(near, values, 0.0) / 2)))
    far = jnp.where(near, 1.0, size)
    return jnp.where(near, small, far + jnp.log1p(jnp.exp(-2 * far)) - jnp.log(jnp.asarray(2.0, far.dtype)))
