"""DPO under other divergences than the reverse KL: the derivative of f takes the place of the log-ratio.

With `u = exp(rho)` the ratio of policy to reference, the reverse KL has `f'(u) = log u + 1`, which is `dpo`. Only
losses of a difference of two responses to one prompt may be changed in this way: the multiplier of the normalisation
then cancels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import check_between, check_pairs, check_positive, log_ratios, margins

# exp overflows float32 at 88.7. What is left between the two is room for beta, 1 / alpha and sums over a batch.
_LARGEST_EXPONENT = 80.0


def f_dpo_forward_kl(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """DPO under the forward KL divergence: a response that the policy drops is felt exponentially.

    `L = -log sigmoid(beta (exp(-rho_l) - exp(-rho_w)))`, with `rho = policy_logps - ref_logps`; the score of a response
    is `f'(u) = 1 - 1/u = 1 - exp(-rho)`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, above 0.

    Returns:
        `[B]` losses in nats, at least 0; exactly log 2 where the policy equals the reference. The exponents -rho are
        clamped at 80, beyond which float32 would soon overflow: a response that lost more than 80 nats gets no
        gradient.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Wang et al., "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
        Constraints", arXiv 2309.16240.

    Notes:
        TRL has it as `f_divergence_type="forward_kl"`, without the clamp: its exponentials overflow. It is
        `f_dpo_alpha` at alpha = 1. Unlike `dpo` it sees a constant added to both log-ratios.

    Examples:
        Log-ratios of 2 and -2: exp(2) - exp(-2) = 7.2537, and log(1 + exp(-0.72537)) = 0.3948.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(np.asarray(losses.f_dpo_forward_kl(policy, reference, beta=0.1)).round(4))
        [0.3948]
    """
    return _logistic("f_dpo_forward_kl", policy_logps, ref_logps, beta, lambda ratios: -_clamped_expm1(-ratios))


def f_dpo_js(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """DPO under the Jensen-Shannon divergence: a response can gain log 2 at most, and lose without bound.

    `L = -log sigmoid(beta (log sigmoid(rho_w) - log sigmoid(rho_l)))`, with `rho = policy_logps - ref_logps`; the score
    of a response is `f'(u) = log(2 u / (1 + u)) = log 2 + log sigmoid(rho)`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, above 0.

    Returns:
        `[B]` losses in nats, at least 0; exactly log 2 where the policy equals the reference, with half of the gradient
        of `dpo`.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Wang et al., arXiv 2309.16240.

    Notes:
        TRL has it as `f_divergence_type="js_divergence"`.

    Examples:
        Log-ratios of 2 and -2: log sigmoid(2) - log sigmoid(-2) = -0.1269 + 2.1269 = 2, half of the 4 that `dpo` sees,
        and log(1 + exp(-0.2)) = 0.5981.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(np.asarray(losses.f_dpo_js(policy, reference, beta=0.1)).round(4))
        [0.5981]
    """
    return _logistic("f_dpo_js", policy_logps, ref_logps, beta, lambda ratios: -jax.nn.softplus(-ratios))


def f_dpo_alpha(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    alpha: float | Float[Array, ""] = 0.5,
) -> Float[Array, " B"]:
    """DPO under an alpha-divergence: the family between the reverse KL (`dpo`) and the forward KL.

    `L = -log sigmoid(beta (s_w - s_l))`, `s = f'(u) = (1 - u^-alpha) / alpha = (1 - exp(-alpha rho)) / alpha`, with
    `rho = policy_logps - ref_logps`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, above 0.
        alpha: between 0, which is `dpo`, and 1, which is `f_dpo_forward_kl`; both ends may be given, or traced.

    Returns:
        `[B]` losses in nats, at least 0; exactly log 2 where the policy equals the reference, with the gradient of
        `dpo` there for every alpha. The exponents -alpha rho are clamped at 80, beyond which float32 would soon
        overflow: a response that lost more than 80 / alpha nats gets no gradient.

    Raises:
        ValueError: a shape is not `[B, 2]`, `beta` is a plain number that is not finite and above 0, or `alpha` is a
            plain number outside [0, 1].

    References:
        Wang et al., arXiv 2309.16240.

    Notes:
        This is the paper's alpha, and that of its authors' code. TRL's `f_alpha_divergence_coef` is 1 - alpha: the two
        agree at 1/2 only.

    Examples:
        Log-ratios of 2 and -2: (1 - exp(-1)) / 0.5 = 1.2642 and (1 - exp(1)) / 0.5 = -3.4366, a difference of 4.7008,
        and log(1 + exp(-0.47008)) = 0.4855.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -12.0]]), jnp.array([[-10.0, -14.0]])
        >>> print(np.asarray(losses.f_dpo_alpha(policy, reference, beta=0.1, alpha=0.5)).round(4))
        [0.4855]
    """
    check_between("f_dpo_alpha", 0.0, 1.0, alpha=alpha)
    return _logistic("f_dpo_alpha", policy_logps, ref_logps, beta, lambda ratios: _alpha_scores(ratios, alpha))


def _logistic(
    loss: str,
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    beta: float | Float[Array, ""],
    scores: Callable[[Float[Array, "B 2"]], Float[Array, "B 2"]],
) -> Float[Array, " B"]:
    """Return `-log sigmoid(beta (s_w - s_l))` with the scores s of the log-ratios."""
    check_pairs(loss, policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive(loss, beta=beta)
    return jax.nn.softplus(-beta * margins(scores(log_ratios(policy_logps, ref_logps))))


def _alpha_scores(ratios: Float[Array, "B 2"], alpha: float | Float[Array, ""]) -> Float[Array, "B 2"]:
    """Return `(1 - exp(-alpha rho)) / alpha`, and its limit rho where alpha is 0."""
    vanishes = jnp.abs(jnp.asarray(alpha)) < 1e-20
    divisor = jnp.where(vanishes, 1.0, alpha)
    return jnp.where(vanishes, ratios, -_clamped_expm1(-divisor * ratios) / divisor)


def _clamped_expm1(exponents: Float[Array, "B 2"]) -> Float[Array, "B 2"]:
    return jnp.expm1(jnp.minimum(exponents, _LARGEST_EXPONENT))
