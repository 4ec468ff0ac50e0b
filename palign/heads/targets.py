"""Walking a batch's targets in chunks: the part that both heads share.

Only listed targets are visited: the rows of a device are put into one list, padding last, and the loops run
ceil(count / chunk) times. Logits exist for one chunk at a time; nothing of R * T * V elements is ever formed. Where
the tokens of a row are cut over devices, the table of targets is not: each device visits the targets whose hidden state
it holds, and what is said of them, a number each, is added up.

On a mesh with a tensor axis kernels and logits are cut along the vocabulary. What is said of a target stays a function
of its whole row of logits: the compiler turns each reduction over the vocabulary into one over the device's part and an
all-reduce of the `[c]` partial results, and the gradient of the hidden states into an all-reduce of `[c, D]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from palign.sharding.mesh import (
    ROWS,
    TENSOR_AXIS,
    TOKENS,
    context_size,
    over_rows,
    over_tensor,
    own_columns,
    sum_over_pieces,
    tensor_size,
)
from palign.types import Array, Batch, Unembedding

PADDED_LOGIT = -1e30  # of vocabulary entries that are padding: finite, so that differences are 0 and not NaN


class Tower(NamedTuple):
    """A model at the head: its hidden states `[R, T, D]` and how they become logits."""

    hidden: Array
    unembedding: Unembedding


class TargetTower(NamedTuple):
    """A model at the head of which only the hidden states at the targets are there, as when they were cached.

    They are `[R, M, D]`, in the order of the batch's target table; what stands where nothing is listed is not read.
    """

    hidden: Array
    unembedding: Unembedding


AnyTower = Tower | TargetTower


class Static(NamedTuple):
    """What is fixed at trace time."""

    function: Callable
    softcaps: tuple[float | None, ...]
    places: tuple[P, ...]  # of the towers' hidden states: `TOKENS`, or `ROWS` where they are those of the targets
    piece: int  # tokens of a row that one device holds
    vocab_size: int
    chunk: int


class Operands(NamedTuple):
    """Arrays of one device: rows of targets, and every tower's hidden states; kernels travel apart."""

    source: Array  # [R, M] the column of its row where a target's hidden state is
    token: Array  # [R, M]
    slot: Array  # [R, M]
    hidden: tuple[Array, ...]  # towers of [R, T, D] or [R, M, D]


class Walk(NamedTuple):
    """One device's targets as one list."""

    order: Array  # [R * M + chunk] indices of listed targets, then one of them again
    count: Array  # []
    source: tuple[Array, ...]  # towers of [R * M]: rows of the flattened hidden states
    token: Array  # [R * M]
    hidden: tuple[Array, ...]  # towers of [R * T, D] or [R * M, D]


def at_targets(tower: Tower, batch: Batch) -> TargetTower:
    """Keeps a model's hidden states at the targets only."""

    def pick(hidden, source):
        own, place = own_columns(source, hidden.shape[1])
        found = jax.vmap(lambda states, at: states[at])(hidden, place)
        return sum_over_pieces(jnp.where(own[..., None], found, 0))

    hidden = over_rows(pick, (TOKENS, ROWS), ROWS)(tower.hidden, batch.target_source)
    return TargetTower(hidden, tower.unembedding)


def pack_arguments(
    function: Callable, towers: tuple[AnyTower, ...], batch: Batch, chunk: int
) -> tuple[Static, Operands, tuple[Array, ...]]:
    """Sorts towers and batch into what is static, what is cut over rows, and what is the same for all rows.

    Raises:
        ValueError: the towers disagree on the vocabulary, cached hidden states are not those of the batch's targets, or
            the tensor axis does not divide a vocabulary.
    """
    sizes = {tower.unembedding.vocab_size for tower in towers}
    if len(sizes) != 1:
        raise ValueError(
            f"heads: models with vocabularies of {sorted(sizes)} tokens meet at one target; they must share a "
            "tokenizer. Convert them with the same vocabulary first."
        )
    softcaps, places = tuple(t.unembedding.softcap for t in towers), tuple(_place(t, batch) for t in towers)
    length = next((t.hidden.shape[1] for t in towers if isinstance(t, Tower)), batch.token.shape[1])
    static = Static(function, softcaps, places, length // context_size(), sizes.pop(), chunk)
    hidden = (towers[0].hidden, *(jax.lax.stop_gradient(t.hidden) for t in towers[1:]))
    kernels = (
        towers[0].unembedding.kernel,
        *(jax.lax.stop_gradient(t.unembedding.kernel) for t in towers[1:]),
    )
    for kernel in kernels:
        _check_divides(kernel.shape[-1])
    return static, Operands(batch.target_source, batch.target_token, batch.target_slot, hidden), kernels


def operand_specs(static: Static) -> Operands:
    """How operands are cut over devices, for `over_rows`."""
    return Operands(ROWS, ROWS, ROWS, static.places)


def _check_divides(vocabulary: int) -> None:
    devices = tensor_size()
    if vocabulary % devices:
        raise ValueError(
            f"heads: mesh axis {TENSOR_AXIS!r} = {devices} does not divide an unembedding of {vocabulary} columns; "
            f"pad it to a multiple of {devices}, for instance {-(-vocabulary // devices) * devices}"
        )


def _place(tower: AnyTower, batch: Batch) -> P:
    if isinstance(tower, Tower):
        return TOKENS
    if tower.hidden.shape[:2] != batch.target_slot.shape:
        raise ValueError(
            f"heads: cached hidden states are {list(tower.hidden.shape)}, the batch's target table is "
            f"{list(batch.target_slot.shape)}; expected [R, M, D], one state for every entry of the table"
        )
    return ROWS


def make_walk(static: Static, operands: Operands) -> Walk:
    """Flattens the rows of one device into one list of targets, padding last."""
    own, column = own_columns(operands.source, static.piece)
    listed = (own & (operands.slot > 0)).reshape(-1)
    place = jnp.where(listed, jnp.cumsum(listed) - 1, listed.size + static.chunk)
    # Padding of the last chunk reads a listed target again, never what stands where nothing is listed.
    order = jnp.full(listed.size + static.chunk, jnp.argmax(listed), jnp.int32)
    order = order.at[place].set(jnp.arange(listed.size, dtype=jnp.int32), mode="drop")
    column, every = _flat(column, static.piece), jnp.arange(listed.size, dtype=jnp.int32)
    source = tuple(column if spec == TOKENS else every for spec in static.places)
    hidden = tuple(x.reshape(-1, x.shape[-1]) for x in operands.hidden)
    return Walk(order, listed.sum(), source, operands.token.reshape(-1), hidden)


def _flat(column: Array, length: int) -> Array:
    return (column + length * jnp.arange(column.shape[0], dtype=jnp.int32)[:, None]).reshape(-1)


def trips(static: Static, walk: Walk) -> Array:
    """How many chunks hold the listed targets."""
    return (walk.count + static.chunk - 1) // static.chunk


class Chunk(NamedTuple):
    """The targets of one trip."""

    index: Array  # [c] where their results go; out of range for padding, whose results are dropped
    live: Array  # [c]
    source: Array  # [c] rows of the first tower's hidden states
    raw: Array  # [c, V padded] float32 logits of the first tower, before softcap and masking
    values: Callable  # raw logits of the first tower -> function's results


def read_chunk(static: Static, walk: Walk, kernels: tuple[Array, ...], i: Array) -> Chunk:
    """Gathers the i-th chunk of targets and projects it onto the vocabulary."""
    index = jax.lax.dynamic_slice_in_dim(walk.order, i * static.chunk, static.chunk)
    live = i * static.chunk + jnp.arange(static.chunk) < walk.count
    token, source = walk.token[index], tuple(rows[index] for rows in walk.source)
    raw = tuple(_project(x[rows], w) for x, rows, w in zip(walk.hidden, source, kernels, strict=True))
    frozen = tuple(
        finish_logits(x, cap, static.vocab_size) for x, cap in zip(raw[1:], static.softcaps[1:], strict=True)
    )

    def values(first: Array) -> Any:
        return static.function(token, finish_logits(first, static.softcaps[0], static.vocab_size), *frozen)

    return Chunk(jnp.where(live, index, walk.token.size), live, source[0], raw[0], values)


def _project(rows: Array, kernel: Array) -> Array:
    return over_tensor(jnp.matmul(rows.astype(kernel.dtype), over_tensor(kernel), preferred_element_type=jnp.float32))


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
    return jax.tree.map(lambda s: jnp.zeros((walk.token.size, *s.shape[1:]), s.dtype), shapes)


def _first_shape(static: Static, kernels: tuple[Array, ...]) -> Array:
    return jnp.zeros((static.chunk, kernels[0].shape[-1]), jnp.float32)


class Gradients(NamedTuple):
    """Running float32 sums of the first tower's gradients."""

    hidden: Array  # [R * T, D]
    kernel: Array  # [D, V padded]

    @classmethod
    def zeros(cls, walk: Walk, kernels: tuple[Array, ...]) -> "Gradients":
        """Where the sums start."""
        kernel = over_tensor(jnp.zeros(kernels[0].shape, jnp.float32))
        return cls(jnp.zeros(walk.hidden[0].shape, jnp.float32), kernel)

    def add(self, walk: Walk, kernels: tuple[Array, ...], chunk: Chunk, dlogits: Array) -> "Gradients":
        """Adds one chunk's, given the gradient with respect to its raw logits."""
        kernel = over_tensor(kernels[0])
        dlogits = dlogits.astype(kernel.dtype)
        rows = walk.hidden[0][chunk.source].astype(kernel.dtype)
        dhidden = jnp.matmul(dlogits, kernel.T, preferred_element_type=jnp.float32)
        dkernel = jnp.matmul(rows.T, dlogits, preferred_element_type=jnp.float32)
        return Gradients(self.hidden.at[chunk.source].add(dhidden), self.kernel + dkernel)

    def of_hidden(self, static: Static, operands: Operands) -> Array:
        """The gradient of the first tower's hidden states, as they lie on the device."""
        like, total = operands.hidden[0], self.hidden
        total = total if static.places[0] == TOKENS else sum_over_pieces(total)
        return total.reshape(like.shape).astype(like.dtype)
