"""Divergences between next-token distributions, and AlignDistil's teachers, weights and losses built on them.

Everything maps logits `[..., V]` to one value in nats per position `[...]`. Teachers receive no gradient. Which
positions count, and how they are averaged, is the caller's choice (`losses.dense` for `[B, T, V]` logits).

Padded vocabulary entries may hold any value at or below -1e9, -inf included, in all models: they have probability 0,
cost nothing and receive no gradient. Where only the distribution in the second place of a KL excludes a token the
divergence is infinite; about 1e9 times the excluded mass stands in for it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_positive, check_same_shape

# Low enough that exp(_FLOOR) is 0 next to any real logit, high enough that differences and multiples stay finite: with
# -inf they would be NaN, and paddings of different depth would otherwise be extrapolated into real differences.
_FLOOR = -1e9


class Teacher(NamedTuple):
    """A target distribution for the student, extrapolated from two models, and how far."""

    logits: Float[Array, "*batch V"]
    alpha: Float[Array, "*batch"]


def forward_kl(
    student_logits: Float[Array, "*batch V"], teacher_logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    """Forward KL divergence, teacher first: the student must cover what the teacher does.

    `KL(P || Q) = sum_v P_v (log P_v - log Q_v)`, P = softmax(teacher), Q = softmax(student).

    Args:
        student_logits: `[..., V]`, any real numbers; adding a constant to a position changes nothing.
        teacher_logits: `[..., V]`, likewise. Receives no gradient.

    Returns:
        `[...]` in nats per position, at least 0 up to rounding; its gradient is Q - P.

    Raises:
        ValueError: the shapes differ.

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.

    Notes:
        Equals the cross entropy less the teacher's entropy: the same gradient. TRL's GKD takes this form at beta = 0.

    Examples:
        P = (3/4, 1/4) and Q = (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2 = 0.1308.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.forward_kl(jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0])))).round(4))
        0.1308
    """
    return _forward_kl(*_student_and_teacher("forward_kl", student_logits, teacher_logits))


def reverse_kl(
    student_logits: Float[Array, "*batch V"], teacher_logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    """Reverse KL divergence, student first: the student must stay where the teacher is.

    `KL(Q || P) = sum_v Q_v (log Q_v - log P_v)`, P = softmax(teacher), Q = softmax(student).

    Args:
        student_logits: `[..., V]`, any real numbers; adding a constant to a position changes nothing.
        teacher_logits: `[..., V]`, likewise. Receives no gradient.

    Returns:
        `[...]` in nats per position, at least 0 up to rounding; its gradient is `Q ((log Q - log P) - KL)`.

    Raises:
        ValueError: the shapes differ.

    References:
        Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543, section 2.1. The
        gradient here is that of each position's KL, without the score-function term of their sequence-level loss.

    Notes:
        TRL's GKD takes this form at beta = 1; clamping beta to just below 1 there was a silent no-op (TRL #6780).

    Examples:
        Q = (1/2, 1/2) and P = (3/4, 1/4): 1/2 log 2/3 + 1/2 log 2 = 0.1438.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.reverse_kl(jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0])))).round(4))
        0.1438
    """
    return _reverse_kl(*_student_and_teacher("reverse_kl", student_logits, teacher_logits))


def generalised_jsd(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    *,
    beta: float | Float[Array, ""] = 0.5,
) -> Float[Array, "*batch"]:
    """Generalised Jensen-Shannon divergence: both distributions against their mixture, bounded.

    `JSD_beta = beta KL(P || M) + (1 - beta) KL(Q || M)`, `M = beta P + (1 - beta) Q`, P = softmax(teacher),
    Q = softmax(student).

    Args:
        student_logits: `[..., V]`, any real numbers; adding a constant to a position changes nothing.
        teacher_logits: `[..., V]`, likewise. Receives no gradient.
        beta: the teacher's part of the mixture, strictly between 0 and 1. At both ends the divergence is 0, not a KL.

    Returns:
        `[...]` in nats per position, between 0 and the entropy of (beta, 1 - beta), log 2 at most.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number not strictly between 0 and 1.

    References:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        arXiv 2306.13649, Eq. 1.

    Notes:
        TRL jumps to a KL at beta = 0 and 1, though the divergence near them goes to 0 (at 0.9 its gradient is about a
        fifteenth of the reverse KL's): `scaled_jsd` is the continuous family. EasyDeL mixes M the other way round with
        the same weights, which is no Jensen-Shannon divergence unless beta is 1/2.

    Examples:
        P = (3/4, 1/4), Q = (1/2, 1/2), M = (5/8, 3/8):
        (3/4 log 6/5 + 1/4 log 2/3 + 1/2 log 4/5 + 1/2 log 4/3) / 2 = 0.0338.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.generalised_jsd(jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0])))).round(4))
        0.0338
    """
    _check_mixture("generalised_jsd", beta)
    return _jsd(*_student_and_teacher("generalised_jsd", student_logits, teacher_logits), beta, 1 - beta)


def scaled_jsd(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    *,
    beta: float | Float[Array, ""] = 0.5,
) -> Float[Array, "*batch"]:
    """Jensen-Shannon divergence rescaled to run from the forward to the reverse KL.

    `JSD_beta / (beta (1 - beta))`, which tends to KL(P || Q) for beta -> 0 and to KL(Q || P) for beta -> 1, with
    P = softmax(teacher), Q = softmax(student).

    Args:
        student_logits: `[..., V]`, any real numbers; adding a constant to a position changes nothing.
        teacher_logits: `[..., V]`, likewise. Receives no gradient.
        beta: strictly between 0 and 1.

    Returns:
        `[...]` in nats per position, at least 0 up to rounding; 4 JSD at beta = 1/2.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number not strictly between 0 and 1.

    References:
        Agarwal et al., arXiv 2306.13649, Eq. 1 and the limits in its section 2; the scale is ours.

    Notes:
        TRL and other libraries have the unscaled divergence only, whose gradient vanishes towards both ends.

    Examples:
        Four times the 0.03382 of `generalised_jsd`.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.scaled_jsd(jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0])))).round(4))
        0.1353
    """
    _check_mixture("scaled_jsd", beta)
    return _jsd(*_student_and_teacher("scaled_jsd", student_logits, teacher_logits), beta, 1 - beta) / (
        beta * (1 - beta)
    )


def theorem1_teacher(
    dpo_logits: Float[Array, "*batch V"],
    reference_logits: Float[Array, "*batch V"],
    *,
    ratio: float | Float[Array, ""],
) -> Teacher:
    """Teacher of AlignDistil's Theorem 1: on the line from the reference through the DPO model.

    `z* = ratio z_dpo + (1 - ratio) z_ref`

    Args:
        dpo_logits: `[..., V]`, logits of a model trained by DPO. Receives no gradient.
        reference_logits: `[..., V]`, logits of the reference that it was trained against. Receives no gradient.
        ratio: beta0 / beta, the beta of the DPO training over that of the distillation, above 0. 1 gives the DPO model,
            more extrapolates beyond it.

    Returns:
        Teacher with logits `[..., V]` in f32 and alpha `[...]`, the ratio.

    Raises:
        ValueError: the shapes differ, or `ratio` is a plain number that is not finite and above 0.

    References:
        Zhang et al., "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
        arXiv 2503.02832, Eq. 10-11 (Theorem 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from palign import losses
        >>> print(losses.theorem1_teacher(jnp.array([1.0, 0.0]), jnp.zeros(2), ratio=2.0).logits)
        [2. 0.]
    """
    check_positive("theorem1_teacher", ratio=ratio)
    dpo, reference = map(floored, _frozen("theorem1_teacher", dpo_logits=dpo_logits, reference_logits=reference_logits))
    return Teacher(reference + ratio * (dpo - reference), jnp.full(dpo.shape[:-1], ratio, dpo.dtype))


def contrastive_teacher(
    dpo_logits: Float[Array, "*batch V"],
    reverse_logits: Float[Array, "*batch V"],
    *,
    ratio: float | Float[Array, ""],
) -> Teacher:
    """Teacher of AlignDistil's contrastive reward: beyond the DPO model, away from the reverse DPO model.

    `z* = z_dpo + ratio (z_dpo - z_reverse)`

    Args:
        dpo_logits: `[..., V]`, logits of a model trained by DPO. Receives no gradient.
        reverse_logits: `[..., V]`, logits of a model trained by DPO on the same pairs with chosen and rejected swapped.
            Receives no gradient.
        ratio: beta0 / beta, the beta of the DPO trainings over that of the distillation, above 0.

    Returns:
        Teacher with logits `[..., V]` in f32 and alpha `[...]`, the ratio.

    Raises:
        ValueError: the shapes differ, or `ratio` is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 12-15.

    Notes:
        With the reference in the place of the reverse model this is `theorem1_teacher` at ratio + 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from palign import losses
        >>> print(losses.contrastive_teacher(jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0]), ratio=2.0).logits)
        [5. 0.]
    """
    check_positive("contrastive_teacher", ratio=ratio)
    dpo, reverse = map(floored, _frozen("contrastive_teacher", dpo_logits=dpo_logits, reverse_logits=reverse_logits))
    return Teacher(dpo + ratio * (dpo - reverse), jnp.full(dpo.shape[:-1], ratio, dpo.dtype))


def adaptive_teacher(
    dpo_logits: Float[Array, "*batch V"],
    reverse_logits: Float[Array, "*batch V"],
    *,
    scale: float | Float[Array, ""] = 20.0,
    epsilon: float | Float[Array, ""] = 1e-3,
) -> Teacher:
    """Teacher of AlignDistil: extrapolates each token as far as the DPO and the reverse DPO model disagree on it.

    `z* = z_dpo + alpha (z_dpo - z_reverse)`, `alpha = scale TVD + epsilon`,
    `TVD = 1/2 sum_v |softmax(z_dpo)_v - softmax(z_reverse)_v|`.

    Args:
        dpo_logits: `[..., V]`, logits of a model trained by DPO. Receives no gradient.
        reverse_logits: `[..., V]`, logits of a model trained by DPO on the same pairs with chosen and rejected swapped.
            Receives no gradient.
        scale: alpha where the two models are disjoint, above 0: 20 for off-policy and 30 for on-policy training in the
            authors' recipes.
        epsilon: alpha where the two models agree, above 0; keeps beta0 / alpha finite.

    Returns:
        Teacher with logits `[..., V]` in f32 and alpha `[...]` between epsilon and scale + epsilon.

    Raises:
        ValueError: the shapes differ, or `scale` or `epsilon` is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 16-17.

    Notes:
        The authors' code leaves out the 1/2 of the total variation; its r of 10 and 15 are the 20 and 30 here.

    Examples:
        (3/4, 1/4) against (1/4, 3/4): TVD = 1/2 and alpha = 20/2 + 0.001.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> dpo = jnp.log(jnp.array([0.75, 0.25]))
        >>> print(np.asarray(losses.adaptive_teacher(dpo, dpo[::-1]).alpha).round(4))
        10.001
    """
    check_positive("adaptive_teacher", scale=scale, epsilon=epsilon)
    dpo, reverse = _frozen("adaptive_teacher", dpo_logits=dpo_logits, reverse_logits=reverse_logits)
    alpha = scale * _total_variation(dpo, reverse) + epsilon
    return Teacher(floored(dpo) + alpha[..., None] * (floored(dpo) - floored(reverse)), alpha)


def adaptive_weight(alpha: Float[Array, "*batch"], *, beta: float | Float[Array, ""]) -> Float[Array, "*batch"]:
    """Weight of a token's KL in the paper: the further the teacher is extrapolated, the weaker it pulls.

    `w = beta / alpha`

    Args:
        alpha: `[...]`, above 0, from a teacher.
        beta: the beta0 of the DPO trainings, above 0.

    Returns:
        `[...]`, from beta / (scale + epsilon) to beta / epsilon: 0.005 to 100 at the defaults. Tokens on which the two
        DPO models agree weigh most, and there the teacher is the DPO model: an implicit anchor.

    Raises:
        ValueError: `beta` is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 17.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.adaptive_weight(jnp.array([0.001, 10.0]), beta=0.1)).round(4))
        [1.e+02 1.e-02]
    """
    check_positive("adaptive_weight", beta=beta)
    return jax.lax.stop_gradient(beta / as_float(alpha))


def constant_weight(alpha: Float[Array, "*batch"], *, beta: float | Float[Array, ""]) -> Float[Array, "*batch"]:
    """Weight that is the same for every token, whatever its alpha.

    `w = beta`

    Args:
        alpha: `[...]`, from a teacher; only its shape counts.
        beta: the weight, above 0.

    Returns:
        `[...]`, beta everywhere.

    Raises:
        ValueError: `beta` is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 10: the weight before it was made adaptive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from palign import losses
        >>> print(losses.constant_weight(jnp.array([0.001, 10.0]), beta=0.1))
        [0.1 0.1]
    """
    check_positive("constant_weight", beta=beta)
    return jnp.full_like(as_float(alpha), jax.lax.stop_gradient(beta))


def capped_weight(
    alpha: Float[Array, "*batch"], *, beta: float | Float[Array, ""], cap: float | Float[Array, ""] = 1.0
) -> Float[Array, "*batch"]:
    """Weight of the paper with an upper bound.

    `w = min(beta / alpha, cap)`

    Args:
        alpha: `[...]`, above 0, from a teacher.
        beta: the beta0 of the DPO trainings, above 0.
        cap: the largest weight, above 0. The default 1.0 binds, at the other defaults, where the two DPO models differ
            by less than half a percent of their mass (alpha < 0.1, TVD < 0.005). The heaviest token then weighs 200
            times the lightest, not 20,000 times.

    Returns:
        `[...]`, at most cap.

    Raises:
        ValueError: `beta` or `cap` is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 17, has no bound; this one is ours.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.capped_weight(jnp.array([0.001, 10.0]), beta=0.1, cap=1.0)).round(4))
        [1.   0.01]
    """
    check_positive("capped_weight", beta=beta, cap=cap)
    return jax.lax.stop_gradient(jnp.minimum(beta / as_float(alpha), cap))


def aligndistil_theorem1(
    student_logits: Float[Array, "*batch V"],
    dpo_logits: Float[Array, "*batch V"],
    reference_logits: Float[Array, "*batch V"],
    *,
    beta: float | Float[Array, ""],
    beta0: float | Float[Array, ""] = 0.1,
) -> Float[Array, "*batch"]:
    """AlignDistil with the plain DPO reward: RLHF with a token-level reward, as distillation.

    `L = beta KL(softmax(z_student) || softmax(z*))`, `z* = (beta0 / beta) z_dpo + (1 - beta0 / beta) z_ref`.

    Args:
        student_logits: `[..., V]`, logits of the policy in training.
        dpo_logits: `[..., V]`, logits of a model trained by DPO. Receives no gradient.
        reference_logits: `[..., V]`, logits of the reference that it was trained against. Receives no gradient.
        beta: strength of the KL penalty of the RLHF problem, above 0; below beta0 extrapolates beyond the DPO model.
        beta0: beta of the DPO training, above 0.

    Returns:
        `[...]` per position, in nats times beta.

    Raises:
        ValueError: shapes differ, or `beta` or `beta0` is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 8-11 (Theorem 1).

    Notes:
        The gradient equals RLHF's in each state, not over whole sequences unless beta = beta0: a state's log-partition
        function depends on the earlier tokens, and per-position distillation does not see that.

    Examples:
        With beta = beta0 the teacher is the DPO model: 0.1 times the 0.1438 of `reverse_kl`.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> student, dpo = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0]))
        >>> print(np.asarray(losses.aligndistil_theorem1(student, dpo, jnp.ones(2), beta=0.1, beta0=0.1)).round(4))
        0.0144
    """
    check_same_shape(
        "aligndistil_theorem1", student_logits=student_logits, dpo_logits=dpo_logits, reference_logits=reference_logits
    )
    check_positive("aligndistil_theorem1", beta=beta, beta0=beta0)
    teacher = theorem1_teacher(dpo_logits, reference_logits, ratio=beta0 / beta)
    return constant_weight(teacher.alpha, beta=beta) * reverse_kl(student_logits, teacher.logits)


def aligndistil_contrastive(
    student_logits: Float[Array, "*batch V"],
    dpo_logits: Float[Array, "*batch V"],
    reverse_logits: Float[Array, "*batch V"],
    *,
    beta: float | Float[Array, ""],
    beta0: float | Float[Array, ""] = 0.1,
) -> Float[Array, "*batch"]:
    """AlignDistil with the contrastive reward and one extrapolation for all tokens.

    `L = beta KL(softmax(z_student) || softmax(z*))`, `z* = z_dpo + (beta0 / beta) (z_dpo - z_reverse)`.

    Args:
        student_logits: `[..., V]`, logits of the policy in training.
        dpo_logits: `[..., V]`, logits of a model trained by DPO. Receives no gradient.
        reverse_logits: `[..., V]`, logits of a model trained by DPO on swapped pairs. Receives no gradient.
        beta: strength of the KL penalty of the RLHF problem, above 0.
        beta0: beta of both DPO trainings, above 0.

    Returns:
        `[...]` per position, in nats times beta.

    Raises:
        ValueError: shapes differ, or `beta` or `beta0` is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 12-15.

    Notes:
        Needs no reference model. The paper's ablation has beta0 / beta of 1 and 2; with 2 responses grew twice as long.

    Examples:
        Where the two DPO models agree the teacher is the DPO model: 0.1 times the 0.1438 of `reverse_kl`.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> student, dpo = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0]))
        >>> print(np.asarray(losses.aligndistil_contrastive(student, dpo, dpo, beta=0.1, beta0=0.1)).round(4))
        0.0144
    """
    check_same_shape(
        "aligndistil_contrastive", student_logits=student_logits, dpo_logits=dpo_logits, reverse_logits=reverse_logits
    )
    check_positive("aligndistil_contrastive", beta=beta, beta0=beta0)
    teacher = contrastive_teacher(dpo_logits, reverse_logits, ratio=beta0 / beta)
    return constant_weight(teacher.alpha, beta=beta) * reverse_kl(student_logits, teacher.logits)


def aligndistil(
    student_logits: Float[Array, "*batch V"],
    dpo_logits: Float[Array, "*batch V"],
    reverse_logits: Float[Array, "*batch V"],
    *,
    beta0: float | Float[Array, ""] = 0.1,
    scale: float | Float[Array, ""] = 20.0,
    epsilon: float | Float[Array, ""] = 1e-3,
) -> Float[Array, "*batch"]:
    """AlignDistil: token-adaptive policy distillation.

    `L = (beta0 / alpha) KL(softmax(z_student) || softmax(z*))` with z* and alpha of `adaptive_teacher`.

    Args:
        student_logits: `[..., V]`, logits of the policy in training.
        dpo_logits: `[..., V]`, logits of a model trained by DPO. Receives no gradient.
        reverse_logits: `[..., V]`, logits of a model trained by DPO on swapped pairs. Receives no gradient.
        beta0: beta of both DPO trainings, above 0.
        scale: alpha where the two models are disjoint, above 0; 20 off-policy, 30 on-policy.
        epsilon: alpha where the two models agree, above 0.

    Returns:
        `[...]` per position, in weighted nats. The paper takes the mean over the tokens of each response, then over
        the batch.

    Raises:
        ValueError: shapes differ, or a hyper-parameter is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 16-19.

    Notes:
        Every response token counts, the first included; the authors' trainers miss it, and the off-policy one trains
        the position after the last. The weight belongs to the token, inside the sum. See `adaptive_weight` for its
        range, and `aligndistil_constant` and `aligndistil_capped` for narrower ones.

    Examples:
        Two DPO models that agree: weight 0.1 / 0.001 = 100 on the 0.1438 of `reverse_kl`.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> student, dpo = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0]))
        >>> print(np.asarray(losses.aligndistil(student, dpo, dpo)).round(2))
        14.38
    """
    check_same_shape("aligndistil", student_logits=student_logits, dpo_logits=dpo_logits, reverse_logits=reverse_logits)
    check_positive("aligndistil", beta0=beta0)
    teacher = adaptive_teacher(dpo_logits, reverse_logits, scale=scale, epsilon=epsilon)
    return adaptive_weight(teacher.alpha, beta=beta0) * reverse_kl(student_logits, teacher.logits)


def aligndistil_constant(
    student_logits: Float[Array, "*batch V"],
    dpo_logits: Float[Array, "*batch V"],
    reverse_logits: Float[Array, "*batch V"],
    *,
    beta0: float | Float[Array, ""] = 0.1,
    scale: float | Float[Array, ""] = 20.0,
    epsilon: float | Float[Array, ""] = 1e-3,
) -> Float[Array, "*batch"]:
    """AlignDistil's adaptive teacher with the same weight for every token.

    `L = beta0 KL(softmax(z_student) || softmax(z*))` with z* of `adaptive_teacher`.

    Args:
        student_logits: `[..., V]`, logits of the policy in training.
        dpo_logits: `[..., V]`, logits of a model trained by DPO. Receives no gradient.
        reverse_logits: `[..., V]`, logits of a model trained by DPO on swapped pairs. Receives no gradient.
        beta0: the weight, above 0.
        scale: alpha where the two models are disjoint, above 0; 20 off-policy, 30 on-policy.
        epsilon: alpha where the two models agree, above 0.

    Returns:
        `[...]` per position, in nats times beta0.

    Raises:
        ValueError: shapes differ, or a hyper-parameter is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 16 with the weight of Eq. 10.

    Examples:
        Two DPO models that agree: 0.1 times the 0.1438 of `reverse_kl`.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> student, dpo = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0]))
        >>> print(np.asarray(losses.aligndistil_constant(student, dpo, dpo)).round(4))
        0.0144
    """
    check_same_shape(
        "aligndistil_constant", student_logits=student_logits, dpo_logits=dpo_logits, reverse_logits=reverse_logits
    )
    check_positive("aligndistil_constant", beta0=beta0)
    teacher = adaptive_teacher(dpo_logits, reverse_logits, scale=scale, epsilon=epsilon)
    return constant_weight(teacher.alpha, beta=beta0) * reverse_kl(student_logits, teacher.logits)


def aligndistil_capped(
    student_logits: Float[Array, "*batch V"],
    dpo_logits: Float[Array, "*batch V"],
    reverse_logits: Float[Array, "*batch V"],
    *,
    beta0: float | Float[Array, ""] = 0.1,
    scale: float | Float[Array, ""] = 20.0,
    epsilon: float | Float[Array, ""] = 1e-3,
    cap: float | Float[Array, ""] = 1.0,
) -> Float[Array, "*batch"]:
    """AlignDistil with a bound on the weight of a token.

    `L = min(beta0 / alpha, cap) KL(softmax(z_student) || softmax(z*))` with z* and alpha of `adaptive_teacher`.

    Args:
        student_logits: `[..., V]`, logits of the policy in training.
        dpo_logits: `[..., V]`, logits of a model trained by DPO. Receives no gradient.
        reverse_logits: `[..., V]`, logits of a model trained by DPO on swapped pairs. Receives no gradient.
        beta0: beta of both DPO trainings, above 0.
        scale: alpha where the two models are disjoint, above 0; 20 off-policy, 30 on-policy.
        epsilon: alpha where the two models agree, above 0.
        cap: the largest weight, above 0; see `capped_weight`.

    Returns:
        `[...]` per position, in weighted nats.

    Raises:
        ValueError: shapes differ, or a hyper-parameter is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, Eq. 16-19; the cap is ours.

    Examples:
        Two DPO models that agree: the weight of 100 is cut to 1, and `reverse_kl` remains.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> student, dpo = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0]))
        >>> print(np.asarray(losses.aligndistil_capped(student, dpo, dpo)).round(4))
        0.1438
    """
    check_same_shape(
        "aligndistil_capped", student_logits=student_logits, dpo_logits=dpo_logits, reverse_logits=reverse_logits
    )
    check_positive("aligndistil_capped", beta0=beta0, cap=cap)
    teacher = adaptive_teacher(dpo_logits, reverse_logits, scale=scale, epsilon=epsilon)
    return capped_weight(teacher.alpha, beta=beta0, cap=cap) * reverse_kl(student_logits, teacher.logits)


def aligndistil_official(
    student_logits: Float[Array, "*batch V"],
    dpo_logits: Float[Array, "*batch V"],
    reverse_logits: Float[Array, "*batch V"],
    *,
    beta0: float | Float[Array, ""] = 0.1,
    scale: float | Float[Array, ""] = 10.0,
    epsilon: float | Float[Array, ""] = 1e-3,
) -> Float[Array, "*batch"]:
    """AlignDistil with the distance of the authors' code, for comparison: twice the total variation.

    `L = (beta0 / alpha) KL(softmax(z_student) || softmax(z*))`, with `z* = z_dpo + alpha (z_dpo - z_reverse)` and
    `alpha = scale sum_v |p_dpo - p_reverse| + epsilon`.

    Args:
        student_logits: `[..., V]`, logits of the policy in training.
        dpo_logits: `[..., V]`, logits of a model trained by DPO. Receives no gradient.
        reverse_logits: `[..., V]`, logits of a model trained by DPO on swapped pairs. Receives no gradient.
        beta0: beta of both DPO trainings, above 0.
        scale: half of alpha where the two models are disjoint, above 0; 10 off-policy and 15 on-policy in the authors'
            scripts.
        epsilon: alpha where the two models agree, above 0.

    Returns:
        `[...]` per position, in weighted nats.

    Raises:
        ValueError: shapes differ, or a hyper-parameter is a plain number that is not finite and above 0.

    References:
        Zhang et al., arXiv 2503.02832, and the authors' code.

    Notes:
        It is `aligndistil` with twice the scale. The authors' trainers also leave the first token of each response
        out: so does the method of this name in `palign.objectives`.

    Examples:
        Two DPO models that agree: no distance to halve, the same 14.38 as `aligndistil`.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> student, dpo = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0]))
        >>> print(np.asarray(losses.aligndistil_official(student, dpo, dpo)).round(2))
        14.38
    """
    check_same_shape(
        "aligndistil_official", student_logits=student_logits, dpo_logits=dpo_logits, reverse_logits=reverse_logits
    )
    check_positive("aligndistil_official", beta0=beta0, scale=scale, epsilon=epsilon)
    return aligndistil(student_logits, dpo_logits, reverse_logits, beta0=beta0, scale=2 * scale, epsilon=epsilon)


def floored(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    """Return logits in f32 with a finite floor; `maximum` and not `where`, so that a NaN still shows."""
    return jnp.maximum(as_float(logits), _FLOOR)


def _frozen(loss: str, **logits: Float[Array, "*batch V"]) -> tuple[Float[Array, "*batch V"], ...]:
    """Return logits in f32 without gradient."""
    check_same_shape(loss, **logits)
    return tuple(jax.lax.stop_gradient(as_float(values)) for values in logits.values())


def _student_and_teacher(
    loss: str, student_logits: Float[Array, "*batch V"], teacher_logits: Float[Array, "*batch V"]
) -> tuple[Float[Array, "*batch V"], Float[Array, "*batch V"]]:
    """Return logits in f32, the teacher's without gradient."""
    check_same_shape(loss, student_logits=student_logits, teacher_logits=teacher_logits)
    return as_float(student_logits), jax.lax.stop_gradient(as_float(teacher_logits))


class _Partition(NamedTuple):
    """A softmax's normaliser in two parts: `log softmax(z) = (z - top) - log_sum`, precise however large z is."""

    top: Float[Array, "*batch 1"]
    log_sum: Float[Array, "*batch 1"]


def _partition(logits: Float[Array, "*batch V"]) -> _Partition:
    # The floor after the maximum, not before it: XLA on CPU would write the floored logits out once more.
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), _FLOOR))
    return _Partition(top, jnp.log(jnp.sum(jnp.exp(floored(logits) - top), axis=-1, keepdims=True)))


def _softmax(logits: Float[Array, "*batch V"], partition: _Partition) -> Float[Array, "*batch V"]:
    # The exponential is the one in `_partition`, so that it is computed once.
    return jnp.exp(floored(logits) - partition.top) * jnp.exp(-partition.log_sum)


def _log_ratio(
    first: Float[Array, "*batch V"], second: Float[Array, "*batch V"], p: _Partition, q: _Partition
) -> Float[Array, "*batch V"]:
    """Return the log-ratio of two softmaxes but for a constant of the position: the ratio of their `log_sum`s."""
    return (floored(first) - p.top) - (floored(second) - q.top)


def _kl_and_slope(
    first: Float[Array, "*batch V"], second: Float[Array, "*batch V"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch V"]]:
    """Return KL(P || Q) of two softmaxes, and its gradient with respect to the logits of P, in closed form."""
    p, q = _partition(first), _partition(second)
    ratio, normaliser = _log_ratio(first, second, p, q), p.log_sum - q.log_sum
    # Normalised after the sum: with probabilities in it XLA on CPU would hold one array of logits' size more.
    value = jnp.sum(jnp.exp(floored(first) - p.top) * ratio, axis=-1, keepdims=True) * jnp.exp(-p.log_sum) - normaliser
    return value[..., 0], _softmax(first, p) * (ratio - (normaliser + value))


@jax.custom_jvp
def _reverse_kl(student: Float[Array, "*batch V"], teacher: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    return _kl_and_slope(student, teacher)[0]


@_reverse_kl.defjvp
def _reverse_kl_jvp(primals, tangents):
    value, slope = _kl_and_slope(*primals)
    return value, jnp.sum(slope * tangents[0], axis=-1)


@jax.custom_jvp
def _forward_kl(student: Float[Array, "*batch V"], teacher: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    return _kl_and_slope(teacher, student)[0]


@_forward_kl.defjvp
def _forward_kl_jvp(primals, tangents):
    student, teacher = primals
    slope = _softmax(student, _partition(student)) - _softmax(teacher, _partition(teacher))
    return _kl_and_slope(teacher, student)[0], jnp.sum(slope * tangents[0], axis=-1)


def _check_mixture(loss: str, beta: float | Float[Array, ""]) -> None:
    if isinstance(beta, int | float) and not 0 < beta < 1:
        raise ValueError(
            f"{loss}: beta is {beta}; expected strictly between 0 and 1. The ends are forward_kl (0) and reverse_kl (1)"
        )


@jax.custom_jvp
def _jsd(
    student: Float[Array, "*batch V"],
    teacher: Float[Array, "*batch V"],
    weight: float | Float[Array, ""],
    rest: float | Float[Array, ""],
) -> Float[Array, "*batch"]:
    """Mix with the teacher's weight and the rest, which sum to 1; both are given, for 1 - 0.99999 is no f32 sum."""
    to_teacher, to_student, _ = _mixture_divergences(student, teacher, weight, rest)
    return weight * to_teacher + rest * to_student


@_jsd.defjvp
def _jsd_jvp(primals, tangents):
    _, _, weight, rest = primals
    to_teacher, to_student, slope = _mixture_divergences(*primals)
    by_weights = to_teacher * tangents[2] + to_student * tangents[3]  # what they do to the mixture cancels
    value = weight * to_teacher + rest * to_student
    return value, rest * jnp.sum(slope * tangents[0], axis=-1) + by_weights


def _mixture_divergences(
    student: Float[Array, "*batch V"],
    teacher: Float[Array, "*batch V"],
    weight: float | Float[Array, ""],
    rest: float | Float[Array, ""],
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch V"]]:
    """Return KL(P || M), KL(Q || M) and `Q ((log Q - log M) - KL(Q || M))`.

    `M = weight P + rest Q`, P the teacher and Q the student. The last, times `rest`, is the gradient of the
    Jensen-Shannon divergence with respect to the student's logits.
    """
    p, q = _partition(teacher), _partition(student)
    gap = _log_ratio(teacher, student, p, q) - (p.log_sum - q.log_sum)
    above_student, probabilities = _log_mixture(gap, weight, rest), _softmax(student, q)
    to_teacher = -jnp.sum(_softmax(teacher, p) * _log_mixture(-gap, rest, weight), axis=-1)
    to_student = -jnp.sum(probabilities * above_student, axis=-1)
    return to_teacher, to_student, -probabilities * (above_student + to_student[..., None])


def _log_mixture(
    gap: Float[Array, "*shape"], weight: float | Float[Array, ""], rest: float | Float[Array, ""]
) -> Float[Array, "*shape"]:
    """Return `log(rest + weight exp(gap))`, for weight + rest = 1, with its relative precision kept near 0.

    Near beta = 0 or 1 one of the two divergences is a small difference of large terms; each term must be good to the
    last digit. Three forms are needed, and each gets an argument that is harmless where another one is taken.
    """
    large = 30.0
    near = jnp.where(gap < large, gap, 0.0)
    growth = weight * jnp.expm1(near)
    shrinks = growth < -0.5
    small = jnp.where(shrinks, jnp.log(rest + weight * jnp.exp(near)), jnp.log1p(jnp.where(shrinks, 0.0, growth)))
    far = jnp.where(gap < large, large, gap)
    return jnp.where(gap < large, small, far + jnp.log(weight))


def _total_variation(first: Float[Array, "*batch V"], second: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Return half the L1 distance of two softmaxes, exact to the last digits also where they nearly agree.

    There alpha comes down to epsilon, and the rounding of two separate softmaxes, times the scale, would be seen in it.
    So the differences are `(P + Q) tanh(log(P / Q) / 2)`: relatively exact, as the gap of the logits is where it is
    small. What is left is the rounding of the two normalisers. The differences must sum to 0, which gives it away.
    """
    p, q = _partition(first), _partition(second)
    total, gap = _softmax(first, p) + _softmax(second, q), floored(first) - floored(second)
    offset = (p.top - q.top) + (p.log_sum - q.log_sum)
    offset += jnp.sum(total * jnp.tanh(0.5 * (gap - offset)), axis=-1, keepdims=True)
    return 0.5 * jnp.sum(total * jnp.abs(jnp.tanh(0.5 * (gap - offset))), axis=-1)
