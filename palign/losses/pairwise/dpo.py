"""Direct preference optimisation and the reward that it implies."""

import jax
from jaxtyping import Array, Float

from palign.losses.checks import check_pairs, check_positive, check_same_shape, log_ratios, margins


def dpo(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """Direct preference optimisation: logistic regression on the difference of log-ratios.

    `L = -log sigmoid(beta h)`, with `rho = policy_logps - ref_logps` and `h = rho_w - rho_l`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0; 0.01 to 0.5 in practice.

    Returns:
        `[B]` losses in nats, at least 0; exactly log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        arXiv 2305.18290, Eq. 7.

    Notes:
        TRL calls this `sigmoid` (default beta 0.1, learning rate 1e-6). In TRL 1.16 `label_smoothing` has no effect on
        it, whereas tunix and EasyDeL then compute conservative DPO. With length-averaged log-probabilities in place of
        sums this is TRL's `sigmoid_norm`, which needs a larger beta.

    Examples:
        The chosen response gained 2 nats over the reference and the rejected one lost 2: h = 4, beta h = 0.4, and
        log(1 + exp(-0.4)) = 0.5130. Before any training every loss is log 2 = 0.6931.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference = jnp.array([[-12.0, -12.0], [-12.0, -12.0]])
        >>> policy = jnp.array([[-10.0, -14.0], [-12.0, -12.0]])
        >>> print(np.asarray(losses.dpo(policy, reference, beta=0.1)).round(4))
        [0.513  0.6931]
    """
    check_pairs("dpo", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("dpo", beta=beta)
    return jax.nn.softplus(-beta * margins(log_ratios(policy_logps, ref_logps)))


def implicit_rewards(
    policy_logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, "*shape"]:
    """Reward of each response that a policy trained by DPO stands for, for metrics: no gradient flows through it.

    `r = beta (policy_logps - ref_logps)`, up to a term that depends on the prompt alone.

    Args:
        policy_logps: any shape, log-probabilities under the policy in nats, summed over response tokens.
        ref_logps: the same shape, under the reference.
        beta: the beta of the loss, above 0.

    Returns:
        The shape of the arguments; a higher value is better. TRL logs its means as `rewards/chosen`,
        `rewards/rejected` and `rewards/margins`.

    Raises:
        ValueError: the shapes differ, or `beta` is a plain number that is not finite and above 0.

    References:
        Rafailov et al., arXiv 2305.18290, Eq. 5 and section 4.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([-10.0, -14.0]), jnp.array([-12.0, -12.0])
        >>> print(np.asarray(losses.implicit_rewards(policy, reference, beta=0.1)).round(4))
        [ 0.2 -0.2]
    """
    check_same_shape("implicit_rewards", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("implicit_rewards", beta=beta)
    return jax.lax.stop_gradient(beta * log_ratios(policy_logps, ref_logps))
