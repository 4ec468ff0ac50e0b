"""LiPO: the losses of learning to rank, on scores that are scaled log-ratios.

All are sums over the responses or the pairs of a list, not means: long lists weigh more. The seventh loss of the
paper, list-MLE, is `plackett_luce`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from palign.losses.checks import check_positive
from palign.losses.listwise.lists import differences, log_softmax, masked_inputs, preferred


def lipo_pointwise_mse(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.05,
) -> Float[Array, " B"]:
    """Pointwise regression of LiPO: each response's score is drawn to its label.

    `L = sum_i (label_i - s_i)^2`, with `s = beta (policy_logps - ref_logps)`.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, targets in units of the score s. The paper has mean win rates in [0, 1]. Their scale and their
            zero both count.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0; the paper's default is 0.05.

    Returns:
        `[B]` losses per list, at least 0, summed over responses; 0, with zero gradient, for a list with no valid
        response. Nothing is compared: one response alone, or equal labels, still pull.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` is a plain number that is not
            finite and above 0.

    References:
        Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv 2402.01878.

    Notes:
        Not invariant to a constant added to the log-ratios of a list. RAX's `pointwise_mse_loss` is the same, as a mean
        over the responses of the whole batch by default. TRL, tunix and EasyDeL have no listwise loss.

    Examples:
        Before any training s = 0: labels 1 and 1/2 cost 1 + 1/4.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
        >>> print(np.asarray(losses.lipo_pointwise_mse(zeros, zeros, jnp.array([[1.0, 0.5]]), valid)))
        [1.25]
    """
    ratios, labels = masked_inputs(
        "lipo_pointwise_mse", valid, policy_logps=policy_logps, ref_logps=ref_logps, labels=labels
    )
    check_positive("lipo_pointwise_mse", beta=beta)
    # Padding holds zeros on both sides: its term is 0.
    return jnp.square(labels - beta * ratios).sum(-1)


def lipo_pointwise_sigmoid(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.05,
) -> Float[Array, " B"]:
    """Pointwise cross entropy of LiPO: the sigmoid of each response's score is drawn to its label.

    `L = -sum_i [ label_i log sigmoid(s_i) + (1 - label_i) log sigmoid(-s_i) ]`, with
    `s = beta (policy_logps - ref_logps)`.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, probabilities in [0, 1]; the paper has mean win rates. Beyond them the loss has no minimum.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0; the paper's default is 0.05.

    Returns:
        `[B]` losses in nats per list, at least 0, summed over responses; 0, with zero gradient, for a list with no
        valid response. Nothing is compared: one response alone, or equal labels, still pull.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` is a plain number that is not
            finite and above 0.

    References:
        Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv 2402.01878.

    Notes:
        Not invariant to a constant added to the log-ratios of a list. RAX's `pointwise_sigmoid_loss` is the same, but
        clips labels to [0, 1] without a word, and is a mean over the responses of the whole batch by default.

    Examples:
        Before any training every sigmoid is 1/2, and every response costs log 2, whatever its label: 2 log 2 = 1.3863.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
        >>> print(np.asarray(losses.lipo_pointwise_sigmoid(zeros, zeros, jnp.array([[1.0, 0.5]]), valid)).round(4))
        [1.3863]
    """
    ratios, labels = masked_inputs(
        "lipo_pointwise_sigmoid", valid, policy_logps=policy_logps, ref_logps=ref_logps, labels=labels
    )
    check_positive("lipo_pointwise_sigmoid", beta=beta)
    scores = beta * ratios
    terms = labels * jax.nn.softplus(-scores) + (1 - labels) * jax.nn.softplus(scores)
    return jnp.where(valid, terms, 0.0).sum(-1)


def lipo_pair_logistic(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.05,
) -> Float[Array, " B"]:
    """DPO on every pair of a list whose labels differ; LiPO's DPO-BT.

    `L = sum_{label_i > label_j} log(1 + exp(-(s_i - s_j)))`, with `s = beta (policy_logps - ref_logps)`.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, scores of the responses; higher is better, only their order counts, finite where valid.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0; the paper's default is 0.05.

    Returns:
        `[B]` losses in nats per list, at least 0, summed over pairs; 0, with zero gradient, for a list with no two
        valid responses of different labels.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` is a plain number that is not
            finite and above 0.

    References:
        Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv 2402.01878; Burges et al.,
        "Learning to Rank using Gradient Descent", ICML 2005 (RankNet).

    Notes:
        K = 2 is `dpo`. `lipo_lambda` weighs the same pairs. RAX's `pairwise_logistic_loss` is the same, as a
        mean over the pairs of the whole batch by default. TRL, tunix and EasyDeL have no listwise loss.

    Examples:
        Three responses with different labels are three pairs, each log 2 before any training: 3 log 2 = 2.0794.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
        >>> print(np.asarray(losses.lipo_pair_logistic(zeros, zeros, jnp.array([[3.0, 1.0, 2.0]]), valid)).round(4))
        [2.0794]
    """
    ratios, labels = masked_inputs(
        "lipo_pair_logistic", valid, policy_logps=policy_logps, ref_logps=ref_logps, labels=labels
    )
    check_positive("lipo_pair_logistic", beta=beta)
    terms = jax.nn.softplus(-beta * differences(ratios))
    return jnp.where(preferred(labels, valid), terms, 0.0).sum((-2, -1))


def lipo_pair_hinge(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.05,
) -> Float[Array, " B"]:
    """Hinge loss on every pair of a list whose labels differ: pairs that are apart by 1 pull no more.

    `L = sum_{label_i > label_j} max(0, 1 - (s_i - s_j))`, with `s = beta (policy_logps - ref_logps)`.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, scores of the responses; higher is better, only their order counts, finite where valid.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0; the margin asked for is 1 / beta nats.

    Returns:
        `[B]` losses per list, at least 0, summed over pairs; 0, with zero gradient, for a list with no two valid
        responses of different labels.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` is a plain number that is not
            finite and above 0.

    References:
        Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv 2402.01878.

    Notes:
        K = 2 is `hinge`; the loss on pairs of SLiC, with log-ratios for its scores, and of RRHF. RAX's
        `pairwise_hinge_loss` is the same, as a mean over the pairs of the whole batch by default. TRL, tunix and
        EasyDeL have no listwise loss.

    Examples:
        Three responses with different labels are three pairs, each 1 before any training.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
        >>> print(np.asarray(losses.lipo_pair_hinge(zeros, zeros, jnp.array([[3.0, 1.0, 2.0]]), valid)))
        [3.]
    """
    ratios, labels = masked_inputs(
        "lipo_pair_hinge", valid, policy_logps=policy_logps, ref_logps=ref_logps, labels=labels
    )
    check_positive("lipo_pair_hinge", beta=beta)
    terms = jax.nn.relu(1 - beta * differences(ratios))
    return jnp.where(preferred(labels, valid), terms, 0.0).sum((-2, -1))


def lipo_softmax(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.05,
) -> Float[Array, " B"]:
    """Softmax cross entropy of LiPO, with the labels as they are for weights.

    `L = -sum_i label_i log softmax(s)_i`, with `s = beta (policy_logps - ref_logps)` and the softmax over the list.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, weights, at least 0; the paper has mean win rates in [0, 1]. Not normalised here: a list whose
            labels sum to 2 weighs twice as much as one whose labels sum to 1.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0; the paper's default is 0.05.

    Returns:
        `[B]` losses in nats times weight per list, at least 0; 0, with zero gradient, for a list with no valid
        response, with one only, or with labels of 0 only. Equal labels above 0 draw the scores together.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` is a plain number that is not
            finite and above 0.

    References:
        Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv 2402.01878.

    Notes:
        `listnet` and `info_nca` have the softmax of the labels for weights. With one label of 1 among zeros K = 2 is
        `dpo`. RAX's `softmax_loss` is the same, as a mean over lists by default. TRL, tunix and EasyDeL have no
        listwise loss.

    Examples:
        Before any training every probability is 1/3, and the labels sum to 2: 2 log 3 = 2.1972.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
        >>> print(np.asarray(losses.lipo_softmax(zeros, zeros, jnp.array([[1.0, 0.25, 0.75]]), valid)).round(4))
        [2.1972]
    """
    ratios, labels = masked_inputs("lipo_softmax", valid, policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    check_positive("lipo_softmax", beta=beta)
    return -(labels * log_softmax(ratios, valid, scale=beta)).sum(-1)


def lipo_lambda(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.05,
) -> Float[Array, " B"]:
    """LiPO-lambda: pairwise logistic losses, each weighed by what swapping the two would do to the ranking's DCG.

    `L = sum_{label_i > label_j} Delta_ij log(1 + exp(-(s_i - s_j)))`, with `s = beta (policy_logps - ref_logps)`,
    `Delta_ij = |2^label_i - 2^label_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|` and the ranks, from 1, of the
    *current* scores s. The weights receive no gradient.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, graded relevance; higher is better. The paper has mean win rates in [0, 1]. Unlike in
            `plackett_luce` their values count, exponentially: scale raw rewards before (2^label must be finite).
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0; the paper's default is 0.05.

    Returns:
        `[B]` losses per list, at least 0, summed over pairs; 0, with zero gradient, for a list with no two valid
        responses of different labels.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` is a plain number that is not
            finite and above 0.

    References:
        Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv 2402.01878, Eq. 8.

    Notes:
        Equal scores are ranked by their index, as by a stable sort. At the first step all scores are equal, and ranks
        that were equal too would make every weight and every gradient zero. So the loss is invariant to the order of
        the responses except where two scores are exactly equal. The discount has the natural logarithm; RAX's
        `dcg_lambdaweight` has log2 and multiplies by the padded list size K, which makes it K log 2 times this loss.
        Without ties K = 2 is 0.53246 |2^label_1 - 2^label_2| `dpo`.

    Examples:
        Two responses with labels 1 and 0 before any training: Delta = (2 - 1) * (1/log 2 - 1/log 3) = 0.5325, and
        0.5325 * log 2 = 0.3691.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
        >>> print(np.asarray(losses.lipo_lambda(zeros, zeros, jnp.array([[1.0, 0.0]]), valid)).round(4))
        [0.3691]
    """
    ratios, labels = masked_inputs("lipo_lambda", valid, policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    check_positive("lipo_lambda", beta=beta)
    gain = jnp.exp2(labels)
    discount = 1 / jnp.log1p(_ranks(ratios, valid).astype(gain.dtype))
    delta = jnp.abs(differences(gain)) * jnp.abs(differences(discount))
    terms = jax.lax.stop_gradient(delta) * jax.nn.softplus(-beta * differences(ratios))
    return jnp.where(preferred(labels, valid), terms, 0.0).sum((-2, -1))


def _ranks(scores: Float[Array, "B K"], valid: Bool[Array, "B K"]) -> Int[Array, "B K"]:
    """Return ranks from 1 (highest score) among the valid; equal scores in the order of their index."""
    index = jnp.arange(scores.shape[1])
    earlier = (index[None, :] < index[:, None])[None]
    ahead = (scores[:, None, :] > scores[:, :, None]) | ((scores[:, None, :] == scores[:, :, None]) & earlier)
    return 1 + (ahead & valid[:, None, :]).sum(-1)
