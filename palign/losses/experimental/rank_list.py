"""RankList, a reconstruction and not the paper's letter: RankNet between places of a ranking that are near.

The paper's equations were not at hand. What is here follows its description: local (adjacent) and skip-wise comparisons
with a least difference of labels, and a log-sum-exp form. Do not report numbers as the paper's method.
"""

import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import as_float, check_lists


def rank_list(
    scores: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    skips: int = 1,
    margin: float | Float[Array, ""] = 0.0,
) -> Float[Array, " B"]:
    """RankList by comparisons: each place of the ranking against the next one, the one after, up to `skips` on.

    `L = sum_{k=1..skips} sum_i log(1 + exp(s_(i+k) - s_(i)))` over the pairs with `label_(i) - label_(i+k) >= margin`
    and above 0, where (1) is the response of the highest label.

    Args:
        scores: `[B, K]`, what is trained: rewards, or `beta (policy_logps - ref_logps)`.
        labels: `[B, K]`, higher is better, finite where valid. Receives no gradient.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        skips: how many places apart two compared responses may be, a whole number of at least 1; K - 1 compares all.
        margin: least difference of labels, at least 0, for a pair to count.

    Returns:
        `[B]` losses in nats per list, at least 0, summed over pairs; 0, with zero gradient, where no pair counts.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, `skips` is not a whole number of at least
            1, or `margin` is a plain number below 0 or not a number.

    References:
        After Naini, Diaz and Busso, "RankList -- A Listwise Preference Learning Framework for Predicting Subjective
        Preferences", arXiv 2508.09826; see the module's first line.

    Notes:
        Equal labels state no preference: such a pair never counts, also where margin is 0. The responses of a tie take
        their places in the order of their index, which decides which neighbours they are compared with. K = 2 with
        skips = 1 is RankNet.

    Examples:
        Scores 2, 1, 0 in the right order: each neighbour is ahead by 1, and 2 log(1 + exp(-1)) = 0.6265. With the
        two that are two places apart, 2 ahead, another log(1 + exp(-2)) = 0.1269 makes 0.7535 (rounded at the end).

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.losses import experimental
        >>> scores, valid = jnp.array([[2.0, 1.0, 0.0]]), jnp.ones((1, 3), bool)
        >>> print(np.asarray(experimental.rank_list(scores, scores, valid)).round(4))
        [0.6265]
        >>> print(np.asarray(experimental.rank_list(scores, scores, valid, skips=2)).round(4))
        [0.7535]
    """
    check_lists("rank_list", valid, scores=scores, labels=labels)
    if not isinstance(skips, numbers.Integral) or skips < 1:
        raise ValueError(f"rank_list: skips is {skips}; expected a whole number of at least 1")
    if isinstance(margin, numbers.Real) and not margin >= 0:
        raise ValueError(f"rank_list: margin is {margin}; expected a number of at least 0")
    scores, labels = _masked(valid, scores, labels)
    order = jnp.argsort(jnp.where(valid, -labels, jnp.inf), axis=-1, stable=True)  # padding last
    scores, labels, valid = (jnp.take_along_axis(array, order, axis=-1) for array in (scores, labels, valid))
    losses = jnp.zeros_like(scores[:, 0])
    for skip in range(1, min(int(skips), scores.shape[1] - 1) + 1):
        leads = labels[:, :-skip] - labels[:, skip:]
        counted = valid[:, :-skip] & valid[:, skip:] & (leads > 0) & (leads >= margin)
        terms = jax.nn.softplus(scores[:, skip:] - scores[:, :-skip])
        losses += jnp.where(counted, terms, 0.0).sum(-1)
    return losses


def rank_list_lse(
    scores: Float[Array, "B K"], labels: Float[Array, "B K"], valid: Bool[Array, "B K"]
) -> Float[Array, " B"]:
    """RankList in its log-sum-exp form: each response against all below it at once.

    `L = sum_i log(1 + sum_{label_j < label_i} exp(s_j - s_i))`. Without ties this is ListMLE: `plackett_luce` of the
    scores.

    Args:
        scores: `[B, K]`, what is trained: rewards, or `beta (policy_logps - ref_logps)`.
        labels: `[B, K]`, higher is better, only their order counts, finite where valid. Receives no gradient.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.

    Returns:
        `[B]` losses in nats per list, at least 0, summed over responses; 0, with zero gradient, where no two valid
        labels differ.

    Raises:
        ValueError: shapes are not the same `[B, K]`, or `valid` is not boolean.

    References:
        After Naini, Diaz and Busso, "RankList -- A Listwise Preference Learning Framework for Predicting Subjective
        Preferences", arXiv 2508.09826; see the module's first line.

    Notes:
        Tied responses do not compete with one another. In `plackett_luce` they share a denominator (Breslow's form).

    Examples:
        Equal scores of three: log 3 for the best, log 2 for the second, together log 6 = 1.7918.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.losses import experimental
        >>> labels, valid = jnp.array([[3.0, 1.0, 2.0]]), jnp.ones((1, 3), bool)
        >>> print(np.asarray(experimental.rank_list_lse(jnp.zeros((1, 3)), labels, valid)).round(4))
        [1.7918]
    """
    check_lists("rank_list_lse", valid, scores=scores, labels=labels)
    scores, labels = _masked(valid, scores, labels)
    below = valid[:, :, None] & valid[:, None, :] & (labels[:, None, :] < labels[:, :, None])
    beats_some = below.any(-1)
    # With none below the sum would be empty, which is NaN on the way: let it run over zeros, and drop it after.
    run_over = below | ~beats_some[:, :, None]
    gaps = jnp.where(below, scores[:, None, :] - scores[:, :, None], 0.0)
    terms = jax.nn.softplus(jax.nn.logsumexp(jnp.where(run_over, gaps, -jnp.inf), axis=-1))
    return jnp.where(beats_some, terms, 0.0).sum(-1)


def _masked(valid: Bool[Array, "B K"], scores: Array, labels: Array) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Return scores and stopped labels with 0 in the padded slots, so that what stood there touches no gradient."""
    scores, labels = (jnp.where(valid, as_float(array), 0.0) for array in (scores, labels))
    return scores, jax.lax.stop_gradient(labels)
