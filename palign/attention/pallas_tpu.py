"""Attention by block pairs as Pallas kernels for TPUs.

The grid runs over heads and over the pairs that the rows list, no further. The list is handed over before the kernel
starts, so that the blocks of the next pair are fetched while this one is computed. It is sorted by query block: sums
stay in the chip's scratch memory while the query block is the same. For the gradients of keys and values the list is
sorted by key block instead, and the query heads of a key head take turns.

Scores are [key, query]: what belongs to a query, its maximum, sum and log-sum-exp, then lies along the lanes, which is
how it is stored. Arrays are [heads, rows x tokens, width].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palign.attention.walk import NEVER, Kernel, make_walk, sort_by_key, visible

LANES = 128
LONGEST_LIST = 120_000  # pairs; two numbers each, in a v5e's 1 MiB of scalar memory


@functools.cache
def kernel(*, interpret: bool = False) -> Kernel:
    """The form for TPUs.

    Args:
        interpret: run it step by step on any backend, as tests do.
    """
    return Kernel(functools.partial(_forward, interpret), functools.partial(_backward, interpret))


class _Blocks(NamedTuple):
    """Which block of an array a step of the grid (head, pair, member of the head's group) works on."""

    query: pl.BlockSpec
    key: pl.BlockSpec
    statistic: pl.BlockSpec  # a number per query
    query_ids: pl.BlockSpec
    key_ids: pl.BlockSpec


def _forward(interpret, scoring, query, key, value, tokens, window):
    walk = make_walk(tokens, tail=1)
    if not interpret:
        _check(walk)
    q, k, v = (_heads_first(x) for x in (query, key, value))
    (heads, total, width), block = q.shape, walk.block
    at = _blocks(block, width, group=heads // k.shape[0], members=1)
    output, lse = _call(
        functools.partial(_forward_step, scoring),
        (heads, walk.num_pairs, 1),
        (walk.queries, walk.keys, window),
        [(at.query_ids, walk.query_ids), (at.key_ids, walk.key_ids), (at.query, q), (at.key, k), (at.key, v)],
        [(at.query, q), (at.statistic, jax.ShapeDtypeStruct((heads, 1, total), jnp.float32))],
        [(1, block), (1, block), (width, block)],
        interpret,
    )
    rows = query.shape[0]
    return _heads_last(output, rows), _heads_last(lse[:, 0], rows)


def _backward(interpret, scoring, query, key, value, tokens, window, output, lse, cotangent):
    walk = make_walk(tokens, tail=1)
    delta = jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    q, k, v, dout, lse, delta = (_heads_first(x) for x in (query, key, value, cotangent, lse, delta))
    heads, key_heads, width, block = q.shape[0], k.shape[0], q.shape[-1], walk.block

    def call(step, walk, grid_heads, at, outputs, scratch):
        inputs = [(at.query_ids, walk.query_ids), (at.key_ids, walk.key_ids), (at.query, q), (at.key, k), (at.key, v)]
        inputs += [(at.query, dout), (at.statistic, lse[:, None]), (at.statistic, delta[:, None])]
        grid, lists = (grid_heads, walk.num_pairs, heads // grid_heads), (walk.queries, walk.keys, window)
        return _call(functools.partial(step, scoring), grid, lists, inputs, outputs, scratch, interpret)

    group = heads // key_heads
    at = _blocks(block, width, group, members=1)
    (dq,) = call(_query_gradient_step, walk, heads, at, [(at.query, q)], [(width, block)])
    at = _blocks(block, width, group, members=group)
    outputs = [(at.key, k), (at.key, v)]
    dk, dv = call(_key_gradient_step, sort_by_key(walk), key_heads, at, outputs, [(block, width)] * 2)
    dk, dv = (_where_listed(x, walk) for x in (dk, dv))
    return tuple(_heads_last(x, query.shape[0]) for x in (dq, dk, dv))


def _check(walk):
    block, pairs = walk.block, walk.keys.size - 1
    if block % LANES:
        raise ValueError(
            f"config.data.block = {block}: attention's TPU kernel takes multiples of {LANES}; use {4 * LANES}, or "
            "config.attention.kernel = 'xla'"
        )
    if pairs > LONGEST_LIST:
        raise ValueError(
            f"config.data.block = {block}: the rows of one device may list {pairs} block pairs, attention's TPU kernel "
            f"takes {LONGEST_LIST}; twice the block needs a quarter of them"
        )


def _blocks(block, width, group, members):
    def spec(shape, place):
        # A head of the grid stands for `members` query heads; `group` of them share a key head.
        return pl.BlockSpec(shape, lambda h, i, m, queries, keys, _: place(h * members + m, queries[i], keys[i]))

    return _Blocks(
        query=spec((None, block, width), lambda head, query, key: (head, query, 0)),
        key=spec((None, block, width), lambda head, query, key: (head // group, key, 0)),
        statistic=spec((None, 1, block), lambda head, query, key: (head, 0, query)),
        query_ids=spec((None, 3, block), lambda head, query, key: (query, 0, 0)),
        key_ids=spec((None, 3, block), lambda head, query, key: (key, 0, 0)),
    )


def _call(step, grid, lists, inputs, outputs, scratch, interpret):
    queries, keys, window = lists
    return pl.pallas_call(
        step,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(queries, keys, window.reshape(1), *(array for _, array in inputs))


def _forward_step(
    scoring, queries, keys, window, query_ids, key_ids, q, k, v, output, lse, top_ref, total_ref, sum_ref
):
    first, last = _edges(queries)

    @pl.when(first)
    def _():
        top_ref[...] = jnp.full_like(top_ref, NEVER)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    allowed = _allowed(query_ids, key_ids, window)
    scores = jnp.where(allowed, scoring.scores(_product(k[...], q[...], 1, 1)), NEVER)
    top = jnp.maximum(top_ref[...], scores.max(axis=0, keepdims=True))
    rescale = jnp.exp(top_ref[...] - top)
    weights = jnp.where(allowed, jnp.exp(scores - top), 0.0)
    top_ref[...] = top
    total_ref[...] = total_ref[...] * rescale + weights.sum(axis=0, keepdims=True)
    sum_ref[...] = sum_ref[...] * rescale + _product(v[...], weights.astype(v.dtype), 0, 0)

    @pl.when(last)
    def _():
        total = total_ref[...]
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        output[...] = (sum_ref[...] / total).T.astype(output.dtype)  # nothing was summed where nothing was seen
        lse[...] = jnp.where(seen, top_ref[...] + jnp.log(total), 0.0)


def _query_gradient_step(scoring, queries, keys, window, query_ids, key_ids, q, k, v, dout, lse, delta, dq, sum_ref):
    first, last = _edges(queries)

    @pl.when(first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    _, dproducts = _pull_back(scoring, _allowed(query_ids, key_ids, window), q, k, v, dout, lse, delta)
    sum_ref[...] += _product(k[...], dproducts, 0, 0)

    @pl.when(last)
    def _():
        dq[...] = sum_ref[...].T.astype(dq.dtype)


def _key_gradient_step(
    scoring, queries, keys, window, query_ids, key_ids, q, k, v, dout, lse, delta, dk, dv, dk_sum, dv_sum
):
    first, last = _edges(keys)

    @pl.when(first)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    weights, dproducts = _pull_back(scoring, _allowed(query_ids, key_ids, window), q, k, v, dout, lse, delta)
    dk_sum[...] += _product(dproducts, q[...], 1, 0)
    dv_sum[...] += _product(weights, dout[...], 1, 0)

    @pl.when(last)
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _pull_back(scoring, allowed, q, k, v, dout, lse, delta):
    """The pair's weights [key, query], and the cotangent of its products."""
    products, dweights = _product(k[...], q[...], 1, 1), _product(v[...], dout[...], 1, 1)
    weights, dproducts = scoring.pull_back(products, dweights, allowed, lse[...], delta[...])
    return weights.astype(dout.dtype), dproducts.astype(q.dtype)


def _edges(turns):
    """Whether this step is the first, and the last, of those on one of the blocks `turns` lists."""
    i, member = pl.program_id(1), pl.program_id(2)
    starts = (i == 0) | (turns[jnp.maximum(i - 1, 0)] != turns[i])
    ends = (i == pl.num_programs(1) - 1) | (turns[i + 1] != turns[i])
    return starts & (member == 0), ends & (member == pl.num_programs(2) - 1)


def _allowed(query_ids, key_ids, window):
    query = tuple(query_ids[j, :][None, :] for j in range(3))
    key = tuple(key_ids[j, :][:, None] for j in range(3))
    return visible(query, key, window[0])


def _product(x, y, x_axis, y_axis):
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _where_listed(x, walk):
    """`x [J, tokens, D]` of the keys, zero in blocks that no pair names: nothing was written there."""
    blocks = walk.key_ids.shape[0]
    listed = jnp.zeros(blocks, bool).at[jnp.where(walk.padding, blocks, walk.keys)].set(True, mode="drop")
    return jnp.where(jnp.repeat(listed, walk.block)[None, :, None], x, 0)


def _heads_first(x):
    """[R, T, H, ...] -> [H, R * T, ...]."""
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _heads_last(x, rows):
    """The inverse of `_heads_first`."""
    return jnp.moveaxis(x.reshape(x.shape[0], rows, -1, *x.shape[2:]), 0, 2)
