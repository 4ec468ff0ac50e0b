"""Supervised fine-tuning: the negative log-likelihood."""

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
