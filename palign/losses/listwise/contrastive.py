"""Losses that match a softmax of the labels of a list: forward KL, reverse KL, and noise contrast.

The labels are rewards, and `temperature` is the beta of the problem whose solution they define: the target weights are
`w = softmax(labels / temperature)` over the valid responses of the list.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import check_positive
from palign.losses.listwise.lists import log_softmax, masked_inputs


def listnet(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """ListNet: cross entropy between the chances of being best after the labels and after the scores.

    `L = -sum_i w_i log softmax(s)_i`, with `w = softmax(labels / temperature)` and
    `s = beta (policy_logps - ref_logps)`, both softmaxes over the list.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, scores of the responses; higher is better, and their differences count. Receives no gradient.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0.
        temperature: in units of the labels, above 0: small puts all weight on the best response, large on all alike.

    Returns:
        `[B]` losses in nats per list, at least the entropy of w; 0, with zero gradient, for a list with no valid
        response or with one. Equal labels draw the scores together: the loss is not 0 then.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` or `temperature` is a plain
            number that is not finite and above 0.

    References:
        Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007 (its top-one form).

    Notes:
        `info_nca` is the same function. RAX's `softmax_loss` does not take the softmax of the labels unless it is its
        `label_fn`. TRL, tunix and EasyDeL have no listwise loss.

    Examples:
        Before any training every probability is 1/3, and the weights sum to 1: log 3 = 1.0986.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
        >>> print(np.asarray(losses.listnet(zeros, zeros, jnp.array([[3.0, 1.0, 2.0]]), valid)).round(4))
        [1.0986]
    """
    arrays = dict(policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    return _cross_entropy("listnet", valid, beta=beta, temperature=temperature, **arrays)


def info_nca(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """InfoNCA: DPO for explicit rewards, which tells the responses of a list apart as InfoNCE does.

    `L = -sum_i w_i log softmax(r)_i`, with `w = softmax(labels / temperature)` and
    `r = beta (policy_logps - ref_logps)`, both softmaxes over the list.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, rewards of the responses; higher is better, and their differences count. Receives no gradient.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0.
        temperature: the paper's alpha, in units of the rewards, above 0; towards 0 only the best response counts.

    Returns:
        `[B]` losses in nats per list, at least the entropy of w; 0, with zero gradient, for a list with no valid
        response or with one. Equal rewards draw the scores together: the loss is not 0 then.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` or `temperature` is a plain
            number that is not finite and above 0.

    References:
        Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369,
        section 3.

    Notes:
        The same function as `listnet`, found from another side. With two responses whose labels are far apart it is
        `dpo`. The authors' code adds 0.01 to the best score before the softmax. TRL, tunix and EasyDeL have no listwise
        loss.

    Examples:
        Rewards log 3 and 0 give the weights 3/4 and 1/4; the policy gained 10 nats on the better response, so r is
        (1, 0): 3/4 log(1 + exp(-1)) + 1/4 log(1 + exp(1)) = 0.5633.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, rewards = jnp.array([[10.0, 0.0]]), jnp.log(jnp.array([[3.0, 1.0]]))
        >>> print(np.asarray(losses.info_nca(policy, jnp.zeros((1, 2)), rewards, jnp.ones((1, 2), bool))).round(4))
        [0.5633]
    """
    arrays = dict(policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    return _cross_entropy("info_nca", valid, beta=beta, temperature=temperature, **arrays)


def nca(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """NCA: noise contrast on every response by itself, so that the likelihood of good ones need not fall.

    `L = -sum_i [ w_i log sigmoid(r_i) + (1 / K) log sigmoid(-r_i) ]`, with `w = softmax(labels / temperature)` over
    the list, `r = beta (policy_logps - ref_logps)` and K the number of valid responses.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, rewards of the responses; higher is better, and their differences count. Receives no gradient.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: strength of the tie to the reference, per nat, above 0.
        temperature: the paper's alpha, in units of the rewards, above 0; towards 0 only the best response counts.

    Returns:
        `[B]` losses in nats per list, above 0; 2 log 2 where the policy equals the reference. Only a list with no valid
        response has 0, with zero gradient: one response alone, or equal rewards, draw r to 0.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` or `temperature` is a plain
            number that is not finite and above 0.

    References:
        Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369,
        section 4.

    Notes:
        Absolute, not relative: a constant added to the log-ratios of a list changes it. With two responses whose
        labels are far apart it is `nca_pair`, the only form that TRL and EasyDeL have. The authors' code adds 0.01 to
        the best score before the softmax.

    Examples:
        Before any training each response costs (w_i + 1/K) log 2, together 2 log 2 = 1.3863.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, valid = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
        >>> print(np.asarray(losses.nca(zeros, zeros, jnp.array([[3.0, 1.0, 2.0]]), valid)).round(4))
        [1.3863]
    """
    ratios, labels = masked_inputs("nca", valid, policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    check_positive("nca", beta=beta, temperature=temperature)
    rewards = beta * ratios
    weights = jnp.exp(log_softmax(labels, valid, scale=1 / temperature))
    share = 1 / jnp.maximum(valid.sum(-1, keepdims=True), 1).astype(rewards.dtype)
    terms = weights * jax.nn.softplus(-rewards) + share * jax.nn.softplus(rewards)
    return jnp.where(valid, terms, 0.0).sum(-1)


def exo(
    policy_logps: Float[Array, "B K"],
    ref_logps: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """Efficient exact optimisation: reverse KL from the policy's softmax over the list to the rewards' one.

    `L = sum_i p_i (log p_i - log w_i)`, with `p = softmax(s)`, `s = beta (policy_logps - ref_logps)` and
    `w = softmax(labels / temperature)`, both softmaxes over the list.

    Args:
        policy_logps: `[B, K]`, log-probabilities of the responses under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, K]`, the same under the frozen reference. Receives no gradient.
        labels: `[B, K]`, rewards of the responses; higher is better, and their differences count. Receives no gradient.
        valid: `[B, K]` bool, False for padding. What stands in padded slots is never read, not even NaN.
        beta: the paper's beta of the policy, per nat, above 0.
        temperature: the paper's beta of the reward, in units of the rewards, above 0. Small makes wrong responses very
            dear: their cost grows like 1 / temperature.

    Returns:
        `[B]` losses in nats per list, at least 0 up to rounding; 0, with zero gradient, for a list with no valid
        response or with one. Equal rewards draw the scores together: the loss is 0 only once they are equal.

    Raises:
        ValueError: shapes are not the same `[B, K]`, `valid` is not boolean, or `beta` or `temperature` is a plain
            number that is not finite and above 0.

    References:
        Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment", arXiv 2402.00856.

    Notes:
        `info_nca` is the forward KL between the same two distributions, up to the entropy of w. With two responses
        whose labels are log(1 - epsilon) and log(epsilon), at temperature 1, it is `exo_pair`, the only form that TRL
        and EasyDeL have; the authors' code for pairs has 0 and -10 there, which are not normalised.

    Examples:
        Rewards log 3 and 0 give the weights 3/4 and 1/4, and before any training p is 1/2 and 1/2:
        1/2 log 2/3 + 1/2 log 2 = 0.1438.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> zeros, rewards = jnp.zeros((1, 2)), jnp.log(jnp.array([[3.0, 1.0]]))
        >>> print(np.asarray(losses.exo(zeros, zeros, rewards, jnp.ones((1, 2), bool))).round(4))
        [0.1438]
    """
    ratios, labels = masked_inputs("exo", valid, policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    check_positive("exo", beta=beta, temperature=temperature)
    policy, target = log_softmax(ratios, valid, scale=beta), log_softmax(labels, valid, scale=1 / temperature)
    # Padding holds 0 in both: its term is 0.
    return (jnp.exp(policy) * (policy - target)).sum(-1)


def _cross_entropy(
    loss: str,
    valid: Bool[Array, "B K"],
    *,
    beta: float | Float[Array, ""],
    temperature: float | Float[Array, ""],
    **arrays: Array,
) -> Float[Array, " B"]:
    """Return the cross entropy from the softmax of the labels to that of the scores."""
    ratios, labels = masked_inputs(loss, valid, **arrays)
    check_positive(loss, beta=beta, temperature=temperature)
    weights = jnp.exp(log_softmax(labels, valid, scale=1 / temperature))
    # The scores' log-softmax is 0 in padding, where the weights say 1.
    return -(weights * log_softmax(ratios, valid, scale=beta)).sum(-1)
