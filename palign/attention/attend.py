"""Attention over packed trees by block pairs, each device its own rows, its piece of them, and its heads.

Where rows are cut, each device has the queries of its piece and gathers the keys and values of its rows; their
gradients are added up over the pieces. Once for a layer's forward pass, once for its backward pass.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from palign.attention import pallas_gpu, pallas_tpu, xla
from palign.attention.walk import Ids, Kernel, Scoring, Tokens, own_queries
from palign.sharding.mesh import (
    HEADS,
    ROWS,
    SHARED,
    context_index,
    context_size,
    gather_pieces,
    over_rows,
    scatter_pieces,
    tensor_size,
)

SAVED = "attention"  # the name by which rematerialisation may keep what the backward pass reads

KERNELS: dict[str, Kernel] = {
    "xla": xla.kernel(),
    "pallas_tpu": pallas_tpu.kernel(),
    "pallas_gpu": pallas_gpu.kernel(),
}


def attend(
    query: Float[Array, "R T H D"],
    key: Float[Array, "R T J D"],
    value: Float[Array, "R T J D"],
    position: Int[Array, "R T"],
    group: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    block_pairs: Int[Array, "R N 2"],
    window: Int[Array, ""] | int,
    *,
    scale: float,
    softcap: float | None = None,
    kernel: Kernel = KERNELS["xla"],
) -> Float[Array, "R T H D"]:
    """Attention under the tree rule, visiting only the listed block pairs.

    Query q sees key k iff both are in the same `group` (> 0), `branch[k]` is 0 or `branch[q]`, and
    `0 <= position[q] - position[k] < window`. Equal to `attention.dense.attend_dense` in value and gradient when the
    list holds every pair of blocks that the rule touches (`attention.block_pairs.list_block_pairs`).

    Args:
        query: H heads; scores are `scale * query . key`.
        key: J key heads, J divides H.
        value: like `key`.
        position: a token's position in its branch.
        group: the prompt copy it belongs to; 0 is padding, whose output is 0.
        branch: 0 for prompt tokens, k for response k.
        block_pairs: sorted by query block, padding last as (last block, -1); N is the causal bound n (n + 1) / 2,
            from which the block size T / n follows.
        window: how far back a query sees, in positions; may be traced (a layer's own).
        scale: what scores are multiplied by.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        kernel: the form that computes it; the plain XLA one runs everywhere.

    Returns:
        The attended values in `query`'s dtype; sums are accumulated in float32.

    Raises:
        ValueError: the list's length is no causal bound, the kernel does not take blocks or heads of these sizes, or
            the mesh cuts rows into pieces that are no whole blocks.
    """
    ids = Ids(position, group, branch)
    tokens = Tokens(ids, ids, block_pairs)
    static = (kernel, Scoring(scale, softcap))
    key, value = spread_key_heads(key), spread_key_heads(value)
    return _attend(static, query, key, value, tokens, jnp.asarray(window, jnp.int32))


def spread_key_heads(x: Float[Array, "R T J D"]) -> Float[Array, "R T J2 D"]:
    """Repeats key heads until the tensor axis divides them: a device then has those that its query heads read."""
    heads = x.shape[2]
    copies = math.lcm(heads, tensor_size()) // heads
    return jnp.repeat(x, copies, axis=2) if copies > 1 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query, key, value, tokens, window):
    return _attend_forward(static, query, key, value, tokens, window)[0]


def _attend_forward(static, query, key, value, tokens, window):
    kernel, scoring = static
    run = over_rows(functools.partial(_forward_piece, kernel, scoring), (*(HEADS,) * 3, ROWS, SHARED), HEADS)
    output, lse = checkpoint_name(run(query, key, value, tokens, window), SAVED)
    return output, (query, key, value, tokens, window, output, lse)


def _attend_backward(static, saved, cotangent):
    kernel, scoring = static
    specs = (*(HEADS,) * 3, ROWS, SHARED, *(HEADS,) * 3)
    run = over_rows(functools.partial(_backward_piece, kernel, scoring), specs, HEADS)
    return (*run(*saved, cotangent), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward_piece(kernel, scoring, query, key, value, tokens, window):
    tokens = own_queries(tokens, context_index(), context_size())
    return kernel.forward(scoring, query, gather_pieces(key), gather_pieces(value), tokens, window)


def _backward_piece(kernel, scoring, query, key, value, tokens, *saved):
    tokens = own_queries(tokens, context_index(), context_size())
    dquery, dkey, dvalue = kernel.backward(scoring, query, gather_pieces(key), gather_pieces(value), tokens, *saved)
    return dquery, scatter_pieces(dkey), scatter_pieces(dvalue)
