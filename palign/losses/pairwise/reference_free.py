"""Losses without a reference model: contrastive, by odds, and with a shaped reward."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_pairs, check_positive, check_same_shape, margins

# An average log-probability nearer to 0 than this is read as this: its log-odds, 69, and their slope, 1e30, still fit
# float32 with room for the factors of a loss.
_CERTAIN = -1e-30
# exp(80) = 5.5e34: beyond it float32 overflows as soon as the reward is scaled.
_LARGEST_EXPONENT = 80.0


def cpo(
    policy_logps: Float[Array, "B 2"],
    nll_logps: Float[Array, " B"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    alpha: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """Contrastive preference optimisation: DPO with a uniform reference, plus a supervised term on the chosen response.

    `L = -log sigmoid(beta (logp_w - logp_l)) - alpha nll_logp_w`

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        nll_logps: `[B]`, log-probability of the chosen response under the policy once more, for the supervised term:
            its mean per token (the authors' code) or its sum, `policy_logps[:, 0]` (the paper).
        beta: reward per nat, above 0.
        alpha: weight of the supervised term; without it the loss is `dpo` with a reference of zeros.

    Returns:
        `[B]` losses in nats; log 2 - alpha nll_logp_w where both responses are equally likely.

    Raises:
        ValueError: `policy_logps` is not `[B, 2]`, `nll_logps` is not `[B]`, or `beta` is a plain number that is not
            finite and above 0.

    References:
        Xu et al., "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
        Translation", arXiv 2401.08417.

    Notes:
        TRL (experimental) and EasyDeL have it with the mean over tokens in the supervised term, beta = 0.1 and
        `cpo_alpha` = 1.

    Examples:
        4 nats ahead: log(1 + exp(-0.4)) = 0.513. The chosen response has -0.5 nats per token: 0.513 + 0.5 = 1.013.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.cpo(jnp.array([[-10.0, -14.0]]), jnp.array([-0.5]), beta=0.1, alpha=1.0)).round(4))
        [1.013]
    """
    check_pairs("cpo", policy_logps=policy_logps)
    check_same_shape("cpo", **{"policy_logps[:, 0]": policy_logps[:, 0]}, nll_logps=nll_logps)
    check_positive("cpo", beta=beta)
    return jax.nn.softplus(-beta * margins(as_float(policy_logps))) - alpha * as_float(nll_logps)


def orpo(policy_logps: Float[Array, "B 2"], *, weight: float | Float[Array, ""] = 0.1) -> Float[Array, " B"]:
    """Odds-ratio preference optimisation: supervised fine-tuning with a penalty on the odds of the rejected response.

    `L = -avg_w - lambda log sigmoid(o_w - o_l)`, with lambda = `weight` and the log-odds
    `o = avg - log(1 - exp(avg))`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats *per token*: the mean over response tokens (`losses.dense.average_logps`). The odds of
            whole sequences would be their probabilities, and the penalty a difference of sums.
        weight: lambda, of the penalty.

    Returns:
        `[B]` losses in nats per token; -avg_w + lambda log 2 where both responses are equally likely per token.

    Raises:
        ValueError: the shape is not `[B, 2]`.

    References:
        Hong, Lee and Thorne, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691,
        Eq. 6 and 7.

    Notes:
        The authors' code and TRL take the supervised term over the prompt too (the authors' `disable_prompt_loss`
        turns that off); here it is the response alone. tunix feeds summed log-probabilities, with which the odds are
        lost and an empty response gives NaN. EasyDeL takes the logarithm of a sigmoid without a stable form. See
        `log_odds` for averages next to 0.

    Examples:
        Probabilities per token of 1/2 and 1/4 have odds of 1 and 1/3, so the penalty is log(1 + 1/3) = 0.2877, and
        log 2 + 0.1 * 0.2877 = 0.7219.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.orpo(jnp.log(jnp.array([[0.5, 0.25]])), weight=0.1)).round(4))
        [0.7219]
    """
    check_pairs("orpo", policy_logps=policy_logps)
    averages = as_float(policy_logps)
    return weight * jax.nn.softplus(-margins(log_odds(averages))) - averages[:, 0]


def log_odds(average_logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Log-odds of a probability given by its logarithm.

    `log(p / (1 - p)) = avg - log(1 - exp(avg))`, with `p = exp(avg)`.

    Args:
        average_logps: any shape. Log-probabilities per token in nats, at most 0.

    Returns:
        The shape of `average_logps`; 0 for p = 1/2. p = 1 has no finite odds: averages above -1e-30, such as the 0 of
        an empty or of a perfectly certain response, get the log-odds of -1e-30, which are 69.1, and no gradient.

    References:
        Hong, Lee and Thorne, arXiv 2403.07691, Eq. 4.

    Notes:
        The slope is 1 / (1 - p): finite down to -1e-30, and very large for a nearly certain response.

    Examples:
        p = 3/4 has odds of 3, and log 3 = 1.0986.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.log_odds(jnp.log(jnp.array([0.75, 0.5, 0.25])))).round(4))
        [ 1.0986  0.     -1.0986]
    """
    averages = jnp.minimum(as_float(average_logps), _CERTAIN)
    # -expm1 keeps 1 - p exact next to p = 1. Where p is tiny log(1 - p) is lost in avg anyway, so the second form of
    # log1mexp is not needed, and with it the `where` whose unused branch has a NaN gradient.
    return averages - jnp.log(-jnp.expm1(averages))


def alphapo(
    policy_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 2.0,
    gamma: float | Float[Array, ""] = 1.0,
    alpha: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """AlphaPO: SimPO with a power of the probability in place of its logarithm.

    `L = -log sigmoid(beta (r_w - r_l) - gamma)`, with `r = (1 - p^(-alpha)) / alpha` and `p = exp(avg)`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats *per token*: the mean over response tokens (`losses.dense.average_logps`).
        beta: reward scale, above 0.
        gamma: target margin in units of reward, not multiplied by beta.
        alpha: shape of the reward, of any sign: its slope in avg is p^(-alpha), so with alpha > 0 unlikely responses
            are moved more, with alpha < 0 likely ones. 0 is `simpo`.

    Returns:
        `[B]` losses in nats, at least 0; log(1 + exp(gamma)) where both responses are equally likely per token.

    Raises:
        ValueError: the shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Gupta et al., "AlphaPO: Reward Shape Matters for LLM Alignment", arXiv 2501.03884.

    Notes:
        TRL (in its experimental CPO trainer) and EasyDeL compute exp(avg)^(-alpha), where the exponential underflows,
        and divide by alpha. Where -alpha avg is above 80, and p^(-alpha) near the largest float32, the reward goes on
        as a straight line in avg: loss and gradient stay finite.

    Examples:
        Probabilities per token of 1/2 and 1/4 with alpha = 1: r = 1 - 2 = -1 and 1 - 4 = -3. 2 * (-1 + 3) - 1 = 3, and
        log(1 + exp(-3)) = 0.0486.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> averages = jnp.log(jnp.array([[0.5, 0.25]]))
        >>> print(np.asarray(losses.alphapo(averages, beta=2.0, gamma=1.0, alpha=1.0)).round(4))
        [0.0486]
    """
    check_pairs("alphapo", policy_logps=policy_logps)
    check_positive("alphapo", beta=beta)
    return jax.nn.softplus(gamma - beta * margins(_power_rewards(as_float(policy_logps), alpha)))


def _power_rewards(averages: Float[Array, "B 2"], alpha: float | Float[Array, ""]) -> Float[Array, "B 2"]:
    """Return `(1 - p^(-alpha)) / alpha` as `avg (exp(t) - 1) / t`, `t = -alpha avg`: nothing is divided by alpha."""
    t = jnp.minimum(-alpha * averages, _LARGEST_EXPONENT)
    # Around 0 the quotient by its series, so that alpha = 0 and avg = 0 have a value and a gradient. Each branch sees
    # only what it can take: the gradient of the other one would be NaN.
    near = jnp.abs(t) < 1e-3
    small, large = jnp.where(near, t, 0.0), jnp.where(near, 1.0, t)
    series = 1 + small / 2 * (1 + small / 3 * (1 + small / 4))
    return averages * jnp.where(near, series, jnp.expm1(large) / large)
