"""Plackett-Luce: the likelihood of a whole ranking, one place after the other.

All pairs of a list are compared, `[B, K, K]`: K is small, no sort is needed, and padding is just a mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import check_positive
from palign.losses.listwise.lists import differences, masked_inputs, preferred


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
    ratios, labels = masked_inputs(
        "plackett_luce", valid, policy_logps=policy_logps, ref_logps=ref_logps, labels=labels
    )
    check_positive("plackett_luce", beta=beta)
    if top is not None and top < 1:
        raise ValueError(f"plackett_luce: top is {top}; expected None (the whole ranking) or at least 1")
    both = valid[:, :, None] & valid[:, None, :]
    fitted = preferred(labels, valid).any(-1)
    if top is not None:
        fitted &= preferred(labels, valid).sum(-2) < top  # how many are better
    rivals = both & (labels[:, :, None] >= labels[:, None, :]) & ~jnp.eye(valid.shape[1], dtype=bool)[None]
    # log(exp(s_i) + sum_rivals exp(s_j)) - s_i as softplus(logsumexp(s_j - s_i)): exact where i wins by far, and
    # the same arithmetic as dpo for K = 2.
    gaps = -beta * differences(ratios)
    # A term that is not fitted has perhaps no rival at all: let it run over everything, finite, and drop it after.
    run_over = rivals | ~fitted[:, :, None]
    terms = jax.nn.softplus(jax.nn.logsumexp(jnp.where(run_over, gaps, -jnp.inf), axis=-1))
    return jnp.where(fitted, terms, 0.0).sum(-1)
