"""What every listwise loss does before its formula, and the two shapes that they share.

Where all pairs of a list are compared, `[B, K, K]`, axis -2 (index i) is the response that a term belongs to and axis
-1 (index j) the one it is compared with.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import as_float, check_lists, log_ratios


def masked_inputs(
    loss: str, valid: Bool[Array, "B K"], policy_logps: Array, ref_logps: Array, **labels: Array
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Return log-ratios and labels with 0 in the padded slots, so that what stood there touches no gradient.

    The labels go by the name that the loss gives them. No gradient reaches them or the reference.
    """
    check_lists(loss, valid, policy_logps=policy_logps, ref_logps=ref_logps, **labels)
    ((_, values),) = labels.items()
    policy, reference, values = (jnp.where(valid, as_float(array), 0.0) for array in (policy_logps, ref_logps, values))
    return log_ratios(policy, reference), jax.lax.stop_gradient(values)


def differences(values: Float[Array, "B K"]) -> Float[Array, "B K K"]:
    """Return `values_i - values_j`."""
    return values[:, :, None] - values[:, None, :]


def preferred(labels: Float[Array, "B K"], valid: Bool[Array, "B K"]) -> Bool[Array, "B K K"]:
    """Return which pairs are of two valid responses, the first of them with the higher label."""
    return valid[:, :, None] & valid[:, None, :] & (labels[:, :, None] > labels[:, None, :])


def log_softmax(
    values: Float[Array, "B K"], valid: Bool[Array, "B K"], *, scale: float | Float[Array, ""]
) -> Float[Array, "B K"]:
    """Return log-probabilities of `softmax(scale values)` over the valid slots, and 0 in the others; scale above 0.

    A list with no valid slot has no softmax: zeros, and no gradient.
    """
    # Such a list runs over all of its slots, which hold zeros, and is dropped after: no NaN appears on the way.
    over = valid | ~valid.any(-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.max(values, axis=-1, keepdims=True, where=over, initial=-jnp.inf))
    # Differences first: what all values share is then gone before the product is rounded.
    shifted = jnp.where(over, scale * (values - top), -jnp.inf)
    return jnp.where(valid, shifted - jnp.log(jnp.exp(shifted).sum(-1, keepdims=True)), 0.0)
