"""Attention by block pairs as Pallas kernels for GPUs, by way of Triton.

A program per query block and head loops over the key blocks that the list names for it. For the gradients of keys and
values, a program per key block and key head loops over the query blocks that name it and over the heads of its group.
Nothing is added up across programs. Arrays are [blocks, block, heads, width], which is how the rows lie in memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palign.attention.walk import NEVER, Kernel, make_walk, sort_by_key, visible

BLOCKS = (16, 32, 64, 128)  # tensor cores multiply no smaller tiles, and a larger tile of scores spills
LARGEST_BYTES = 2**15  # of a block of keys: beyond it the tiles do not fit an H100's shared memory


@functools.cache
def kernel(*, interpret: bool = False) -> Kernel:
    """The form for GPUs.

    Args:
        interpret: run it step by step on any backend, as tests do.
    """
    return Kernel(functools.partial(_forward, interpret), functools.partial(_backward, interpret))


def _forward(interpret, scoring, query, key, value, tokens, window):
    walk = make_walk(tokens, tail=0)
    q, k, v = (_to_blocks(x, walk) for x in (query, key, value))
    if not interpret:
        _check(k)
    group = q.shape[2] // k.shape[2]
    shared = functools.partial(_whole, place=lambda head: head // group)
    output, lse = _call(
        functools.partial(_forward_program, scoring),
        q.shape[2],
        (_starts(walk.queries, q, walk), walk.keys, window, walk.query_ids, walk.key_ids),
        [(_own(q), q), (shared(k), k), (shared(v), v)],
        [(_own(q), q), (_own(q[..., 0]), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32))],
        interpret,
    )
    return _from_blocks(output, query), lse.reshape(query.shape[:3])


def _backward(interpret, scoring, query, key, value, tokens, window, output, lse, cotangent):
    walk = make_walk(tokens, tail=0)
    delta = jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    q, k, v, dout = (_to_blocks(x, walk) for x in (query, key, value, cotangent))
    lse, delta = (x.reshape(q.shape[:3]) for x in (lse, delta))
    group = q.shape[2] // k.shape[2]
    shared = functools.partial(_whole, place=lambda head: head // group)
    (dq,) = _call(
        functools.partial(_query_gradient_program, scoring),
        q.shape[2],
        (_starts(walk.queries, q, walk), walk.keys, window, walk.query_ids, walk.key_ids),
        [*((_own(x), x) for x in (q, dout, lse, delta)), (shared(k), k), (shared(v), v)],
        [(_own(q), q)],
        interpret,
    )
    walk = sort_by_key(walk)
    members = functools.partial(_whole, place=lambda head: head, heads=group)
    dk, dv = _call(
        functools.partial(_key_gradient_program, scoring),
        k.shape[2],
        (_starts(walk.keys, k, walk), walk.queries, window, walk.query_ids, walk.key_ids),
        [*((members(x), x) for x in (q, dout, lse, delta)), (_own(k), k), (_own(v), v)],
        [(_own(k), k), (_own(v), v)],
        interpret,
    )
    return _from_blocks(dq, query), _from_blocks(dk, key), _from_blocks(dv, value)


def _forward_program(scoring, starts, keys, window, query_ids, key_ids, q, k, v, output, lse):
    own = pl.program_id(0)
    queries, own_ids = q[...], _ids(query_ids, own)

    def visit(j, carry):
        summed, total, top_before = carry
        allowed = _allowed(own_ids, _ids(key_ids, keys[j]), window)
        scores = jnp.where(allowed, scoring.scores(_product(queries, k[keys[j]].T)), NEVER)
        top = jnp.maximum(top_before, scores.max(axis=1))
        rescale = jnp.exp(top_before - top)
        weights = jnp.where(allowed, jnp.exp(scores - top[:, None]), 0.0)
        summed = summed * rescale[:, None] + _product(weights.astype(v.dtype), v[keys[j]])
        return summed, total * rescale + weights.sum(axis=1), top

    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    carry = jnp.zeros(q.shape, jnp.float32), zeros, zeros + NEVER
    summed, total, top = jax.lax.fori_loop(starts[own], starts[own + 1], visit, carry)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    output[...] = (summed / total[:, None]).astype(output.dtype)  # nothing was summed where nothing was seen
    lse[...] = jnp.where(seen, top + jnp.log(total), 0.0)


def _query_gradient_program(scoring, starts, keys, window, query_ids, key_ids, q, dout, lse, delta, k, v, dq):
    own = pl.program_id(0)
    queries, cotangent, own_ids = q[...], dout[...], _ids(query_ids, own)
    statistics = lse[...][:, None], delta[...][:, None]

    def visit(j, summed):
        keys_now = k[keys[j]]
        allowed = _allowed(own_ids, _ids(key_ids, keys[j]), window)
        products, dweights = _product(queries, keys_now.T), _product(cotangent, v[keys[j]].T)
        _, dproducts = scoring.pull_back(products, dweights, allowed, *statistics)
        return summed + _product(dproducts.astype(keys_now.dtype), keys_now)

    start = jnp.zeros(q.shape, jnp.float32)
    dq[...] = jax.lax.fori_loop(starts[own], starts[own + 1], visit, start).astype(dq.dtype)


def _key_gradient_program(scoring, starts, queries, window, query_ids, key_ids, q, dout, lse, delta, k, v, dk, dv):
    own, group = pl.program_id(0), q.shape[2]
    keys, values, own_ids = k[...], v[...], _ids(key_ids, own)

    def visit(j, carry):
        dk_sum, dv_sum = carry
        block, head = queries[starts[own] + jax.lax.div(j, group)], jax.lax.rem(j, group)
        queries_now, cotangent = q[block, :, head], dout[block, :, head]
        allowed = _allowed(_ids(query_ids, block), own_ids, window).T  # here scores are [key, query]
        products, dweights = _product(keys, queries_now.T), _product(values, cotangent.T)
        statistics = lse[block, :, head][None, :], delta[block, :, head][None, :]
        weights, dproducts = scoring.pull_back(products, dweights, allowed, *statistics)
        dk_sum += _product(dproducts.astype(keys.dtype), queries_now)
        return dk_sum, dv_sum + _product(weights.astype(cotangent.dtype), cotangent)

    zeros = jnp.zeros(k.shape, jnp.float32)
    trips = (starts[own + 1] - starts[own]) * group
    dk_sum, dv_sum = jax.lax.fori_loop(0, trips, visit, (zeros, zeros))
    dk[...] = dk_sum.astype(dk.dtype)
    dv[...] = dv_sum.astype(dv.dtype)


def _call(program, heads, lists, inputs, outputs, interpret):
    starts, listed, window, *ids = lists
    lists = (starts, listed, window.reshape(1), *ids)
    blocks, _, _, width = outputs[0][1].shape
    return pl.pallas_call(
        program,
        grid=(blocks, heads),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(lists) + [spec for spec, _ in inputs],
        out_specs=[spec for spec, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2),
        interpret=interpret,
    )(*lists, *(array for _, array in inputs))


def _check(k):
    _, block, _, width = k.shape
    if block not in BLOCKS:
        raise ValueError(
            f"config.data.block = {block}: attention's GPU kernel takes one of {BLOCKS}; use 64, or "
            "config.attention.kernel = 'xla'"
        )
    if (size := block * width * k.dtype.itemsize) > LARGEST_BYTES:
        raise ValueError(
            f"config.data.block = {block}: a block of {k.dtype} keys of width {width} has {size} bytes, attention's "
            f"GPU kernel takes {LARGEST_BYTES}; use a smaller block, or config.attention.kernel = 'xla'"
        )


def _own(x):
    """A program's own block and head of `x [blocks, block, heads, ...]`."""
    return pl.BlockSpec((None, x.shape[1], None, *x.shape[3:]), lambda i, head: (i, 0, head) + (0,) * (x.ndim - 3))


def _whole(x, place, heads=None):
    """All blocks of `x`: of the head at `place(head)`, or of that many heads."""
    shape = (*x.shape[:2], heads, *x.shape[3:])
    return pl.BlockSpec(shape, lambda i, head: (0, 0, place(head)) + (0,) * (x.ndim - 3))


def _starts(turns, x, walk):
    """Where the run of each block of `x` begins in a sorted list of the walk, and behind the last one where it ends."""
    blocks = x.shape[0]
    listed = jnp.where(walk.padding, blocks, turns)
    return jnp.searchsorted(listed, jnp.arange(blocks + 1)).astype(jnp.int32)


def _ids(ids, block):
    return tuple(ids[block, j] for j in range(3))


def _allowed(query_ids, key_ids, window):
    return visible(tuple(x[:, None] for x in query_ids), tuple(x[None, :] for x in key_ids), window[0])


def _product(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _to_blocks(x, walk):
    """[R, T, H, D] -> [R * blocks, block, H, D], the width filled up to a power of two."""
    _, _, heads, width = x.shape
    fill = max(pl.next_power_of_2(width), BLOCKS[0]) - width
    return jnp.pad(x.reshape(-1, walk.block, heads, width), ((0, 0), (0, 0), (0, 0), (0, fill)))


def _from_blocks(x, like):
    """The inverse of `_to_blocks`, in the dtype of `like`."""
    return x[..., : like.shape[-1]].reshape(like.shape).astype(like.dtype)
