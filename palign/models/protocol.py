"""What palign asks of a language model: a few pure functions over a plain dict of parameters.

The policy, the reference and every teacher are dicts of parameters through the same functions. Anything that fills this
tuple trains: Linen sits behind it here, an NNX model needs a few lines of `split` and `merge`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from palign.types import Batch, Unembedding

Params = dict[str, Any]


class Cache(NamedTuple):
    """Keys and values of B prompts, and of the K samples that continue each; L layers, J key heads of width D."""

    prompt_key: Float[Array, "L B J P D"]
    prompt_value: Float[Array, "L B J P D"]
    prompt_length: Int[Array, " B"]
    key: Float[Array, "L B K J N D"]
    value: Float[Array, "L B K J N D"]
    step: Int[Array, ""]  # how many tokens of each sample are in the cache


class LanguageModel(NamedTuple):
    """A causal language model as pure functions.

    Attributes:
        init: `(key) -> params`.
        hidden: `(params, batch) -> [R, T, D]`, under the tree rule; padding positions hold unspecified finite values.
        unembed: `(params) -> Unembedding`.
        prefill: `(params, token [B, P], length [B], *, samples, capacity) -> (hidden [B, D], cache)`: the prompts,
            right-padded, computed once; the hidden state of each one's last token.
        decode_step: `(params, cache, token [B, K]) -> (hidden [B, K, D], cache)`: one more token of every sample.
        values: `(params, hidden [..., D]) -> [..., W]` float32 of a value head, or None.
        settings: what decides what it computes besides the parameters, for the keys of caches.
    """

    init: Callable[[jax.Array], Params]
    hidden: Callable[[Params, Batch], jax.Array]
    unembed: Callable[[Params], Unembedding]
    prefill: Callable[..., tuple[jax.Array, Cache]]
    decode_step: Callable[[Params, Cache, jax.Array], tuple[jax.Array, Cache]]
    values: Callable[[Params, jax.Array], jax.Array] | None = None
    settings: str = ""
