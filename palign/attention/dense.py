"""The tree rule as a dense mask: slow, plain, and the oracle of the tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attend_dense(
    query: Float[Array, "R T H D"],
    key: Float[Array, "R T J D"],
    value: Float[Array, "R T J D"],
    position: Int[Array, "R T"],
    group: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    window: Int[Array, ""] | int,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "R T H D"]:
    """Attention under the tree rule, by a mask over the whole row.

    Query q sees key k iff both are in the same `group` (> 0), `branch[k]` is 0 or `branch[q]`, and
    `0 <= position[q] - position[k] < window`. Each of the J key heads serves H / J query heads. Padding queries give 0.
    """
    distance = position[:, :, None] - position[:, None, :]
    allowed = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] > 0)
    allowed &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    allowed &= (distance >= 0) & (distance < window)
    groups = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    scores = jnp.einsum("rqhd,rkhd->rhqk", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    allowed = allowed[:, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
    weights = jnp.where(allowed, weights, 0.0)
    return jnp.einsum("rhqk,rkhd->rqhd", weights, value.astype(jnp.float32)).astype(query.dtype)
