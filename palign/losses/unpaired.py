"""Losses on single responses marked desirable or undesirable: no pairs are needed.

Sequence log-probabilities are `[B]`, one response per row. What belongs to the whole batch, KTO's KL and BCO's shift,
is a scalar argument: compute it once over the global batch, and any split into micro-batches gives the same losses.
"""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from palign.losses.checks import (
    as_float,
    check_mask,
    check_pairs,
    check_positive,
    check_same_shape,
    check_scalars,
    check_shape,
    log_ratios,
)


class BcoShift(NamedTuple):
    """Moving averages of the rewards of desirable (index 0) and undesirable (index 1) responses.

    `weights` are what the averages rest on: 0 where a class was never seen, towards 1 with every step that has some.
    """

    means: Float[Array, " 2"]
    weights: Float[Array, " 2"]


def kto_kl(
    policy_logps: Float[Array, " B"], ref_logps: Float[Array, " B"], listed: Bool[Array, " B"]
) -> Float[Array, ""]:
    """KTO's reference point: an estimate of how far the policy is from the reference, from mismatched responses.

    `KL = max(0, mean_listed(policy_logps - ref_logps))`. No gradient flows through it.

    Args:
        policy_logps: `[B]`, log-probabilities under the policy in nats, summed over response tokens, of *mismatched*
            responses: each prompt with the response of another prompt.
        ref_logps: `[B]`, the same under the frozen reference.
        listed: `[B]` bool, False for padding. What stands in padded slots is never read, not even NaN.

    Returns:
        A scalar in nats, at least 0; 0 where nothing is listed.

    Raises:
        ValueError: shapes are not the same `[B]`, or `listed` is not boolean.

    References:
        Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, section 4.

    Notes:
        Give it the whole batch: the clamp comes after the mean, so a mean of clamped micro-batch values is another
        number. Mismatch by rotating the responses by one place, over at least two prompts. Reversing them leaves the
        middle one of an odd batch with its own prompt (TRL #1911). EasyDeL rotates the whole batch for the reference
        but each micro-batch for the policy, which subtracts log-probabilities of different responses.

    Examples:
        Log-ratios of 3 and -1 have the mean 1; the third is padding. A negative mean is cut at 0.

        >>> import jax.numpy as jnp
        >>> from palign import losses
        >>> policy, listed = jnp.array([-9.0, -13.0, 0.0]), jnp.array([True, True, False])
        >>> print(losses.kto_kl(policy, jnp.full(3, -12.0), listed))
        1.0
        >>> print(losses.kto_kl(policy, jnp.full(3, -10.0), listed))
        0.0
    """
    _check_examples("kto_kl", "listed", listed, policy_logps=policy_logps, ref_logps=ref_logps)
    ratios = jnp.where(listed, jax.lax.stop_gradient(log_ratios(policy_logps, ref_logps)), 0.0)
    return jnp.maximum(ratios.sum() / jnp.maximum(listed.sum(), 1).astype(ratios.dtype), 0.0)


def kto(
    policy_logps: Float[Array, " B"],
    ref_logps: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    kl: Float[Array, ""],
    *,
    beta: float | Float[Array, ""] = 0.1,
    desirable_weight: float | Float[Array, ""] = 1.0,
    undesirable_weight: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """Kahneman-Tversky optimisation: gains and losses against a reference point, both of which level off.

    `L = lambda_D (1 - sigmoid(beta (rho - KL)))` for a desirable response, `lambda_U (1 - sigmoid(beta (KL - rho)))`
    for an undesirable one, with `rho = policy_logps - ref_logps`.

    Args:
        policy_logps: `[B]`, log-probabilities of the responses under the policy, in nats, summed over response tokens.
        ref_logps: `[B]`, the same under the frozen reference. Receives no gradient.
        desirable: `[B]` bool, True where the response is wanted.
        kl: scalar in nats, the reference point of the whole batch (`kto_kl`). Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        desirable_weight: lambda_D, above 0.
        undesirable_weight: lambda_U, above 0. With n_D and n_U responses of each kind the authors advise weights that
            put (lambda_D n_D) / (lambda_U n_U) between 1 and 4/3.

    Returns:
        `[B]` losses between 0 and the weight; half the weight where policy and reference are equal and KL = 0.

    Raises:
        ValueError: shapes are not the same `[B]`, `kl` is not a scalar, `desirable` is not boolean, or a
            hyper-parameter is a plain number that is not finite and above 0.

    References:
        Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, section 4.

    Notes:
        TRL has it as `loss_type="kto"` of its KTO trainer, HALOs is the authors' code. A loss of the name `kto` in
        EasyDeL's *DPO* trainer is sigmoid DPO; its KTO trainer has the real one.

    Examples:
        Both responses gained 2 nats and KL = 1: beta (rho - KL) = 0.1 and sigmoid(0.1) = 0.525. The desirable one costs
        1 - 0.525, the undesirable one 0.525.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([-10.0, -10.0]), jnp.array([-12.0, -12.0])
        >>> desirable = jnp.array([True, False])
        >>> print(np.asarray(losses.kto(policy, reference, desirable, jnp.float32(1.0), beta=0.1)).round(4))
        [0.475 0.525]
    """
    _check_examples("kto", "desirable", desirable, policy_logps=policy_logps, ref_logps=ref_logps)
    check_scalars("kto", kl=kl)
    check_positive("kto", beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    gains = beta * (log_ratios(policy_logps, ref_logps) - jax.lax.stop_gradient(as_float(kl)))
    losses = jax.nn.sigmoid(-_towards(desirable, gains))
    return jnp.where(desirable, desirable_weight * losses, undesirable_weight * losses)


def apo_zero_unpaired(
    policy_logps: Float[Array, " B"],
    ref_logps: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    *,
    beta: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """Anchored preference optimisation (zero) on single responses: KTO with its reference point at 0.

    `L = 1 - sigmoid(beta rho)` for a desirable response, `sigmoid(beta rho)` for an undesirable one, with
    `rho = policy_logps - ref_logps`.

    Args:
        policy_logps: `[B]`, log-probabilities of the responses under the policy, in nats, summed over response tokens.
        ref_logps: `[B]`, the same under the frozen reference. Receives no gradient.
        desirable: `[B]` bool, True where the response is wanted.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses between 0 and 1; 1/2 where the policy equals the reference.

    Raises:
        ValueError: shapes are not the same `[B]`, `desirable` is not boolean, or `beta` is a plain number that is not
            finite and above 0.

    References:
        D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification
        in Alignment", arXiv 2408.06266 (the two halves of APO-zero).

    Notes:
        TRL and EasyDeL have it under this name in their KTO trainers. It needs no second forward pass of mismatched
        responses. Summed over the two responses of a pair it is APO-zero.

    Examples:
        Both responses gained 2 nats: sigmoid(0.1 * 2) = 0.5498, and 1 - 0.5498 for the desirable one.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([-10.0, -10.0]), jnp.array([-12.0, -12.0])
        >>> desirable = jnp.array([True, False])
        >>> print(np.asarray(losses.apo_zero_unpaired(policy, reference, desirable, beta=0.1)).round(4))
        [0.4502 0.5498]
    """
    _check_examples("apo_zero_unpaired", "desirable", desirable, policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("apo_zero_unpaired", beta=beta)
    return jax.nn.sigmoid(-_towards(desirable, beta * log_ratios(policy_logps, ref_logps)))


def bco(
    policy_logps: Float[Array, " B"],
    ref_logps: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    weights: Float[Array, " B"],
    shift: Float[Array, ""],
    *,
    beta: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """Binary classifier optimisation: tell desirable from undesirable responses, with the implicit reward as the logit.

    `L = -w log sigmoid(r - delta)` for a desirable response, `-w log sigmoid(-(r - delta))` for an undesirable one,
    with `r = beta (policy_logps - ref_logps)`.

    Args:
        policy_logps: `[B]`, log-probabilities of the responses under the policy, in nats, summed over response tokens.
        ref_logps: `[B]`, the same under the frozen reference. Receives no gradient.
        desirable: `[B]` bool, True where the response is wanted.
        weights: `[B]`, importance w of each response: from `udm_weights` where the two kinds answer different prompts,
            1 where nothing is to be matched. Receives no gradient.
        shift: scalar delta in units of reward, half the sum of both kinds' mean rewards (`bco_shift`). Receives no
            gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses in nats, at least 0; `w log 2` where the policy equals the reference and the shift is 0.

    Raises:
        ValueError: shapes are not the same `[B]`, `shift` is not a scalar, `desirable` is not boolean, or `beta` is a
            plain number that is not finite and above 0.

    References:
        Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656.

    Notes:
        TRL up to 0.24 had it in a trainer of its own, with the mean over all samples so far as the shift, so that the
        more frequent kind counted more. EasyDeL has both the loss and the matching of prompts.

    Examples:
        Rewards of 0.1 * 2 = 0.2 with a shift of 0.1 leave a logit of 0.1. The desirable response costs
        log(1 + exp(-0.1)) = 0.6444, the undesirable one, of weight 2, 2 log(1 + exp(0.1)) = 1.4888.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([-10.0, -10.0]), jnp.array([-12.0, -12.0])
        >>> desirable, weights = jnp.array([True, False]), jnp.array([1.0, 2.0])
        >>> print(np.asarray(losses.bco(policy, reference, desirable, weights, jnp.float32(0.1), beta=0.1)).round(4))
        [0.6444 1.4888]
    """
    arrays = dict(policy_logps=policy_logps, ref_logps=ref_logps, weights=weights)
    _check_examples("bco", "desirable", desirable, **arrays)
    check_scalars("bco", shift=shift)
    check_positive("bco", beta=beta)
    logits = beta * log_ratios(policy_logps, ref_logps) - jax.lax.stop_gradient(as_float(shift))
    return jax.lax.stop_gradient(as_float(weights)) * jax.nn.softplus(-_towards(desirable, logits))


def bco_pair(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    shift: Float[Array, ""],
    *,
    beta: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """Binary classifier optimisation on pairs: each response against the shift, not against the other.

    `L = -log sigmoid(r_w - delta) - log sigmoid(-(r_l - delta))`, with `r = beta (policy_logps - ref_logps)`. An upper
    bound of `dpo` for every delta, tightest at `delta = (r_w + r_l) / 2`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        shift: scalar delta in units of reward, half the sum of both kinds' mean rewards (`bco_shift`). Receives no
            gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses in nats, at least 0; 2 log 2 where the policy equals the reference and the shift is 0.

    Raises:
        ValueError: a shape is not `[B, 2]`, `shift` is not a scalar, or `beta` is a plain number that is not finite and
            above 0.

    References:
        Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656.

    Notes:
        TRL 1.16's `bco_pair` has shift 0 always; earlier ones had a running mean. EasyDeL takes the mean of the local
        batch, and lets a gradient flow through it.

    Examples:
        Rewards 0.2 and -0.2 with shift 0 cost twice log(1 + exp(-0.2)) = 0.5981; DPO would cost
        log(1 + exp(-0.4)) = 0.513.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-12.0, -12.0]])
        >>> print(np.asarray(losses.bco_pair(policy, reference, jnp.float32(0.0), beta=0.1)).round(4))
        [1.1963]
    """
    check_pairs("bco_pair", policy_logps=policy_logps, ref_logps=ref_logps)
    check_scalars("bco_pair", shift=shift)
    check_positive("bco_pair", beta=beta)
    logits = beta * log_ratios(policy_logps, ref_logps) - jax.lax.stop_gradient(as_float(shift))
    return jax.nn.softplus(-logits[:, 0]) + jax.nn.softplus(logits[:, 1])


def bco_shift_start() -> BcoShift:
    """State of BCO's shift before the first step: nothing seen, both means 0.

    `means = weights = (0, 0)`. Exact for a policy that starts as the reference: all its rewards are 0.

    Args:
        (none)

    Returns:
        A state in float32, to be carried in the train state.

    References:
        Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656.

    Examples:
        >>> from palign import losses
        >>> print(losses.bco_shift(losses.bco_shift_start()))
        0.0
    """
    return BcoShift(jnp.zeros(2, jnp.float32), jnp.zeros(2, jnp.float32))


def bco_shift_update(
    state: BcoShift,
    reward_sums: Float[Array, " 2"],
    counts: Float[Array, " 2"] | Int[Array, " 2"],
    *,
    decay: float | Float[Array, ""] = 0.9,
) -> BcoShift:
    """Fold one step's rewards into the exponential moving averages of BCO's shift.

    `weight' = decay weight + (1 - decay)` and `mean' = mean + (1 - decay) / weight' (reward_sum / count - mean)` for
    each kind that the step has: the moving average of the steps' means, divided by the sum of its coefficients, so that
    the zeros at the start have no part in it. A kind absent from the step keeps its mean and its weight.

    Args:
        state: from `bco_shift_start` or the step before.
        reward_sums: `[2]`, sums over the *global* batch of the rewards `beta (policy_logps - ref_logps)` of desirable
            (0) and undesirable (1) responses. Receives no gradient.
        counts: `[2]`, how many there were.
        decay: how much of the past is kept at each step, at least 0 and below 1. At 0 only the last step counts.

    Returns:
        The next state, of the dtype of `state`.

    Raises:
        ValueError: a shape is not `[2]`, or `decay` is a plain number outside [0, 1).

    References:
        Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656. Bias
        correction: Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, section 3.

    Notes:
        TRL up to 0.24 accumulates the mean over all samples of the run instead, without regard to their kind.

    Examples:
        Means 1 and then 2 with decay 0.9: (0.9 * 1 + 2) / 1.9 = 1.5263. The second step has no undesirable response, so
        their mean stays -0.5.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> state = losses.bco_shift_start()
        >>> state = losses.bco_shift_update(state, jnp.array([3.0, -1.0]), jnp.array([3, 2]))
        >>> state = losses.bco_shift_update(state, jnp.array([4.0, 0.0]), jnp.array([2, 0]))
        >>> print(np.asarray(state.means).round(4))
        [ 1.5263 -0.5   ]
    """
    halves = dict(means=state.means, weights=state.weights, reward_sums=reward_sums, counts=counts)
    check_shape("bco_shift_update", "[2], desirable first", (2,), **halves)
    if isinstance(decay, numbers.Real) and not 0 <= decay < 1:
        raise ValueError(f"bco_shift_update: decay is {decay}; expected at least 0 and below 1")
    dtype = state.means.dtype  # the state keeps its type, or it could not be carried through a scan
    counts = as_float(counts).astype(dtype)
    sums = jax.lax.stop_gradient(as_float(reward_sums)).astype(dtype)
    weights = decay * state.weights + (1 - decay)
    means = state.means + (1 - decay) / weights * (sums / jnp.maximum(counts, 1) - state.means)
    seen = counts > 0
    return BcoShift(jnp.where(seen, means, state.means), jnp.where(seen, weights, state.weights))


def bco_shift(state: BcoShift) -> Float[Array, ""]:
    """BCO's shift: half the sum of the mean rewards of desirable and undesirable responses.

    `delta = (mean_desirable + mean_undesirable) / 2`. No gradient flows through it.

    Args:
        state: from `bco_shift_update`.

    Returns:
        A scalar in units of reward: 0 at the start, where all rewards are 0. While only one kind was ever seen, half
        that kind's mean: the other's counts as 0, what it was at the start.

    References:
        Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656.

    Examples:
        >>> import jax.numpy as jnp
        >>> from palign import losses
        >>> print(losses.bco_shift(losses.BcoShift(jnp.array([1.5, -0.5]), jnp.ones(2))))
        0.5
    """
    return jax.lax.stop_gradient(0.5 * (state.means[0] + state.means[1]))


def _towards(desirable: Bool[Array, " B"], values: Float[Array, " B"]) -> Float[Array, " B"]:
    """Return the values of desirable responses and the negated ones of undesirable responses: larger is better."""
    return jnp.where(desirable, values, -values)


def _check_examples(loss: str, mask_name: str, mask: Bool[Array, " B"], **arrays: Array) -> None:
    """Raise ValueError unless every array is `[B]` with the same B, and so is the boolean mask."""
    check_shape(loss, "[B], one number per response", (None,), **arrays)
    check_mask(loss, mask_name, mask)
    check_same_shape(loss, **arrays, **{mask_name: mask})
