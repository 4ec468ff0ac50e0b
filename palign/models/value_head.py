"""A value head on a language model: a linear map from a hidden state to one number, or to a few."""

import jax
import jax.numpy as jnp

from palign.models.protocol import LanguageModel, Params

INIT_SCALE = 0.02  # standard deviation of a new head's weights


def add_value_head(lm: LanguageModel, width: int, dim: int) -> LanguageModel:
    """The same model with `values(params, hidden [..., D]) -> [..., W]` float32, and a leaf for the head.

    Args:
        lm: a model.
        width: W, 1 for a reward.
        dim: D, the width of its hidden states.
    """

    def init(key: jax.Array) -> Params:
        return lm.init(key) | {"value_head": new_value_head(key, width, dim)}

    def values(params: Params, hidden: jax.Array) -> jax.Array:
        kernel = params["value_head"]["kernel"].astype(jnp.float32)
        return jnp.matmul(hidden.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)

    return lm._replace(init=init, values=values)


def new_value_head(key: jax.Array, width: int, dim: int) -> Params:
    """Random weights of a head."""
    return {"kernel": INIT_SCALE * jax.random.normal(jax.random.fold_in(key, 1), (dim, width), jnp.float32)}
