"""The decoder-only transformer, in Linen, behind `LanguageModel`.

One `nn.scan` over stacked layers serves training, prefill and decoding; they differ in the `attend` function that the
layers are given and in what it keeps. `scan_layers=False` walks the same stacked parameters in a Python loop, for
debugging.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from palign.attention.attend import KERNELS, SAVED
from palign.attention.attend import attend as attend_blocks
from palign.attention.block_pairs import list_block_pairs
from palign.config.schema import ModelConfig
from palign.models.config import LayerTables, compute_dtype, layer_tables, padded_vocabulary
from palign.models.layers import Block, RMSNorm, make_rotation
from palign.models.protocol import Cache, LanguageModel, Params
from palign.models.value_head import add_value_head
from palign.sharding.mesh import context_size
from palign.sharding.rules import in_use
from palign.types import Batch, Unembedding

PREFILL_BLOCK = 64

_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names(SAVED)
# What a rematerialised layer keeps for its backward pass; the rest is computed again.
REMAT: dict[str, Callable] = {
    "full": _policies.nothing_saveable,
    "attention": _attention,
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _attention),
}


class TreeContext(NamedTuple):
    """Where every token stands in its tree."""

    position: Any  # [R, T]
    group: Any
    branch: Any
    block_pairs: Any  # [R, N, 2]


class DecodeContext(NamedTuple):
    """Where the next token of every sample stands."""

    position: Any  # [B, K]
    prompt_length: Any  # [B]
    step: Any  # []


def attend_nothing(q, k, v, window, cache, context, *, scale, softcap):
    """Initialisation: parameters follow from shapes alone, and its one row cannot be cut over a mesh's devices."""
    return q, None


def attend_tree(kernel, q, k, v, window, cache, context, *, scale, softcap):
    """Training: nothing is kept."""
    return attend_blocks(q, k, v, *context, window, scale=scale, softcap=softcap, kernel=kernel), None


def attend_prefill(q, k, v, window, cache, context, *, scale, softcap):
    """The prompts: keys and values are kept."""
    return attend_blocks(q, k, v, *context, window, scale=scale, softcap=softcap), (k, v)


def attend_decode(q, k, v, window, cache, context, *, scale, softcap):
    """One token of each of K samples: sees its prompt's cache, which the samples share, its own, and itself."""
    prompt_key, prompt_value, key, value = cache
    B, K, H, E = q.shape
    q = q.reshape(B, K, k.shape[2], -1, E)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    of_prompt, of_own = product("bkjge,bjpe->bkjgp", q, prompt_key), product("bkjge,bkjne->bkjgn", q, key)
    scores = scale * jnp.concatenate([of_prompt, of_own, product("bkjge,bkje->bkjg", q, k)[..., None]], axis=-1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    P, N = prompt_key.shape[2], key.shape[3]
    slot, now = jnp.arange(P)[None], context.prompt_length[:, None] + context.step
    prompt_seen = (slot < context.prompt_length[:, None]) & (now - slot < window)  # [B, P]
    ago = context.step - jnp.arange(N)
    own_seen = jnp.append((ago > 0) & (ago < window), True)
    seen = jnp.concatenate([prompt_seen, jnp.broadcast_to(own_seen[None], (B, N + 1))], axis=-1)[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(q.dtype)
    to_prompt, to_own, to_itself = jnp.split(weights, (P, P + N), axis=-1)
    out = product("bkjgp,bjpe->bkjge", to_prompt, prompt_value) + product("bkjgn,bkjne->bkjge", to_own, value)
    out = out + to_itself * v[:, :, :, None]
    return out.reshape(B, K, H, E).astype(q.dtype), (k, v)


class Transformer(nn.Module):
    """Embedding, layers, final norm: tokens to hidden states."""

    config: ModelConfig
    dtype: Any
    attend: Callable

    @nn.compact
    def __call__(self, token_RT, context, cache):
        """Returns hidden states `[R, T, D]` and what the layers keep, stacked over layers."""
        c = self.config
        param_dtype = jnp.dtype(c.param_dtype)
        vocabulary = padded_vocabulary(c)
        embedding = self.param("embedding", nn.initializers.normal(0.02), (vocabulary, c.dim), param_dtype)
        if not c.tie_embedding:
            self.param("unembedding", nn.initializers.normal(0.02), (c.dim, vocabulary), param_dtype)
        x = in_use(in_use(embedding, "vd", self.dtype)[token_RT], "rtd")
        x = x * jnp.asarray(c.embedding_scale, self.dtype)
        tables, frequencies = layer_tables(c)
        tables, rotations = jax.tree.map(jnp.asarray, tables), make_rotation(context.position, frequencies)
        block = Block
        if c.remat != "none":
            # The scan is one while loop: XLA cannot merge the recomputation with the forward pass: CSE is no danger.
            block = nn.remat(Block, prevent_cse=not c.scan_layers, policy=REMAT[c.remat])
        if c.scan_layers or self.is_initializing():
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast),
                length=c.num_layers,
            )
            x, kept = layers(c, self.dtype, self.attend, name="layers")(x, tables, cache, context, rotations)
        else:
            x, kept = self._unrolled(block, x, tables, cache, context, rotations)
        return RMSNorm(c, name="final_norm")(x), kept

    def _unrolled(self, block, x, tables, cache, context, rotations):
        stacked = self.get_variable("params", "layers")
        layer = block(self.config, self.dtype, self.attend, parent=None)
        kept = []
        for i in range(self.config.num_layers):
            params, table, layer_cache = jax.tree.map(lambda leaf, i=i: leaf[i], (stacked, tables, cache))
            x, kept_here = layer.apply({"params": params}, x, table, layer_cache, context, rotations)
            kept.append(kept_here)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


def make_language_model(config: ModelConfig, attention: str = "xla") -> LanguageModel:
    """Builds the transformer that `config` describes, as pure functions.

    Equal arguments give the same functions, so what was compiled for one model serves another of its shape.

    Args:
        config: the architecture.
        attention: the form that attends over rows, a name in `palign.attention.attend.KERNELS`; prompts to sample from
            are always read in the plain one.

    Raises:
        ValueError: the config's sizes do not fit together (checked by `ModelConfig`), or `vocab_size` is not set.
    """
    return _make_language_model(config, attention)


@functools.cache
def _make_language_model(config, attention):
    if config.vocab_size < 1:
        raise ValueError("config.model.vocab_size: must be set, to the tokenizer's vocabulary size")
    dtype, attend_rows = compute_dtype(config), functools.partial(attend_tree, KERNELS[attention])

    def run(params: Params, token, context, cache, attend):
        return Transformer(config, dtype, attend).apply({"params": params}, token, context, cache)

    def init(key: jax.Array) -> Params:
        ids = jnp.zeros((1, 2), jnp.int32)
        context = TreeContext(ids, ids + 1, ids, jnp.zeros((1, 1, 2), jnp.int32))
        return Transformer(config, dtype, attend_nothing).init(key, ids, context, None)["params"]

    def hidden(params: Params, batch: Batch) -> jax.Array:
        context = TreeContext(batch.position, batch.group, batch.branch, batch.block_pairs)
        return run(params, batch.token, context, None, attend_rows)[0]

    def unembed(params: Params) -> Unembedding:
        if config.tie_embedding:
            kernel = in_use(params["embedding"], "vd", dtype).T
        else:
            kernel = in_use(params["unembedding"], "dv", dtype)
        return Unembedding(kernel, config.final_softcap, config.vocab_size)

    prefill = functools.partial(_prefill, config, run)
    lm = LanguageModel(
        init, hidden, unembed, prefill, functools.partial(_decode_step, run), settings=f"{config} {dtype}"
    )
    return add_value_head(lm, config.value_head, config.dim) if config.value_head else lm


def _prefill(config, run, params, token, length, *, samples, capacity):
    B, P = token.shape
    multiple = PREFILL_BLOCK * context_size()  # devices that share a row have whole blocks
    padded = -(-P // multiple) * multiple
    token = jnp.pad(token, ((0, 0), (0, padded - P)))
    place = np.arange(padded, dtype=np.int32)
    causal = list_block_pairs(np.ones_like(place), np.zeros_like(place), place, PREFILL_BLOCK)
    position = jnp.broadcast_to(place, token.shape)
    group = (position < length[:, None]).astype(jnp.int32)
    pairs = jnp.broadcast_to(causal, (B, *causal.shape))
    x, (key, value) = run(params, token, TreeContext(position, group, group * 0, pairs), None, attend_prefill)
    last = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]
    key, value = (jnp.swapaxes(x[:, :, :P], 2, 3) for x in (key, value))
    empty = jnp.zeros((config.num_layers, B, samples, key.shape[2], capacity, key.shape[-1]), key.dtype)
    return last, Cache(key, value, length, empty, empty, jnp.zeros((), jnp.int32))


def _decode_step(run, params, cache, token):
    position = jnp.broadcast_to((cache.prompt_length + cache.step)[:, None], token.shape)
    context = DecodeContext(position, cache.prompt_length, cache.step)
    layers = (cache.prompt_key, cache.prompt_value, cache.key, cache.value)
    x, (key, value) = run(params, token, context, layers, attend_decode)

    def grow(kept, new):  # outside the scan over layers, which would copy all that is kept at every token
        return jax.lax.dynamic_update_slice_in_dim(kept, new[..., None, :].astype(kept.dtype), cache.step, axis=-2)

    return x, cache._replace(key=grow(cache.key, key), value=grow(cache.value, value), step=cache.step + 1)


__all__ = ["LayerTables", "Transformer", "make_language_model"]
