"""Self-play losses: the log-ratio of every sampled response is regressed on how it fares against the list."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import check_positive
from palign.losses.listwise.lists import masked_inputs


def sppo(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    win_rates: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 1e-3,
) -> Float[Array, " B"]:
    """Self-play preference optimisation: log-ratios regressed on win rates against the current policy.

    `L = 1/2 sum_i (rho_i - (P_i - 1/2) / beta)^2`, with `rho = policy_logps - ref_logps`.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the policy that sampled the responses, the last iteration's. Receives no
            gradient.
        win_rates: `[B, K]`, P in [0, 1]: the mean probability that the response beats one of its list. Receives no
            gradient.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: 1 / eta of the paper, per nat, above 0. Log-ratios are drawn to as much as 1 / (2 beta) nats.

    Returns:
        `[B]` losses in nats squared per list, at least 0, summed over responses; 0, with zero gradient, for a list with
        no valid response. Nothing is compared: one response alone, or equal win rates, still pull.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` is a plain number that is not
            finite and above 0.

    References:
        Wu et al., "Self-Play Preference Optimization for Language Model Alignment", arXiv 2405.00675.

    Notes:
        The half is that of the authors' code. TRL and EasyDeL have `sppo_hard` only, for pairs with P = 1 and 0, and
        TRL's is without the half. The optimum of a sure win is rho = 1 / (2 beta). Not invariant to a constant added to
        the log-ratios of a list.

    Examples:
        Before any training, win rates 3/4 and 1/4 at beta = 1/4 ask for log-ratios of 1 and -1: (1 + 1) / 2 = 1.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
        >>> print(np.asarray(losses.sppo(zeros, zeros, jnp.array([[0.75, 0.25]]), valid, beta=0.25)))
        [1.]
    """
    ratios, rates = masked_inputs("sppo", valid, policy_logps=policy_logps, ref_logps=ref_logps, win_rates=win_rates)
    check_positive("sppo", beta=beta)
    return _half_squares(ratios - (rates - 0.5) / beta, valid)


def gpo(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    scores: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 1e-3,
) -> Float[Array, " B"]:
    """General preference optimisation: log-ratios regressed on the scores of a general preference model.

    `L = 1/2 sum_i (rho_i - score_i / beta)^2`, with `rho = policy_logps - ref_logps` and `score_i` the mean over the
    list of the model's antisymmetric score of response i against each.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the policy that sampled the responses, the last iteration's. Receives no
            gradient.
        scores: `[B, K]`, mean scores against the list, of either sign, 0 for an even match: raw, not through a sigmoid.
            Receives no gradient.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: per nat and unit of score, above 0; log-ratios are drawn to score / beta nats.

    Returns:
        `[B]` losses in nats squared per list, at least 0, summed over responses; 0, with zero gradient, for a list with
        no valid response. Nothing is compared: one response alone, or equal scores, still pull.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` is a plain number that is not
            finite and above 0.

    References:
        Zhang et al., "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment",
        arXiv 2410.02197.

    Notes:
        `sppo` with the score for P - 1/2, the half included. The authors' repository has no trainer; its data scripts
        keep the best and the worst of five samples, and the formula is that of the SPPO trainer which they feed. TRL,
        tunix and EasyDeL do not have it.

    Examples:
        Before any training, scores of 1/2 and -1/2 at beta = 1/4 ask for log-ratios of 2 and -2: (4 + 4) / 2 = 4.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
        >>> print(np.asarray(losses.gpo(zeros, zeros, jnp.array([[0.5, -0.5]]), valid, beta=0.25)))
        [4.]
    """
    ratios, scores = masked_inputs("gpo", valid, policy_logps=policy_logps, ref_logps=ref_logps, scores=scores)
    check_positive("gpo", beta=beta)
    return _half_squares(ratios - scores / beta, valid)


def _half_squares(errors: Float[Array, "B K"], valid: Bool[Array, "B K"]) -> Float[Array, " B"]:
    """Return half the sum of squares over the valid responses."""
    return 0.5 * jnp.square(jnp.where(valid, errors, 0.0)).sum(-1)
