"""Walking a batch's targets in chunks: the part that both heads share.

Only listed targets are visited: the rows of a device are put into one list, padding last, and the loops run
ceil(count / chunk) times. Logits exist for one chunk at a time; nothing of R * T * V elements is ever formed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palign.sharding.mesh import ROWS, over_rows
from palign.types import Array, Batch, Unembedding

PADDED_LOGIT = -1e30  # of vocabulary entries that are padding: finite, so that differences are 0 and not NaN


class Tower(NamedTuple):
    """A model at the head: its hidden states `[R, T, D]` and how they become logits."""

    hidden: Array
    unembedding: Unembedding


def hidden_from_targets(cached: Array, batch: Batch) -> Array:
    """Hidden states where the targets of a batch read them, from those that were cached for each target.

    Args:
        cached: `[R, M, D]`.
        batch: its target table says in which columns they belong; targets that share a column share the state.

    Returns:
        `[R, T, D]`, zeros where no target reads.
    """
    length = batch.token.shape[1]
    columns = jnp.where(batch.target_slot > 0, batch.target_source, length)

    def place(cached: Array, columns: Array) -> Array:
        return jnp.zeros((length, cached.shape[1]), cached.dtype).at[columns].set(cached, mode="drop")

    return over_rows(jax.vmap(place), (ROWS, ROWS), ROWS)(cached, columns)


class Static(NamedTuple):
    """What is fixed at trace time."""

    function: Callable
    softcaps: tuple[float | None, ...]
    vocab_size: int
    chunk: int


class Operands(NamedTuple):
    """Arrays of one device: rows of targets, and every tower's hidden states; kernels travel apart."""

    source: Array  # [R, M]
    token: Array  # [R, M]
    slot: Array  # [R, M]
    hidden: tuple[Array, ...]  # towers of [R, T, D]


class Walk(NamedTuple):
    """One device's targets as one list."""

    order: Array  # [R * M + chunk] indices of listed targets, padding last
    count: Array  # []
    source: Array  # [R * M] rows of the flattened hidden states
    token: Array  # [R * M]
    hidden: tuple[Array, ...]  # towers of [R * T, D]


def pack_arguments(
    function: Callable, towers: tuple[Tower, ...], batch: Batch, chunk: int
) -> tuple[Static, Operands, tuple[Array, ...]]:
    """Sorts towers and batch into what is static, what is cut over devices, and what every device holds.

    Raises:
        ValueError: the towers disagree on the vocabulary.
    """
    sizes = {tower.unembedding.vocab_size for tower in towers}
    if len(sizes) != 1:
        raise ValueError(
            f"heads: models with vocabularies of {sorted(sizes)} tokens meet at one target; they must share a "
            "tokenizer. Convert them with the same vocabulary first."
        )
    static = Static(function, tuple(t.unembedding.softcap for t in towers), sizes.pop(), chunk)
    hidden = (towers[0].hidden, *(jax.lax.stop_gradient(t.hidden) for t in towers[1:]))
    kernels = (
        towers[0].unembedding.kernel,
        *(jax.lax.stop_gradient(t.unembedding.kernel) for t in towers[1:]),
    )
    return static, Operands(batch.target_source, batch.target_token, batch.target_slot, hidden), kernels


def make_walk(static: Static, operands: Operands) -> Walk:
    """Flattens the rows of one device into one list of targets, padding last."""
    rows, length = operands.hidden[0].shape[:2]
    listed = (operands.slot > 0).reshape(-1)
    place = jnp.where(listed, jnp.cumsum(listed) - 1, listed.size + static.chunk)
    order = jnp.zeros(listed.size + static.chunk, jnp.int32)
    order = order.at[place].set(jnp.arange(listed.size, dtype=jnp.int32), mode="drop")
    source = (operands.source + length * jnp.arange(rows, dtype=jnp.int32)[:, None]).reshape(-1)
    hidden = tuple(x.reshape(rows * length, -1) for x in operands.hidden)
    return Walk(order, listed.sum(), source, operands.token.reshape(-1), hidden)


def trips(static: Static, walk: Walk) -> Array:
    """How many chunks hold the listed targets."""
    return (walk.count + static.chunk - 1) // static.chunk


class Chunk(NamedTuple):
    """The targets of one trip."""

    index: Array  # [c] where their results go; out of range for padding, whose results are dropped
    live: Array  # [c]
    source: Array  # [c]
    raw: tuple[Array, ...]  # towers of [c, V padded] float32, before softcap and masking
    values: Callable  # raw logits of the first tower -> function's results


def read_chunk(static: Static, walk: Walk, kernels: tuple[Array, ...], i: Array) -> Chunk:
    """Gathers the i-th chunk of targets and projects it onto the vocabulary."""
    index = jax.lax.dynamic_slice_in_dim(walk.order, i * static.chunk, static.chunk)
    live = i * static.chunk + jnp.arange(static.chunk) < walk.count
    source, token = walk.source[index], walk.token[index]
    raw = tuple(
        jnp.matmul(x[source].astype(w.dtype), w, preferred_element_type=jnp.float32)
        for x, w in zip(walk.hidden, kernels, strict=True)
    )
    frozen = tuple(
        finish_logits(x, cap, static.vocab_size) for x, cap in zip(raw[1:], static.softcaps[1:], strict=True)
    )

    def values(first: Array) -> Any:
        return static.function(token, finish_logits(first, static.softcaps[0], static.vocab_size), *frozen)

    return Chunk(jnp.where(live, index, walk.source.size), live, source, raw, values)


def finish_logits(raw: Array, softcap: float | None, vocab_size: int) -> Array:
    """Softcap, then padding of the vocabulary masked: float32 logits."""
    logits = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    if vocab_size == raw.shape[-1]:
        return logits
    return jnp.where((jnp.arange(raw.shape[-1]) < vocab_size)[None], logits, PADDED_LOGIT)


def empty_values(static: Static, walk: Walk, kernels: tuple[Array, ...]) -> Any:
    """Zeros of the shape of the function's results over all targets, `[R * M]` each."""
    shapes = jax.eval_shape(
        lambda: read_chunk(static, walk, kernels, jnp.int32(0)).values(_first_shape(static, kernels))
    )
    return jax.tree.map(lambda s: jnp.zeros((walk.source.size, *s.shape[1:]), s.dtype), shapes)


def _first_shape(static: Static, kernels: tuple[Array, ...]) -> Array:
    return jnp.zeros((static.chunk, kernels[0].shape[-1]), jnp.float32)


class Gradients(NamedTuple):
    """Running float32 sums of the first tower's gradients."""

    hidden: Array  # [R * T, D]
    kernel: Array  # [D, V padded]

    @classmethod
    def zeros(cls, walk: Walk, kernels: tuple[Array, ...]) -> "Gradients":
        """Where the sums start."""
        return cls(jnp.zeros(walk.hidden[0].shape, jnp.float32), jnp.zeros(kernels[0].shape, jnp.float32))

    def add(self, walk: Walk, kernels: tuple[Array, ...], chunk: Chunk, dlogits: Array) -> "Gradients":
        """Adds one chunk's, given the gradient with respect to its raw logits."""
        kernel = kernels[0]
        dlogits = dlogits.astype(kernel.dtype)
        rows = walk.hidden[0][chunk.source].astype(kernel.dtype)
        dhidden = jnp.matmul(dlogits, kernel.T, preferred_element_type=jnp.float32)
        dkernel = jnp.matmul(rows.T, dlogits, preferred_element_type=jnp.float32)
        return Gradients(self.hidden.at[chunk.source].add(dhidden), self.kernel + dkernel)
