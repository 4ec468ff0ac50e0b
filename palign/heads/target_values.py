"""Per-target values, recomputed in the backward pass: for losses that need the sequence first (DPO and its kin)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palign.heads.targets import (
    AnyTower,
    Gradients,
    Operands,
    Tower,
    empty_values,
    make_walk,
    operand_specs,
    pack_arguments,
    read_chunk,
    trips,
)
from palign.sharding.mesh import ROWS, SHARED, over_rows, sum_over_pieces, sum_over_rows
from palign.types import Array, Batch


class TokenValues(NamedTuple):
    """What `token_values` gives per target; zeros where nothing is listed."""

    logps: Array  # [R, M] log-probability of the target, nats
    entropy: Array  # [R, M] of the predicting distribution, nats; no gradient
    correct: Array  # [R, M] 1 where no token is more likely than the target, else 0; no gradient


def target_values(function: Callable, towers: tuple[AnyTower, ...], batch: Batch, *, chunk: int = 256) -> Any:
    """Evaluates `function(token [c], logits [c, V], *frozen_logits) -> [c]` at every listed target.

    The gradient goes to the first tower only, accepts any cotangent, and recomputes the logits chunk by chunk.

    Args:
        function: from target ids and each tower's float32 logits (softcap applied, padded vocabulary at -1e30) to an
            array or a tree of arrays `[c]`, float32.
        towers: the differentiated model first, then frozen ones.
        batch: its target table is read.
        chunk: targets per trip of the loop; 256 to 2048 is good.

    Returns:
        The function's results as `[R, M]`, 0 where `target_slot` is 0.
    """
    static, operands, kernels = pack_arguments(function, towers, batch, chunk)
    return _target_values(static, operands, kernels)


def target_logps(hidden: Array, unembedding: Any, batch: Batch, *, chunk: int = 256) -> Array:
    """Log-probabilities of the targets, `[R, M]` float32 nats, 0 where nothing is listed."""
    return target_values(logp_at_targets, (Tower(hidden, unembedding),), batch, chunk=chunk)


def token_values(hidden: Array, unembedding: Any, batch: Batch, *, chunk: int = 256) -> TokenValues:
    """`target_logps` with the entropy and the hit rate beside it, for metrics."""
    return target_values(values_at_targets, (Tower(hidden, unembedding),), batch, chunk=chunk)


def logp_at_targets(token: Array, logits: Array) -> Array:
    """Log-probability of each token `[c]` under its row of logits `[c, V]`, nats."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def values_at_targets(token: Array, logits: Array) -> TokenValues:
    """What `token_values` gives, for one chunk: token `[c]`, logits `[c, V]`."""
    # The maximum and the sum are those of `logp_at_targets`, so metrics cost one more pass over the vocabulary. With
    # that pass in its sum too, the log-probability would no longer be rounded as the reference's is.
    frozen = jax.lax.stop_gradient(logits)
    log_p = frozen - jax.nn.logsumexp(frozen, axis=-1, keepdims=True)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
    chosen = jnp.take_along_axis(frozen, token[:, None], axis=-1)[:, 0]
    correct = (chosen >= jnp.max(frozen, axis=-1)).astype(jnp.float32)
    return TokenValues(logp_at_targets(token, logits), entropy, correct)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _target_values(static, operands, kernels):
    return over_rows(functools.partial(_forward_rows, static), (operand_specs(static), SHARED), ROWS)(operands, kernels)


def _target_values_forward(static, operands, kernels):
    return _target_values(static, operands, kernels), (operands, kernels)


def _target_values_backward(static, saved, cotangent):
    specs = operand_specs(static)
    run = over_rows(functools.partial(_backward_rows, static), (specs, SHARED, ROWS), (static.places[0], SHARED))
    dhidden, dkernel = run(*saved, cotangent)
    frozen = (None,) * (len(static.places) - 1)
    return Operands(None, None, None, (dhidden, *frozen)), (dkernel, *frozen)


_target_values.defvjp(_target_values_forward, _target_values_backward)


def _forward_rows(static, operands, kernels):
    walk = make_walk(static, operands)

    def visit(i, out):
        chunk = read_chunk(static, walk, kernels, i)
        return jax.tree.map(lambda o, v: o.at[chunk.index].set(v, mode="drop"), out, chunk.values(chunk.raw))

    out = jax.lax.fori_loop(0, trips(static, walk), visit, empty_values(static, walk, kernels))
    return sum_over_pieces(jax.tree.map(lambda x: x.reshape(operands.slot.shape), out))


def _backward_rows(static, operands, kernels, cotangent):
    walk = make_walk(static, operands)
    cotangent = jax.tree.map(lambda x: x.reshape(-1), cotangent)

    def visit(i, gradients):
        chunk = read_chunk(static, walk, kernels, i)
        at_chunk = jax.tree.map(lambda c: jnp.where(chunk.live, c[chunk.index], 0.0), cotangent)
        (dlogits,) = jax.vjp(chunk.values, chunk.raw)[1](at_chunk)
        return gradients.add(walk, kernels, chunk, dlogits)

    gradients = jax.lax.fori_loop(0, trips(static, walk), visit, Gradients.zeros(walk, kernels))
    return gradients.of_hidden(static, operands), sum_over_rows(gradients.kernel).astype(kernels[0].dtype)
