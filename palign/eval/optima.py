"""What preference losses should find, in closed form, for a distribution over N responses that can be listed.

Distributions are log-probabilities `[..., N]` in nats, rewards are `[..., N]`, and leading axes are prompts. The laws
by which preferences are drawn (`compare_pairs`, `compare_lists`) list every comparison with its probability, so that
the *population* value of a loss of `palign.losses` is a sum over them:

    law = compare_pairs(bradley_terry_preference(rewards), sampling_logps)
    population = (law.probability * losses.dpo(policy[law.responses], ref[law.responses], beta=beta)).sum()
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from palign.eval.enumerate import ResponseSpace, back_up
from palign.losses.checks import as_float, check_positive, check_same_shape

MOST_COMPARISONS = 1_000_000


class Optimum(NamedTuple):
    """The best policy and what it is worth."""

    logps: Float[Array, "*prompts N"]  # nats
    value: Float[Array, "*prompts"]  # expected reward less beta times the divergence from the reference


class Comparisons(NamedTuple):
    """Every comparison that may be drawn, and how often."""

    responses: np.ndarray  # [B, K] int32, different responses, the best first
    probability: Float[Array, "*prompts B"]  # sums to 1


def kl_regularised_optimum(
    ref_logps: Float[Array, "*prompts N"], rewards: Float[Array, "*prompts N"], *, beta: float | Float[Array, ""]
) -> Optimum:
    """The policy that RLHF seeks: the reference tilted by the reward.

    `pi*(y) = pi_ref(y) exp(r(y) / beta) / Z`, the maximum of `J = E_pi[r] - beta KL(pi || pi_ref)`, with
    `J* = beta log Z`. For any other policy `J* - J = beta KL(pi || pi*)`.

    Args:
        ref_logps: `[..., N]`, log-probabilities of the responses under the reference, nats.
        rewards: `[..., N]`.
        beta: strength of the KL penalty, units of reward per nat, above 0.

    Returns:
        Log-probabilities `[..., N]` and J* `[...]`.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number that is not finite and above 0.

    References:
        Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        arXiv 2305.18290, Eq. 4.

    Examples:
        From an even reference a reward that is log 3 higher makes a response three times as likely at beta = 1, and the
        optimum is worth log((3 + 1) / 2).

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.optima import kl_regularised_optimum
        >>> best = kl_regularised_optimum(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([3.0, 1.0])), beta=1.0)
        >>> print(np.exp(np.asarray(best.logps)).round(4), best.value.round(4))
        [0.75 0.25] 0.6931
    """
    check_same_shape("kl_regularised_optimum", ref_logps=ref_logps, rewards=rewards)
    check_positive("kl_regularised_optimum", beta=beta)
    scores = jax.nn.log_softmax(as_float(ref_logps), axis=-1) + as_float(rewards) / beta
    return Optimum(jax.nn.log_softmax(scores, axis=-1), beta * jax.nn.logsumexp(scores, axis=-1))


def regularised_value(
    policy_logps: Float[Array, "*prompts N"],
    ref_logps: Float[Array, "*prompts N"],
    rewards: Float[Array, "*prompts N"],
    *,
    beta: float | Float[Array, ""],
) -> Float[Array, "*prompts"]:
    """What RLHF maximises: `J = E_pi[r] - beta KL(pi || pi_ref)`, units of reward.

    Args:
        policy_logps: `[..., N]`, nats; normalised. Differentiate through a table's `response_logps`.
        ref_logps: `[..., N]`, the same under the reference.
        rewards: `[..., N]`.
        beta: strength of the KL penalty, above 0.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number that is not finite and above 0.

    References:
        Rafailov et al., arXiv 2305.18290, Eq. 3.

    Examples:
        The reference itself pays no penalty: the mean reward.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.optima import regularised_value
        >>> even = jnp.log(jnp.array([0.5, 0.5]))
        >>> print(np.asarray(regularised_value(even, even, jnp.array([3.0, 1.0]), beta=0.1)).round(4))
        2.0
    """
    check_same_shape("regularised_value", policy_logps=policy_logps, ref_logps=ref_logps, rewards=rewards)
    check_positive("regularised_value", beta=beta)
    policy = as_float(policy_logps)
    return (jnp.exp(policy) * as_float(rewards)).sum(-1) - beta * divergence(policy, ref_logps)


def divergence(
    policy_logps: Float[Array, "*prompts N"], other_logps: Float[Array, "*prompts N"]
) -> Float[Array, "*prompts"]:
    """`KL(policy || other)` over whole responses, nats, at least 0 up to rounding.

    Args:
        policy_logps: `[..., N]`, nats; normalised.
        other_logps: `[..., N]`, the same.

    Raises:
        ValueError: the shapes differ.

    Examples:
        3/4 log(3/4 / 1/2) + 1/4 log(1/4 / 1/2) = 0.1308.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.optima import divergence
        >>> print(np.asarray(divergence(jnp.log(jnp.array([0.75, 0.25])), jnp.log(jnp.array([0.5, 0.5])))).round(4))
        0.1308
    """
    check_same_shape("divergence", policy_logps=policy_logps, other_logps=other_logps)
    policy, other = as_float(policy_logps), as_float(other_logps)
    return (jnp.exp(policy) * (policy - other)).sum(-1)


def bradley_terry_preference(rewards: Float[Array, "*prompts N"]) -> Float[Array, "*prompts N N"]:
    """Probability that response i is preferred to response j: `sigmoid(r_i - r_j)`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.optima import bradley_terry_preference
        >>> print(np.asarray(bradley_terry_preference(jnp.log(jnp.array([3.0, 1.0])))).round(4))
        [[0.5  0.75]
         [0.25 0.5 ]]
    """
    rewards = as_float(rewards)
    return jax.nn.sigmoid(rewards[..., :, None] - rewards[..., None, :])


def ipo_optimum(
    ref_logps: Float[Array, "*prompts N"],
    preference: Float[Array, "*prompts N N"],
    sampling_logps: Float[Array, "*prompts N"],
    *,
    beta: float | Float[Array, ""],
) -> Float[Array, "*prompts N"]:
    """What `losses.ipo`, on sums, finds: the reference tilted by the chance to be preferred.

    `pi(y) ~ pi_ref(y) exp(p(y > mu) / beta)`, with `p(y > mu) = sum_y' mu(y') p(y > y')`.

    For a pair drawn from mu the expected loss is `(h - (p(y > y') - p(y' > y)) / (2 beta))^2` and a constant, since
    the target is 1 / (2 beta) one way round and its negative the other. Least squares of differences with weights
    mu mu' have this solution, whatever p is: no reward need exist.

    Args:
        ref_logps: `[..., N]`, nats.
        preference: `[..., N, N]`, probability that i is preferred to j; `p_ij + p_ji = 1`.
        sampling_logps: `[..., N]`, mu: by what both responses of a pair are drawn, nats.
        beta: the beta of `losses.ipo`, the paper's tau, above 0.

    Returns:
        `[..., N]` in nats. No preference takes a log-ratio of two responses more than 1 / beta nats from the
        reference's.

    Raises:
        ValueError: the shapes do not fit, or `beta` is a plain number that is not finite and above 0.

    References:
        Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036.

    Examples:
        Certain preference for the first of two equally likely responses: p(y > mu) is 3/4 and 1/4 (a response ties
        with itself), and at beta = 1/2 the log-ratio is 1, where DPO's would be infinite.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.optima import ipo_optimum
        >>> even, certain = jnp.log(jnp.array([0.5, 0.5])), jnp.array([[0.5, 1.0], [0.0, 0.5]])
        >>> logps = ipo_optimum(even, certain, even, beta=0.5)
        >>> print((logps[0] - logps[1]).round(4))
        1.0
    """
    check_same_shape("ipo_optimum", ref_logps=ref_logps, sampling_logps=sampling_logps)
    _check_preference("ipo_optimum", preference, sampling_logps)
    check_positive("ipo_optimum", beta=beta)
    chance = (as_float(preference) * jnp.exp(as_float(sampling_logps))[..., None, :]).sum(-1)
    return jax.nn.log_softmax(as_float(ref_logps) + chance / beta, axis=-1)


def compare_pairs(preference: Float[Array, "*prompts N N"], sampling_logps: Float[Array, "*prompts N"]) -> Comparisons:
    """The law of pairs: two different responses drawn from mu, judged by `preference`.

    `P(i over j) ~ mu_i mu_j p_ij`

    Args:
        preference: `[..., N, N]`, probability that i is preferred to j; `p_ij + p_ji = 1`.
        sampling_logps: `[..., N]`, mu in nats.

    Returns:
        All N (N - 1) ordered pairs: column 0 of `responses` is the chosen one.

    Raises:
        ValueError: the shapes do not fit, or there are more than a million pairs.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.optima import compare_pairs
        >>> law = compare_pairs(jnp.array([[0.5, 0.75], [0.25, 0.5]]), jnp.log(jnp.array([0.5, 0.5])))
        >>> print(law.responses.tolist(), np.asarray(law.probability).round(4))
        [[0, 1], [1, 0]] [0.75 0.25]
    """
    _check_preference("compare_pairs", preference, sampling_logps)
    pairs = _orders(sampling_logps.shape[-1], 2)
    drawn = as_float(sampling_logps)[..., pairs].sum(-1)
    judged = jnp.log(as_float(preference)[..., pairs[:, 0], pairs[:, 1]])
    return Comparisons(pairs, jax.nn.softmax(drawn + judged, axis=-1))


def compare_lists(
    rewards: Float[Array, "*prompts N"], sampling_logps: Float[Array, "*prompts N"], *, size: int
) -> Comparisons:
    """The law of rankings: `size` different responses drawn from mu, ranked by Plackett and Luce's model.

    `P(y_1 > ... > y_K) ~ prod_k mu(y_k) exp(r(y_k)) / sum_{j >= k} exp(r(y_j))`: the best is drawn from all in
    proportion to exp(r), the next from those that are left. Any two of them are then in Bradley and Terry's proportion.

    Args:
        rewards: `[..., N]`.
        sampling_logps: `[..., N]`, mu in nats.
        size: K, from 2 to N.

    Returns:
        All N! / (N - K)! ordered lists.

    Raises:
        ValueError: the shapes differ, `size` is out of range, or there are more than a million lists.

    References:
        Plackett, "The Analysis of Permutations", Applied Statistics 24 (1975).

    Examples:
        Rewards log 2, 0 and 0: the first response is ranked first in half of all lists.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.optima import compare_lists
        >>> law = compare_lists(jnp.log(jnp.array([2.0, 1.0, 1.0])), jnp.zeros(3), size=3)
        >>> print(law.responses[:2].tolist(), np.asarray(law.probability[:2]).round(4))
        [[0, 1, 2], [0, 2, 1]] [0.25 0.25]
    """
    check_same_shape("compare_lists", rewards=rewards, sampling_logps=sampling_logps)
    lists = _orders(rewards.shape[-1], size)
    scores = as_float(rewards)[..., lists]
    left = jax.lax.cumlogsumexp(scores, axis=scores.ndim - 1, reverse=True)
    drawn = as_float(sampling_logps)[..., lists].sum(-1)
    return Comparisons(lists, jax.nn.softmax(drawn + (scores - left).sum(-1), axis=-1))


def winner_logps(comparisons: Comparisons, num_responses: int) -> Float[Array, "*prompts N"]:
    """How often each response is the best of its comparison: what SFT on preferred responses finds.

    Args:
        comparisons: a law.
        num_responses: N.

    Returns:
        `[..., N]` in nats.

    References:
        Gibbs' inequality: cross entropy is least at the distribution itself.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.optima import compare_pairs, winner_logps
        >>> law = compare_pairs(jnp.array([[0.5, 0.75], [0.25, 0.5]]), jnp.log(jnp.array([0.5, 0.5])))
        >>> print(np.exp(np.asarray(winner_logps(law, 2))).round(4))
        [0.75 0.25]
    """
    probability = comparisons.probability
    won = jnp.zeros((*probability.shape[:-1], num_responses), probability.dtype)
    return jnp.log(won.at[..., comparisons.responses[:, 0]].add(probability))


def soft_values(
    space: ResponseSpace, scores: Float[Array, "*prompts S V"], *, beta: float | Float[Array, "*prompts S"] = 1.0
) -> Float[Array, "*prompts S"]:
    """What the rest of a response is worth at every state, when tokens are drawn by their scores.

    `V(s) = beta log sum_v exp(scores[s, v] + V(child(s, v)) / beta)`, 0 where a response has ended.

    Args:
        space: the responses.
        scores: `[..., S, V]` in nats, as `soft_value_teacher` takes them.
        beta: strength of the KL penalty, above 0, or `[..., S]` one for each state.

    Returns:
        `[..., S]` in units of beta.

    Raises:
        ValueError: the shape is wrong, or `beta` is a plain number that is not finite and above 0.

    References:
        Rafailov et al., "From r to Q*: Your Language Model is Secretly a Q-Function", arXiv 2404.12358, section 4.

    Examples:
        Scores that are log-probabilities are worth nothing: they sum to 1 at every state.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from palign.eval.enumerate import all_responses
        >>> from palign.eval.optima import soft_values
        >>> print(soft_values(all_responses(2, 2), jax.nn.log_softmax(jnp.zeros((2, 2))), beta=0.1))
        [0. 0.]
    """
    return back_up(space, scores, _no_ends(space, scores), beta=beta)[..., : space.num_states]


def soft_value_teacher(
    space: ResponseSpace, scores: Float[Array, "*prompts S V"], *, beta: float | Float[Array, "*prompts S"] = 1.0
) -> Float[Array, "*prompts S V"]:
    """AlignDistil's teacher with what is missing for whole responses: the value of the state that a token leads to.

    `z[s, v] = scores[s, v] + V(child(s, v)) / beta`, with V of `soft_values`.

    A teacher that is composed at each state, `softmax(w log pi_dpo + (1 - w) log pi_ref)`, is not the distribution over
    responses `pi_dpo^w pi_ref^(1 - w) / Z`, since its normaliser differs from state to state and earlier tokens choose
    the state. With the values put back it is, to rounding. It needs every continuation, so it is for tables.

    Args:
        space: the responses.
        scores: `[..., S, V]`, a teacher's logits made of *log-probabilities*, `theorem1_teacher(log_softmax(z_dpo),
            log_softmax(z_ref), ...)`. From raw logits each row would carry a constant of its own, which is without
            effect on a softmax but would be a reward for coming to that state here.
        beta: strength of the KL penalty, above 0. For the adaptive teacher `[..., S]`, beta0 / alpha of each state.
            Where it is the same everywhere it cancels.

    Returns:
        `[..., S, V]`, logits.

    Raises:
        ValueError: the shape is wrong, or `beta` is a plain number that is not finite and above 0.

    References:
        Zhang et al., "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
        arXiv 2503.02832, Theorem 1, for the teacher; the correction is the soft Bellman equation of Rafailov et al.,
        arXiv 2404.12358.

    Examples:
        At the first state token 0 ends the turn, token 1 leads to a state whose scores sum to 3: that makes it three
        times as likely.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.enumerate import all_responses
        >>> from palign.eval.optima import soft_value_teacher
        >>> scores = jnp.log(jnp.array([[0.5, 0.5], [1.0, 2.0]]))
        >>> print(np.asarray(jax.nn.softmax(soft_value_teacher(all_responses(2, 2), scores))).round(4))
        [[0.25   0.75  ]
         [0.3333 0.6667]]
    """
    values = back_up(space, scores, _no_ends(space, scores), beta=beta)[..., space.child]
    scores = as_float(scores)
    return scores + values / jnp.broadcast_to(beta, scores.shape[:-1])[..., None]


def _no_ends(space: ResponseSpace, scores: Float[Array, "*prompts S V"]) -> Float[Array, "*prompts N"]:
    """Values of 0 for finished responses."""
    return jnp.zeros((*jnp.shape(scores)[:-2], space.num_responses), as_float(scores).dtype)


@functools.cache
def _orders(num: int, size: int) -> np.ndarray:
    """All ordered lists of `size` different numbers below `num`, `[B, size]`."""
    if not 2 <= size <= num:
        raise ValueError(f"comparisons of {size} among {num} responses; expected from 2 to all of them")
    if math.perm(num, size) > MOST_COMPARISONS:
        raise ValueError(
            f"comparisons of {size} among {num} responses are {math.perm(num, size)}; expected at most "
            f"{MOST_COMPARISONS}. Compare fewer at once, or take a smaller response space"
        )
    return np.asarray(list(itertools.permutations(range(num), size)), np.int32)


def _check_preference(function: str, preference: Array, sampling_logps: Array) -> None:
    """Raises ValueError unless the preference has the responses of the sampling law on both of its last axes."""
    expected = (*jnp.shape(sampling_logps), *jnp.shape(sampling_logps)[-1:])
    if jnp.shape(preference) != expected:
        raise ValueError(f"{function}: preference has shape {list(jnp.shape(preference))}; expected {list(expected)}")
