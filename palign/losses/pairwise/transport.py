"""Alignment via optimal transport: whole distributions are compared, rank by rank, in place of single pairs.

In one dimension the optimal coupling of two samples is found by sorting both. What a pair is matched with depends on
the whole batch, so it goes into the losses as a value: compute it once for the global batch, without gradient, and any
split into micro-batches or over devices gives the same loss and the same gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import (
    as_float,
    check_between,
    check_mask,
    check_pairs,
    check_positive,
    check_shape,
    log_ratios,
    margins,
)


def aot_matched_margins(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], listed: Bool[Array, " B"]
) -> Float[Array, " B"]:
    """Reference margin of the same rank: what `aot` compares every pair's policy margin with.

    With `m_i = logp_w - logp_l` under the policy and `n_i` the same under the reference, the pair whose m is the k-th
    smallest among the listed ones gets the k-th smallest n among them.

    Args:
        policy_logps: `[B, 2]` for the whole batch, log-probabilities of the chosen (column 0) and the rejected
            (column 1) response under the policy, in nats, summed over response tokens. Receives no gradient.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        listed: `[B]` bool, True for the pairs that exist; what stands in the others, even NaN, is never read.

    Returns:
        `[B]` margins in nats, without gradient; 0 for pairs not listed. Equal margins are matched in their order in
        the batch.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `listed` is not boolean `[B]`.

    References:
        Melnyk et al., "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv 2406.05882, the paired
        form.

    Notes:
        TRL and EasyDeL sort the batch of one device, so that their loss depends on how the batch is divided.

    Examples:
        Policy margins 3, -1, 2 have ranks 3, 1, 2; the reference's are 0, 5, 1, sorted 0, 1, 5.

        >>> import jax.numpy as jnp
        >>> from palign import losses
        >>> policy = jnp.array([[3.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
        >>> reference = jnp.array([[0.0, 0.0], [5.0, 0.0], [1.0, 0.0]])
        >>> print(losses.aot_matched_margins(policy, reference, jnp.ones(3, bool)))
        [5. 0. 1.]
    """
    _check_listed("aot_matched_margins", policy_logps, ref_logps, listed)
    return _of_same_rank(margins(as_float(policy_logps)), margins(as_float(ref_logps)), listed)


def aot(
    policy_logps: Float[Array, "B 2"],
    matched_margins: Float[Array, " B"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    label_smoothing: float | Float[Array, ""] = 0.0,
) -> Float[Array, " B"]:
    """Alignment via optimal transport, paired: the policy's margins shall dominate the reference's, rank by rank.

    `L = -(1 - eps) log sigmoid(x) - eps log sigmoid(-x)`, `x = beta (m - n*)`, with `m = logp_w - logp_l` under the
    policy and `n*` the reference's margin of the same rank in the whole batch.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        matched_margins: `[B]`, the n* in nats, from `aot_matched_margins` over the whole batch, of which this call may
            see a part. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        label_smoothing: eps, the probability that a label is wrong, from 0 to 1/2.

    Returns:
        `[B]` losses in nats, at least 0; log 2 where the policy equals the reference. The sum over the batch is the
        transport cost, and its gradient that of the sorted batch.

    Raises:
        ValueError: `policy_logps` is not `[B, 2]`, `matched_margins` is not `[B]`, `beta` is a plain number that is
            not finite and above 0, or `label_smoothing` is a plain number outside [0, 1/2].

    References:
        Melnyk et al., arXiv 2406.05882, the paired form.

    Notes:
        A batch of one pair is `dpo`. Weights per pair make no sense: a pair's value is that of its rank.

    Examples:
        A margin of 3 against 5: log(1 + exp(0.2)) = 0.7981; -1 against 0: log(1 + exp(0.1)) = 0.7444.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy = jnp.array([[3.0, 0.0], [-1.0, 0.0]])
        >>> print(np.asarray(losses.aot(policy, jnp.array([5.0, 0.0]), beta=0.1)).round(4))
        [0.7981 0.7444]
    """
    check_pairs("aot", policy_logps=policy_logps)
    check_shape("aot", "[B] with the B of the pairs", policy_logps.shape[:1], matched_margins=matched_margins)
    _check_numbers("aot", beta, label_smoothing)
    matched = jax.lax.stop_gradient(as_float(matched_margins))
    return _smoothed(beta * (margins(as_float(policy_logps)) - matched), label_smoothing)


def aot_matched_ratios(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], listed: Bool[Array, " B"]
) -> Float[Array, "B 2"]:
    """Log-ratios of the same rank on the other side: what `aot_unpaired` compares every response with.

    With `rho = policy_logps - ref_logps`, the chosen response whose rho is the k-th smallest among the listed chosen
    ones gets the k-th smallest rho of the rejected ones, and the other way round.

    Args:
        policy_logps: `[B, 2]` for the whole batch, log-probabilities of the chosen (column 0) and the rejected
            (column 1) response under the policy, in nats, summed over response tokens. Receives no gradient.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        listed: `[B]` bool, True for the pairs that exist; what stands in the others, even NaN, is never read.

    Returns:
        `[B, 2]` log-ratios in nats, without gradient: in column 0 the rejected one matched with this row's chosen
        response, in column 1 the chosen one matched with its rejected response. 0 for pairs not listed. Equal
        log-ratios are matched in their order in the batch.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `listed` is not boolean `[B]`.

    References:
        Melnyk et al., arXiv 2406.05882, the unpaired form.

    Examples:
        Chosen log-ratios 3, 1 and rejected ones 0, 2: the largest go together, 3 with 2, and so do 1 and 0.

        >>> import jax.numpy as jnp
        >>> from palign import losses
        >>> policy, reference = jnp.array([[3.0, 0.0], [1.0, 2.0]]), jnp.zeros((2, 2))
        >>> print(losses.aot_matched_ratios(policy, reference, jnp.ones(2, bool)))
        [[2. 1.]
         [0. 3.]]
    """
    _check_listed("aot_matched_ratios", policy_logps, ref_logps, listed)
    ratios = log_ratios(policy_logps, ref_logps)
    chosen, rejected = ratios[:, 0], ratios[:, 1]
    return jnp.stack([_of_same_rank(chosen, rejected, listed), _of_same_rank(rejected, chosen, listed)], axis=1)


def aot_unpaired(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    matched_ratios: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    label_smoothing: float | Float[Array, ""] = 0.0,
) -> Float[Array, " B"]:
    """Alignment via optimal transport, unpaired: the chosen log-ratios shall dominate the rejected, rank by rank.

    `L = 1/2 [f(rho_w - m_0) + f(m_1 - rho_l)]`, `f(x) = -(1 - eps) log sigmoid(beta x) - eps log sigmoid(-beta x)`,
    with `rho = policy_logps - ref_logps`, `m_0` the rejected log-ratio of the rank of `rho_w` and `m_1` the chosen one
    of the rank of `rho_l`, both in the whole batch.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        matched_ratios: `[B, 2]`, m_0 and m_1 in nats, from `aot_matched_ratios` over the whole batch, of which this
            call may see a part. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        label_smoothing: eps, the probability that a label is wrong, from 0 to 1/2.

    Returns:
        `[B]` losses in nats, at least 0; log 2 where the policy equals the reference. Every matched couple is seen from
        both of its ends, at half of its value each, so that the sum over the batch is the transport cost. The gradient
        is *not* halved: each end has the whole one, since the other end's share is stopped there. The gradient of the
        sum is thus that of the sorted batch.

    Raises:
        ValueError: a shape is not `[B, 2]`, `beta` is a plain number that is not finite and above 0, or
            `label_smoothing` is a plain number outside [0, 1/2].

    References:
        Melnyk et al., arXiv 2406.05882, the unpaired form.

    Notes:
        TRL's `aot_unpaired` and EasyDeL's `aot_pair`, which sort the batch of one device. A batch of one pair is `dpo`.

    Examples:
        Log-ratios 3 and 0, matched with 2 and 1: f(1) = log(1 + exp(-0.1)) = 0.6444 at both ends.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, matched = jnp.array([[3.0, 0.0]]), jnp.array([[2.0, 1.0]])
        >>> print(np.asarray(losses.aot_unpaired(policy, jnp.zeros((1, 2)), matched, beta=0.1)).round(4))
        [0.6444]
    """
    check_pairs("aot_unpaired", policy_logps=policy_logps, ref_logps=ref_logps, matched_ratios=matched_ratios)
    _check_numbers("aot_unpaired", beta, label_smoothing)
    ratios, matched = log_ratios(policy_logps, ref_logps), jax.lax.stop_gradient(as_float(matched_ratios))
    chosen = _smoothed(beta * (ratios[:, 0] - matched[:, 0]), label_smoothing)
    rejected = _smoothed(beta * (matched[:, 1] - ratios[:, 1]), label_smoothing)
    both = chosen + rejected
    return both - jax.lax.stop_gradient(both / 2)


def _check_listed(
    loss: str, policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], listed: Bool[Array, " B"]
) -> None:
    check_pairs(loss, policy_logps=policy_logps, ref_logps=ref_logps)
    check_shape(loss, "[B] with the B of the pairs", policy_logps.shape[:1], listed=listed)
    check_mask(loss, "listed", listed)


def _check_numbers(loss: str, beta: float | Float[Array, ""], label_smoothing: float | Float[Array, ""]) -> None:
    check_positive(loss, beta=beta)
    check_between(loss, 0.0, 0.5, label_smoothing=label_smoothing)


def _of_same_rank(
    values: Float[Array, " B"], others: Float[Array, " B"], listed: Bool[Array, " B"]
) -> Float[Array, " B"]:
    """Return, for each listed entry of `values`, the listed entry of `others` that has its rank, else 0; stopped."""
    values, others = jax.lax.stop_gradient((values, others))
    # The last key is the first to count: the entries not listed come behind, whatever they hold.
    order, other_order = (jnp.lexsort((entries, ~listed)) for entries in (values, others))
    ranks = jnp.argsort(order)
    return jnp.where(listed, others[other_order][ranks], 0.0)


def _smoothed(gaps: Float[Array, " B"], label_smoothing: float | Float[Array, ""]) -> Float[Array, " B"]:
    return (1 - label_smoothing) * jax.nn.softplus(-gaps) + label_smoothing * jax.nn.softplus(gaps)
