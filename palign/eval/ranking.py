"""Ranking accuracy: whether a model finds the preferred response more likely, and the best that a loss could bring.

Not to be mistaken for reward accuracy, which asks whether the preferred response *gained* more than the other.
"""

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import as_float, check_lists, check_mask, check_pairs, check_positive, log_ratios, margins

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)  # over which the paper reports the idealised accuracy
CERTAIN = 1e-3  # how far from 0 and 1 a probability of preference is kept


class AccuracyRange(NamedTuple):
    """An accuracy over several values of beta, each a mean over all pairs."""

    minimum: Float[Array, ""]
    median: Float[Array, ""]
    maximum: Float[Array, ""]


class FlipBuckets(NamedTuple):
    """Which pairs training ranked anew: exactly one of the four is True for each pair."""

    stayed_right: Bool[Array, " B"]
    turned_wrong: Bool[Array, " B"]
    turned_right: Bool[Array, " B"]
    stayed_wrong: Bool[Array, " B"]


def ranking_accuracy(policy_logps: Float[Array, "B 2"]) -> Bool[Array, " B"]:
    """Whether the model finds the chosen response at least as likely as the rejected one.

    `R = 1[log pi(y_w) >= log pi(y_l)]`

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response, in
            nats, summed over response tokens; averaged over them for the length-normalised accuracy.

    Returns:
        `[B]` bool; its mean is the accuracy. Equal log-probabilities count as right.

    Raises:
        ValueError: the shape is not `[B, 2]`.

    References:
        Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings", arXiv 2405.19534, the definition
        of ranking accuracy.

    Notes:
        TRL, EasyDeL and tunix log reward accuracy (`implicit_reward_accuracy`) only.

    Examples:
        By sums the short response wins, by means the long one: -6 / 6 > -4 / 2.

        >>> import jax.numpy as jnp
        >>> from palign.eval.ranking import ranking_accuracy
        >>> logps, lengths = jnp.array([[-6.0, -4.0], [-5.0, -5.0]]), jnp.array([[6.0, 2.0], [3.0, 3.0]])
        >>> print(ranking_accuracy(logps), ranking_accuracy(logps / lengths))
        [False  True] [ True  True]
    """
    check_pairs("ranking_accuracy", policy_logps=policy_logps)
    logps = as_float(policy_logps)
    return logps[:, 0] >= logps[:, 1]


def full_ranking_accuracy(
    policy_logps: Float[Array, "B K"], scores: Float[Array, "B K"], valid: Bool[Array, "B K"]
) -> Bool[Array, " B"]:
    """Whether the model's order of a list is the order of its scores, every place of it.

    `R = 1[log pi(y_i) >= log pi(y_j) for all i, j with score_i > score_j]`

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses in nats, summed or averaged over tokens.
        scores: `[B, K]`, higher is better. Equal scores ask for no order.
        valid: `[B, K]` bool, True = keep. What stands elsewhere is never read.

    Returns:
        `[B]` bool. A list without a preference is right whatever the model says: leave it out of the mean.

    Raises:
        ValueError: shapes differ or are not `[B, K]`, or `valid` is not boolean.

    References:
        Chen et al., arXiv 2405.19534, ranking accuracy of more than two responses: an exact match of the whole ranking.

    Examples:
        The first list is in order. In the second the two worst are exchanged: one pair of three, and all is wrong.

        >>> import jax.numpy as jnp
        >>> from palign.eval.ranking import full_ranking_accuracy
        >>> logps, scores = jnp.array([[-1.0, -2.0, -3.0], [-1.0, -3.0, -2.0]]), jnp.array([[3.0, 2.0, 1.0]] * 2)
        >>> print(full_ranking_accuracy(logps, scores, jnp.ones((2, 3), bool)))
        [ True False]
    """
    check_lists("full_ranking_accuracy", valid, policy_logps=policy_logps, scores=scores)
    logps, scores, valid = as_float(policy_logps), as_float(scores), jnp.asarray(valid)
    ordered = (scores[:, :, None] > scores[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    return jnp.all(~ordered | (logps[:, :, None] >= logps[:, None, :]), axis=(1, 2))


def implicit_reward_accuracy(policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"]) -> Bool[Array, " B"]:
    """Whether the chosen response gained more over the reference than the rejected one.

    `1[beta h > 0]`, with `h = rho_w - rho_l` and `rho = policy_logps - ref_logps`; any beta above 0 gives the same.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference.

    Returns:
        `[B]` bool. Strict: before training, where all margins are 0, every pair is wrong.

    Raises:
        ValueError: a shape is not `[B, 2]`, or the shapes differ.

    References:
        Rafailov et al., arXiv 2305.18290, section 4 (the reward); Chen et al., arXiv 2405.19534 (how it differs from
        ranking accuracy).

    Notes:
        TRL's `rewards/accuracies` is the same strict comparison, and so 0 at step 1.

    Examples:
        The first pair's rejected response is still the likelier, but the chosen one gained a nat: the reward is right
        and the ranking wrong.

        >>> import jax.numpy as jnp
        >>> from palign.eval.ranking import implicit_reward_accuracy, ranking_accuracy
        >>> policy, reference = jnp.array([[-9.0, -5.0], [-5.0, -5.0]]), jnp.array([[-10.0, -5.0], [-5.0, -5.0]])
        >>> print(implicit_reward_accuracy(policy, reference), ranking_accuracy(policy))
        [ True False] [False  True]
    """
    check_pairs("implicit_reward_accuracy", policy_logps=policy_logps, ref_logps=ref_logps)
    return margins(log_ratios(policy_logps, ref_logps)) > 0


def idealised_ranking_accuracy(
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""],
    alpha: float | Float[Array, ""] | Float[Array, " B"] = 1.0,
) -> Bool[Array, " B"]:
    """Whether the policy that minimises DPO's loss perfectly would rank the pair right.

    `R* = 1[(pi_ref(y_w) / pi_ref(y_l)) (alpha / (1 - alpha))^(1 / beta) > 1]`, computed as
    `log pi_ref(y_w) - log pi_ref(y_l) + logit(alpha) / beta > 0`.

    Args:
        ref_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under the
            reference, in nats, summed over response tokens.
        beta: strength of the tie to the reference, per nat, above 0.
        alpha: probability that a rater prefers the chosen response, in [0, 1]: one for all pairs, or `[B]`. Clipped to
            [0.001, 0.999], so that 1, a label taken as certain, means 0.999 as in the paper.

    Returns:
        `[B]` bool; its mean is the accuracy that the reference allows.

    Raises:
        ValueError: the shape is not `[B, 2]`, alpha is neither a scalar nor `[B]`, or a plain number is out of range.

    References:
        Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings", arXiv 2405.19534, the idealised
        ranking accuracy.

    Notes:
        The paper moves an alpha of 1 to 0.999; clipping keeps what lies between the two in order. The authors' code
        divides log-probabilities where the length is not normalised, so its table is not matched.

    Examples:
        logit(0.999) = 6.9. With beta = 1 it outweighs a reference that is 5 nats wrong, and not one that is 8 nats
        wrong; with beta = 0.1 it is 69 nats.

        >>> import jax.numpy as jnp
        >>> from palign.eval.ranking import idealised_ranking_accuracy
        >>> reference = jnp.array([[-10.0, -5.0], [-10.0, -2.0]])
        >>> print(idealised_ranking_accuracy(reference, beta=1.0), idealised_ranking_accuracy(reference, beta=0.1))
        [ True False] [ True  True]
    """
    name = "idealised_ranking_accuracy"
    check_pairs(name, ref_logps=ref_logps)
    check_positive(name, beta=beta)
    _check_probability(name, alpha, jnp.shape(ref_logps)[0])
    margin = margins(as_float(ref_logps))
    probability = jnp.clip(jnp.asarray(alpha, margin.dtype), CERTAIN, 1 - CERTAIN)
    return margin + (jnp.log(probability) - jnp.log1p(-probability)) / beta > 0


def idealised_accuracy_range(
    ref_logps: Float[Array, "B 2"],
    *,
    alpha: float | Float[Array, ""] | Float[Array, " B"] = 1.0,
    betas: Sequence[float] = BETAS,
) -> AccuracyRange:
    """Least, median and largest idealised ranking accuracy over values of beta: the range that the paper reports.

    `min, median, max over beta of mean_b R*(b, beta)`

    Args:
        ref_logps: `[B, 2]`, as `idealised_ranking_accuracy` takes them; all pairs of a data set.
        alpha: as there.
        betas: at least one; 0.01, 0.1, 1, 5 and 10 as in the paper.

    Returns:
        Three accuracies in [0, 1].

    Raises:
        ValueError: there are no pairs or no betas, or what `idealised_ranking_accuracy` refuses.

    References:
        Chen et al., arXiv 2405.19534.

    Examples:
        The reference is right about one pair and 5 and 8 nats wrong about two. logit(0.999) / beta is 691, 69, 6.9, 1.4
        and 0.7 nats: 3, 3, 2, 1 and 1 pairs of three.

        >>> import jax.numpy as jnp
        >>> from palign.eval.ranking import idealised_accuracy_range
        >>> found = idealised_accuracy_range(jnp.array([[-1.0, -2.0], [-10.0, -5.0], [-10.0, -2.0]]))
        >>> print(*(f"{float(value):.3f}" for value in found))
        0.333 0.667 1.000
    """
    check_pairs("idealised_accuracy_range", ref_logps=ref_logps)
    if not jnp.shape(ref_logps)[0] or not betas:
        raise ValueError(
            f"idealised_accuracy_range: ref_logps has shape {list(jnp.shape(ref_logps))} and there are {len(betas)} "
            "betas; expected a pair and a beta at least"
        )
    kept = [idealised_ranking_accuracy(ref_logps, beta=beta, alpha=alpha) for beta in betas]
    accuracies = jnp.mean(jnp.stack(kept).astype(as_float(ref_logps).dtype), axis=1)
    return AccuracyRange(jnp.min(accuracies), jnp.median(accuracies), jnp.max(accuracies))


def flip_buckets(policy_correct: Bool[Array, " B"], ref_correct: Bool[Array, " B"]) -> FlipBuckets:
    """Sorts pairs by whether the reference ranked them right and whether the policy does.

    Args:
        policy_correct: `[B]` bool, `ranking_accuracy` of the policy.
        ref_correct: `[B]` bool, of the reference.

    Returns:
        Four masks `[B]`, of which exactly one is True for each pair. The mean of `turned_right` over those that the
        reference ranked wrong is the share of mistakes that training mended.

    Raises:
        ValueError: a shape is not `[B]`, the shapes differ, or an array is not boolean.

    References:
        Chen et al., arXiv 2405.19534: below a tenth of the wrong pairs were flipped where the validation loss was best.

    Examples:
        >>> import jax.numpy as jnp
        >>> from palign.eval.ranking import flip_buckets
        >>> now, before = jnp.array([True, False, True, False]), jnp.array([True, True, False, False])
        >>> print(*(bucket.astype(int) for bucket in flip_buckets(now, before)))
        [1 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1]
    """
    for name, array in (("policy_correct", policy_correct), ("ref_correct", ref_correct)):
        check_mask("flip_buckets", name, array)
        chex.assert_shape(
            array,
            (*jnp.shape(policy_correct)[:1],),
            custom_message=f"flip_buckets: {name} has shape {list(jnp.shape(array))}, policy_correct "
            f"{list(jnp.shape(policy_correct))}; expected [B], one for each pair",
            exception_type=ValueError,
        )
    now, before = jnp.asarray(policy_correct), jnp.asarray(ref_correct)
    return FlipBuckets(before & now, before & ~now, ~before & now, ~before & ~now)


def _check_probability(function, alpha, pairs):
    if isinstance(alpha, numbers.Real):
        if not 0 <= alpha <= 1:
            raise ValueError(f"{function}: alpha is {alpha}; expected a probability, from 0 to 1")
    elif jnp.shape(alpha) not in ((), (pairs,)):
        raise ValueError(
            f"{function}: alpha has shape {list(jnp.shape(alpha))}; expected a scalar, or [{pairs}] with one "
            "probability for each pair of ref_logps"
        )
