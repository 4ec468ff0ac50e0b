"""Losses on K ranked responses to one prompt.

Both compare all pairs of a list, `[B, K, K]`: K is small, no sort is needed, and padding is just a mask. Everywhere
below axis -2 (index i) is the response that a term belongs to and axis -1 (index j) the one it is compared with.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from palign.losses.checks import as_float, check_lists, check_positive, log_ratios


def plackett_luce(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    top: int | None = None,
) -> Float[Array, " B"]:
    """Plackett-Luce preference optimisation: DPO for a whole ranking.

    `L = sum_i [ log sum_{j: label_j <= label_i} exp(s_j) - s_i ]`, with `s = beta (policy_logps - ref_logps)`, over
    the responses i that are strictly better than at least one other: the best response is picked from all, the next
    from those that are left, and so on.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens. The order of the responses does not matter.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, scores of the responses; higher is better, only their order counts, finite where valid.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0.
        top: with a number m, only the m best places are fitted, against all that rank below: for lists whose tail is
            not in a trustworthy order. None fits the whole ranking. A tied block is fitted whole if its first place is.

    Returns:
        `[B]` losses in nats per list, at least 0, summed over places; 0, with zero gradient, for a list with no two
        valid responses of different labels.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, `beta` is a plain number that is not
            finite and above 0, or `top` is below 1.

    References:
        Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        arXiv 2305.18290, appendix A.3 (Eq. 18 with the implicit reward). Ties: Breslow, "Covariance Analysis of
        Censored Survival Data", Biometrics 30 (1974).

    Notes:
        Tied responses share a denominator, the block itself and all below it (Breslow's form); equal labels in the
        lowest block state no preference and add nothing. RAX's `listmle_loss` breaks ties at random instead. Without
        ties K = 2 is exactly `dpo`. TRL, tunix and EasyDeL have no listwise loss.

    Examples:
        Where the policy equals the reference a ranking of three has probability 1/3 * 1/2, so the loss is
        log 6 = 1.7918.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
        >>> print(np.asarray(losses.plackett_luce(zeros, zeros, jnp.array([[3.0, 1.0, 2.0]]), valid)).round(4))
        [1.7918]
    """
    arrays = dict(policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    check_lists("plackett_luce", valid, **arrays)
    check_positive("plackett_luce", beta=beta)
    if top is not None and top < 1:
        raise ValueError(f"plackett_luce: top is {top}; expected None (the whole ranking) or at least 1")
    ratios, labels = _masked_inputs(valid, **arrays)
    both = valid[:, :, None] & valid[:, None, :]
    below = both & (labels[:, :, None] > labels[:, None, :])
    fitted = below.any(-1)
    if top is not None:
        better = both & (labels[:, :, None] < labels[:, None, :])
        fitted &= better.sum(-1) < top
    rivals = both & (labels[:, :, None] >= labels[:, None, :]) & ~jnp.eye(valid.shape[1], dtype=bool)[None]
    # log(exp(s_i) + sum_rivals exp(s_j)) - s_i as softplus(logsumexp(s_j - s_i)): exact where i wins by far, and
    # the same arithmetic as dpo for K = 2.
    gaps = -beta * _differences(ratios)
    # A term that is not fitted has perhaps no rival at all: let it run over everything, finite, and drop it after.
    run_over = rivals | ~fitted[:, :, None]
    terms = jax.nn.softplus(jax.nn.logsumexp(jnp.where(run_over, gaps, 0.0), axis=-1, where=run_over))
    return jnp.where(fitted, terms, 0.0).sum(-1)


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
        Sum over pairs, not mean: long lists weigh more. Without ties K = 2 is 0.53246 |2^label_1 - 2^label_2| `dpo`.

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
    arrays = dict(policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    check_lists("lipo_lambda", valid, **arrays)
    check_positive("lipo_lambda", beta=beta)
    ratios, labels = _masked_inputs(valid, **arrays)
    preferred = valid[:, :, None] & valid[:, None, :] & (labels[:, :, None] > labels[:, None, :])
    gain = jnp.exp2(labels)
    discount = 1 / jnp.log1p(_ranks(ratios, valid).astype(gain.dtype))
    delta = jnp.abs(_differences(gain)) * jnp.abs(_differences(discount))
    terms = jax.lax.stop_gradient(delta) * jax.nn.softplus(-beta * _differences(ratios))
    return jnp.where(preferred, terms, 0.0).sum((-2, -1))


def _masked_inputs(
    valid: Bool[Array, "B K"], policy_logps: Array, ref_logps: Array, labels: Array
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Return log-ratios and labels with 0 in the padded slots, so that what stood there touches no gradient."""
    policy_logps, ref_logps, labels = (
        jnp.where(valid, as_float(array), 0.0) for array in (policy_logps, ref_logps, labels)
    )
    return log_ratios(policy_logps, ref_logps), jax.lax.stop_gradient(labels)


def _differences(values: Float[Array, "B K"]) -> Float[Array, "B K K"]:
    """Return `values_i - values_j`."""
    return values[:, :, None] - values[:, None, :]


def _ranks(scores: Float[Array, "B K"], valid: Bool[Array, "B K"]) -> Int[Array, "B K"]:
    """Return ranks from 1 (highest score) among the valid; equal scores in the order of their index."""
    index = jnp.arange(scores.shape[1])
    earlier = (index[None, :] < index[:, None])[None]
    ahead = (scores[:, None, :] > scores[:, :, None]) | ((scores[:, None, :] == scores[:, :, None]) & earlier)
    return 1 + (ahead & valid[:, None, :]).sum(-1)
