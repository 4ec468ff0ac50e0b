"""Supervised fine-tuning: the negative log-likelihood, plain and weighed by the probability itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import as_float


def nll(logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Negative log-likelihood of each element.

    `nll = -log p`

    Args:
        logps: any shape. Log-probabilities under the policy in nats, at most 0: one per token (`[R, M]`, `[B, T]`), or
            one per sequence (`[B]`), summed over the response tokens.

    Returns:
        The shape of `logps`, in nats. Nothing is reduced: whether tokens or sequences weigh the same is the caller's
        choice of denominator.

    References:
        Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018), Eq. 1.

    Notes:
        TRL's SFT averages over the kept tokens of the batch, so long responses weigh more; a sequence mean weighs
        every response the same.

    Examples:
        A token of probability 1/2 costs log 2, a certain one nothing.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.nll(jnp.log(jnp.array([0.5, 0.25])))).round(4))
        [0.6931 1.3863]
    """
    return -as_float(logps)


def dft(logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Dynamic fine-tuning: the negative log-likelihood of each token, weighed by the token's own probability.

    `dft = -sg(p) log p`, where no gradient flows through sg(p). Its gradient is that of `-p`: tokens that the policy
    thinks unlikely, on which `nll` has its largest gradients in the parameters, hardly move it.

    Args:
        logps: any shape. Log-probabilities of single tokens under the policy in nats, at most 0 (`[R, M]`, `[B, T]`).
            Sums over a response would all have weights near 0.

    Returns:
        The shape of `logps`, in nats, between 0 and 1/e. Nothing is reduced.

    References:
        Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
        arXiv 2508.05629.

    Notes:
        TRL has it as `loss_type="dft"` of its SFT trainer.

    Examples:
        A token of probability 1/2 costs 1/2 log 2 = 0.3466, one of probability 1/4 as much: 1/4 log 4.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.dft(jnp.log(jnp.array([0.5, 0.25])))).round(4))
        [0.3466 0.3466]
    """
    logps = as_float(logps)
    return -jax.lax.stop_gradient(jnp.exp(logps)) * logps
