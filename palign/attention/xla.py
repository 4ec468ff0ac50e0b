"""Attention over packed trees by block pairs, in plain XLA.

A row is cut into blocks; the host lists the (query block, key block) pairs that the tree rule touches; this module
walks the list in chunks with an online softmax and never forms a row-by-row matrix. The backward pass keeps only the
output and the log-sum-exp and walks the same list. Work follows the number of listed pairs: the rows of a device are
put into one list, padding last, and the loop's trip count is that list's length.

Array layout inside: blocks [n, J, S, D] with n = rows x blocks, J key heads, S = (H / J) x block queries or block keys.
"""

import functools

import jax
import jax.numpy as jnp

from palign.attention.walk import NEVER, Kernel, Tokens, block_size, make_walk, visible

MOST_PAIRS = 16  # of a trip; accelerators take so many
CACHE = 5 * 2**19  # bytes that a trip on a CPU may touch: more heads or wider ones, fewer pairs


@functools.cache
def kernel(chunk: int | None = None) -> Kernel:
    """The form that runs everywhere.

    Args:
        chunk: block pairs per trip of the loop; None: `MOST_PAIRS`, on a CPU no more than its caches hold.
    """
    if chunk is None:
        return Kernel(functools.partial(_in_caches, _forward), functools.partial(_in_caches, _backward))
    return Kernel(functools.partial(_forward, chunk), functools.partial(_backward, chunk))


def _in_caches(part, scoring, query, key, value, tokens, *saved):
    """Runs a part with as many pairs a trip as the platform likes that it is compiled for."""
    sides = {"cpu": pairs_in_caches(query.shape, tokens), "default": MOST_PAIRS}
    run = {platform: functools.partial(part, pairs, scoring) for platform, pairs in sides.items()}
    return jax.lax.platform_dependent(query, key, value, tokens, *saved, **run)


def pairs_in_caches(query_shape: tuple[int, ...], tokens: Tokens) -> int:
    """Block pairs of a trip whose scores, queries, keys, values and cotangents `CACHE` holds."""
    *_, heads, width = query_shape
    block = block_size(tokens.key.position.shape[1], tokens.block_pairs.shape[1])
    touched = 4 * heads * block * (block + 4 * width)
    return max(1, min(MOST_PAIRS, CACHE // touched))


def _forward(chunk, scoring, query, key, value, tokens, window):
    rows, length, heads, _ = query.shape  # keys and values are of whole rows, queries perhaps of a piece
    walk = make_walk(tokens, tail=chunk)
    block = walk.block
    q, k, v = (_to_blocks(x, block, key.shape[2]) for x in (query, key, value))

    def visit(i, carry):
        output, top, total = carry
        queries, keys, first, allowed = _chunk(chunk, walk, i, window, q.shape[2] // block)
        products = jnp.einsum("cjqd,cjkd->cjqk", q[queries], k[keys], preferred_element_type=jnp.float32)
        scores = jnp.where(allowed, scoring.scores(products), NEVER)
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
    output, top, total = jax.lax.fori_loop(0, _trips(chunk, walk), visit, start)
    seen = total > 0
    output = jnp.where(seen[..., None], output / jnp.where(seen, total, 1.0)[..., None], 0.0)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), 0.0)
    return _from_blocks(output, rows, length, heads).astype(query.dtype), lse.reshape(rows, -1, *shape[1:])


def _backward(chunk, scoring, query, key, value, tokens, window, output, lse, cotangent):
    walk = make_walk(tokens, tail=chunk)
    block = walk.block
    q, k, v, out, dout = (_to_blocks(x, block, key.shape[2]) for x in (query, key, value, output, cotangent))
    lse = lse.reshape(q.shape[:3])
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)

    def visit(i, carry):
        dq, dk, dv = carry
        queries, keys, _, allowed = _chunk(chunk, walk, i, window, q.shape[2] // block)
        q_c, k_c, dout_c = q[queries], k[keys], dout[queries]
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        products, dweights = product("cjqd,cjkd->cjqk", q_c, k_c), product("cjqd,cjkd->cjqk", dout_c, v[keys])
        statistics = lse[queries][..., None], delta[queries][..., None]
        weights, dproducts = scoring.pull_back(products, dweights, allowed, *statistics)
        dproducts = dproducts.astype(q_c.dtype)
        dv = dv.at[keys].add(product("cjqk,cjqd->cjkd", weights.astype(dout_c.dtype), dout_c))
        dq = dq.at[queries].add(product("cjqk,cjkd->cjqd", dproducts, k_c))
        dk = dk.at[keys].add(product("cjqk,cjqd->cjkd", dproducts, q_c))
        return dq, dk, dv

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    gradients = jax.lax.fori_loop(0, _trips(chunk, walk), visit, start)
    return tuple(
        _from_blocks(gradient, *x.shape[:3]).astype(x.dtype)
        for gradient, x in zip(gradients, (query, key, value), strict=True)
    )


def _trips(chunk, walk):
    return (walk.num_pairs + chunk - 1) // chunk


def _chunk(chunk, walk, i, window, groups):
    """The i-th chunk: its blocks, which entries start a query block's run, and which (query, key) are allowed."""
    queries, keys = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (walk.queries, walk.keys))
    live = i * chunk + jnp.arange(chunk) < walk.num_pairs
    first = jnp.concatenate([jnp.ones(1, bool), queries[1:] != queries[:-1]])
    query_ids = tuple(walk.query_ids[queries, j][:, :, None] for j in range(3))
    key_ids = tuple(walk.key_ids[keys, j][:, None, :] for j in range(3))
    allowed = visible(query_ids, key_ids, window) & live[:, None, None]
    allowed = jnp.tile(allowed, (1, groups, 1))[:, None]  # every query head of a key head, stacked along the queries
    return queries, keys, first[:, None, None], allowed


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
