"""Weighted sums of per-target values, with the gradient taken in the forward pass: for token-additive losses.

The weights are known beforehand, so each chunk's gradient can be added up while its logits are there; the backward pass
only scales it. One projection fewer than recomputing, for AlignDistil, divergences and the plain likelihood.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from palign.heads.targets import (
    AnyTower,
    Gradients,
    Operands,
    empty_values,
    make_walk,
    operand_specs,
    pack_arguments,
    read_chunk,
    trips,
)
from palign.sharding.mesh import ROWS, SHARED, over_rows, sum_over_pieces, sum_over_rows
from palign.types import Array, Batch


def weighted_sum(
    function: Callable, weights: Array, towers: tuple[AnyTower, ...], batch: Batch, *, chunk: int = 256
) -> tuple[Array, Any]:
    """Sums `weights * function(token, logits, *frozen_logits)` over all listed targets.

    Args:
        function: as in `target_values`, but it returns a pair: the values `[c]` to be summed, and a tree of arrays
            `[c]` that are only reported (may be empty).
        weights: `[R, M]`, known beforehand (no gradient), for instance 1 / |y|.
        towers: the differentiated model first, then frozen ones.
        batch: its target table is read.
        chunk: targets per trip of the loop.

    Returns:
        The sum, differentiable in the first tower, and the pair (unweighted values, reported tree) as `[R, M]` without
        gradient.
    """
    static, operands, kernels = pack_arguments(function, towers, batch, chunk)
    total, values = _weighted_sum(static, operands, kernels, jax.lax.stop_gradient(weights))
    return total, jax.lax.stop_gradient(values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(static, operands, kernels, weights):
    run = over_rows(functools.partial(_value_rows, static), (operand_specs(static), SHARED, ROWS), (SHARED, ROWS))
    return run(operands, kernels, weights)


def _weighted_sum_forward(static, operands, kernels, weights):
    specs, results = (operand_specs(static), SHARED, ROWS), (SHARED, ROWS, static.places[0], SHARED)
    run = over_rows(functools.partial(_value_and_gradient_rows, static), specs, results)
    total, values, dhidden, dkernel = run(operands, kernels, weights)
    return (total, values), (dhidden, dkernel, len(kernels) - 1)


def _weighted_sum_backward(static, saved, cotangent):
    dhidden, dkernel, num_frozen = saved
    scale, frozen = cotangent[0], (None,) * num_frozen
    dhidden, dkernel = ((scale * x).astype(x.dtype) for x in (dhidden, dkernel))
    return Operands(None, None, None, (dhidden, *frozen)), (dkernel, *frozen), None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _value_rows(static, operands, kernels, weights):
    walk = make_walk(static, operands)

    def visit(i, out):
        chunk = read_chunk(static, walk, kernels, i)
        return _store(out, chunk, chunk.values(chunk.raw))

    out = jax.lax.fori_loop(0, trips(static, walk), visit, empty_values(static, walk, kernels))
    return _finish(out, operands, weights)


def _value_and_gradient_rows(static, operands, kernels, weights):
    walk = make_walk(static, operands)
    flat = weights.reshape(-1)

    def visit(i, carry):
        out, gradients = carry
        chunk = read_chunk(static, walk, kernels, i)
        values, pull, reported = jax.vjp(chunk.values, chunk.raw, has_aux=True)
        (dlogits,) = pull(jnp.where(chunk.live, flat[chunk.index], 0.0))
        return _store(out, chunk, (values, reported)), gradients.add(walk, kernels, chunk, dlogits)

    start = (empty_values(static, walk, kernels), Gradients.zeros(walk, kernels))
    out, gradients = jax.lax.fori_loop(0, trips(static, walk), visit, start)
    dhidden = gradients.of_hidden(static, operands)
    return (*_finish(out, operands, weights), dhidden, sum_over_rows(gradients.kernel).astype(kernels[0].dtype))


def _store(out, chunk, values):
    return jax.tree.map(lambda o, v: o.at[chunk.index].set(v, mode="drop"), out, values)


def _finish(out, operands, weights):
    out = jax.tree.map(lambda x: x.reshape(operands.slot.shape), out)
    total = jnp.sum(jnp.where(operands.slot > 0, weights * out[0], 0.0))
    return sum_over_rows(total), sum_over_pieces(out)
