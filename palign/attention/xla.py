"""Attention over packed trees by block pairs, in plain XLA.

A row is cut into blocks; the host lists the (query block, key block) pairs that the tree rule touches; this module
walks the list in chunks with an online softmax and never forms a row-by-row matrix. The backward pass keeps only the
output and the log-sum-exp and walks the same list. Work follows the number of listed pairs: the rows of a device are
put into one list, padding last, and the loop's trip count is that list's length.

Array layout inside: blocks [n, J, S, D] with n = rows x blocks, J key heads, S = (H / J) x block queries or block keys.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from palign.sharding.mesh import HEADS, ROWS, SHARED, over_rows, tensor_size

NEVER = -1e30  # a score no softmax sees; finite, so that differences of two of them are 0 and not NaN


class _Static(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    softcap: float | None
    chunk: int


class _Tokens(NamedTuple):
    """The row's ids, and the pairs that the rule touches."""

    position: Array  # [R, T]
    group: Array  # [R, T]
    branch: Array  # [R, T]
    block_pairs: Array  # [R, N, 2]


class _Walk(NamedTuple):
    """One device's rows as one list of block pairs."""

    ids: Array  # [n, 3, block] position, group, branch
    pairs: Array  # [rows * N + chunk, 2] blocks counted through the rows, padding last
    num_pairs: Array  # []


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
    chunk: int = 16,
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
        chunk: block pairs per trip of the loop.

    Returns:
        The attended values in `query`'s dtype; sums are accumulated in float32.
    """
    tokens = _Tokens(position, group, branch, block_pairs)
    key, value = spread_key_heads(key), spread_key_heads(value)
    return _attend(_Static(scale, softcap, chunk), query, key, value, tokens, jnp.asarray(window, jnp.int32))


def spread_key_heads(x: Float[Array, "R T J D"]) -> Float[Array, "R T J2 D"]:
    """Repeats key heads until the tensor axis divides them: a device then has those that its query heads read."""
    heads = x.shape[2]
    copies = math.lcm(heads, tensor_size()) // heads
    return jnp.repeat(x, copies, axis=2) if copies > 1 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query, key, value, tokens, window):
    return _attend_forward(static, query, key, value, tokens, window)[0]


def _attend_forward(static, query, key, value, tokens, window):
    run = over_rows(functools.partial(_forward_rows, static), (*(HEADS,) * 3, ROWS, SHARED), HEADS)
    output, lse = run(query, key, value, tokens, window)
    return output, (query, key, value, tokens, window, output, lse)


def _attend_backward(static, saved, cotangent):
    run = over_rows(functools.partial(_backward_rows, static), (*(HEADS,) * 3, ROWS, SHARED, *(HEADS,) * 3), HEADS)
    return (*run(*saved, cotangent), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward_rows(static, query, key, value, tokens, window):
    rows, length, heads, _ = query.shape
    walk, block = _make_walk(static, tokens)
    q, k, v = (_to_blocks(x, block, key.shape[2]) for x in (query, key, value))

    def visit(i, carry):
        output, top, total = carry
        queries, keys, first, allowed = _chunk(static, walk, i, window, q.shape[2] // block)
        scores = _scores(static, q[queries], k[keys])
        scores = jnp.where(allowed, scores, NEVER)
        top_before = top[queries]
        top = top.at[queries].max(scores.max(-1))
        top_now = top[queries]
        # The list may hold a query block several times in one chunk; what was summed before is rescaled only once.
        rescale = jnp.where(first, jnp.exp(top_before - top_now), 1.0)
        weights = jnp.where(allowed, jnp.exp(scores - top_now[..., None]), 0.0)
        part = jnp.einsum("cjqk,cjkd->cjqd", weights.astype(v.dtype), v[keys], preferred_element_type=jnp.float32)
        total = total.at[queries].multiply(rescale).at[queries].add(weights.sum(-1))
        output = output.at[queries].multiply(rescale[..., None]).at[queries].add(part)
        return output, top, total

    shape = q.shape[:3]
    start = (jnp.zeros(q.shape, jnp.float32), jnp.full(shape, NEVER, jnp.float32), jnp.zeros(shape, jnp.float32))
    output, top, total = jax.lax.fori_loop(0, _trips(static, walk), visit, start)
    seen = total > 0
    output = jnp.where(seen[..., None], output / jnp.where(seen, total, 1.0)[..., None], 0.0)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), 0.0)
    return _from_blocks(output, rows, length, heads).astype(query.dtype), lse.reshape(rows, -1, *shape[1:])


def _backward_rows(static, query, key, value, tokens, window, output, lse, cotangent):
    rows, length = query.shape[:2]
    walk, block = _make_walk(static, tokens)
    q, k, v, out, dout = (_to_blocks(x, block, key.shape[2]) for x in (query, key, value, output, cotangent))
    lse = lse.reshape(q.shape[:3])
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)

    def visit(i, carry):
        dq, dk, dv = carry
        queries, keys, _, allowed = _chunk(static, walk, i, window, q.shape[2] // block)
        q_c, k_c, dout_c = q[queries], k[keys], dout[queries]
        scores = _scores(static, q_c, k_c)
        weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores, NEVER) - lse[queries][..., None]), 0.0)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dv = dv.at[keys].add(product("cjqk,cjqd->cjkd", weights.astype(dout_c.dtype), dout_c))
        dweights = product("cjqd,cjkd->cjqk", dout_c, v[keys])
        dscores = weights * (dweights - delta[queries][..., None])
        if static.softcap is not None:
            dscores = dscores * (1.0 - (scores / static.softcap) ** 2)
        dscores = (dscores * static.scale).astype(q_c.dtype)
        dq = dq.at[queries].add(product("cjqk,cjkd->cjqd", dscores, k_c))
        dk = dk.at[keys].add(product("cjqk,cjqd->cjkd", dscores, q_c))
        return dq, dk, dv

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    gradients = jax.lax.fori_loop(0, _trips(static, walk), visit, start)
    return tuple(
        _from_blocks(gradient, rows, length, x.shape[2]).astype(x.dtype)
        for gradient, x in zip(gradients, (query, key, value), strict=True)
    )


def _make_walk(static, tokens):
    """Puts the rows' lists together, padding last."""
    rows, length = tokens.position.shape
    block = _block_size(length, tokens.block_pairs.shape[1])
    blocks = length // block
    ids = jnp.stack([x.reshape(rows * blocks, block) for x in tokens[:3]], axis=1)
    listed = (tokens.block_pairs[..., 1] >= 0).reshape(-1)
    flat = (tokens.block_pairs + blocks * jnp.arange(rows, dtype=jnp.int32)[:, None, None]).reshape(-1, 2)
    place = jnp.where(listed, jnp.cumsum(listed) - 1, listed.size + static.chunk)
    pairs = jnp.zeros((listed.size + static.chunk, 2), jnp.int32).at[place].set(flat, mode="drop")
    return _Walk(ids, pairs, listed.sum()), block


def _block_size(length, capacity):
    """The block size that makes `capacity` the causal bound n (n + 1) / 2 of n = length / block blocks."""
    blocks = (math.isqrt(8 * capacity + 1) - 1) // 2
    if blocks * (blocks + 1) // 2 != capacity or length % blocks:
        raise ValueError(
            f"attend: {capacity} block pairs for rows of {length} tokens; expected n * (n + 1) / 2 with n dividing "
            "the row length. Build the list with attention.block_pairs.list_block_pairs and its default capacity."
        )
    return length // blocks


def _trips(static, walk):
    return (walk.num_pairs + static.chunk - 1) // static.chunk


def _chunk(static, walk, i, window, groups):
    """The i-th chunk: its blocks, which entries start a query block's run, and which (query, key) are allowed."""
    pairs = jax.lax.dynamic_slice_in_dim(walk.pairs, i * static.chunk, static.chunk)
    queries, keys = pairs[:, 0], pairs[:, 1]
    live = i * static.chunk + jnp.arange(static.chunk) < walk.num_pairs
    first = jnp.concatenate([jnp.ones(1, bool), queries[1:] != queries[:-1]])
    (position_q, group_q, branch_q), (position_k, group_k, branch_k) = (
        tuple(walk.ids[which, j] for j in range(3)) for which in (queries, keys)
    )
    distance = position_q[:, :, None] - position_k[:, None, :]
    allowed = (group_q[:, :, None] == group_k[:, None, :]) & (group_q[:, :, None] > 0) & live[:, None, None]
    allowed &= (branch_k[:, None, :] == 0) | (branch_k[:, None, :] == branch_q[:, :, None])
    allowed &= (distance >= 0) & (distance < window)
    allowed = jnp.tile(allowed, (1, groups, 1))[:, None]  # every query head of a key head, stacked along the queries
    return queries, keys, first[:, None, None], allowed


def _scores(static, q, k):
    scores = jnp.einsum("cjqd,cjkd->cjqk", q, k, preferred_element_type=jnp.float32) * static.scale
    return scores if static.softcap is None else static.softcap * jnp.tanh(scores / static.softcap)


def _to_blocks(x, block, key_heads):
    """[R, T, H, D] -> [R * blocks, J, (H / J) * block, D]."""
    rows, length, heads, dim = x.shape
    x = x.reshape(rows * (length // block), block, key_heads, heads // key_heads, dim)
    return x.transpose(0, 2, 3, 1, 4).reshape(x.shape[0], key_heads, -1, dim)


def _from_blocks(x, rows, length, heads):
    """The inverse of `_to_blocks`."""
    blocks, key_heads, _, dim = x.shape
    x = x.reshape(blocks, key_heads, heads // key_heads, rows * length // blocks, dim)
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)
