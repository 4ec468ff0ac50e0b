"""Simple preference optimisation: length-averaged log-probabilities as rewards, and no reference."""

import jax
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_pairs, check_positive, margins


def simpo(
    policy_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 2.0,
    gamma: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """Simple preference optimisation: reference-free, on log-probabilities per token, with a target margin.

    `L = -log sigmoid(beta (avg_w - avg_l) - gamma)`

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats *per token*: the mean over response tokens (`losses.dense.average_logps`). Sums would
            make the loss prefer short responses.
        beta: reward scale, above 0; 2 to 10 in the paper's recipes.
        gamma: target margin in units of reward, not multiplied by beta. The authors' recipes tune gamma / beta between
            0.1 and 0.8; the defaults have 0.5.

    Returns:
        `[B]` losses in nats, at least 0; log(1 + exp(gamma)) where both responses are equally likely per token.

    Raises:
        ValueError: the shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Meng, Xia and Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv 2405.14734,
        Eq. 6.

    Notes:
        The authors' code is configured by `gamma_beta_ratio` = gamma / beta. TRL has it as `loss_type="simpo"` of its
        experimental CPO trainer, where `simpo_gamma` (default 0.5) means this gamma and beta defaults to 0.1; there
        `cpo_alpha` must be 0, or a supervised term is added.

    Examples:
        Means of -1 and -2 nats per token: 2 * (-1 + 2) - 1 = 1, and log(1 + exp(-1)) = 0.3133.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.simpo(jnp.array([[-1.0, -2.0]]), beta=2.0, gamma=1.0)).round(4))
        [0.3133]
    """
    check_pairs("simpo", policy_logps=policy_logps)
    check_positive("simpo", beta=beta)
    return jax.nn.softplus(gamma - beta * margins(as_float(policy_logps)))
