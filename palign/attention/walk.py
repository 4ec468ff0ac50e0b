"""What the forms of attention share: the walk along a device's block pairs, the rule inside a pair, and the scores."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

NEVER = -1e30  # a score no softmax sees; finite, so that differences of two of them are 0 and not NaN


class Scoring(NamedTuple):
    """From a product of query and key to a score; fixed at trace time."""

    scale: float
    softcap: float | None

    def scores(self, products: Array) -> Array:
        """`scale * products`, capped."""
        scores = products * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def pull_back(
        self, products: Array, dweights: Array, allowed: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array]:
        """The weights of the forward pass again, and the cotangent of the products.

        Args:
            products: query . key.
            dweights: the weights' cotangent, the output's cotangent . value.
            allowed: what the rule lets a query see.
            lse: log-sum-exp of each query's scores; broadcasts against the products, like all others here.
            delta: output . its cotangent, of each query.
        """
        scores = self.scores(products)
        weights = jnp.where(allowed, jnp.exp(scores - lse), 0.0)
        dscores = weights * (dweights - delta)
        if self.softcap is not None:
            dscores = dscores * (1.0 - (scores / self.softcap) ** 2)
        return weights, dscores * self.scale


class Ids(NamedTuple):
    """Where tokens stand in their trees."""

    position: Array  # [R, T]
    group: Array  # [R, T]
    branch: Array  # [R, T]


class Tokens(NamedTuple):
    """Queries and keys of the rows, and the pairs of their blocks that the rule touches."""

    query: Ids  # of the rows, or of one piece of each
    key: Ids  # of the rows
    block_pairs: Array  # [R, N, 2]; what is not listed has a negative key block


class Walk(NamedTuple):
    """One device's rows as one list of block pairs, blocks counted through the rows."""

    query_ids: Array  # [n, 3, block] position, group, branch
    key_ids: Array  # [m, 3, block]
    queries: Array  # [pairs + tail] in rising order, padding last
    keys: Array
    num_pairs: Array  # []

    @property
    def block(self) -> int:
        """Tokens in a block."""
        return self.key_ids.shape[-1]

    @property
    def padding(self) -> Array:
        """Which entries of the list are none."""
        return jnp.arange(self.keys.size) >= self.num_pairs


class Kernel(NamedTuple):
    """A form of attention, as functions of one device's rows and heads: all their keys, all queries or a piece of them.

    Attributes:
        forward: `(scoring, query, key, value, tokens, window) -> (output, lse)`. What the log-sum-exp looks like is the
            form's own business, but rows are its first axis, tokens (or blocks) its second and heads (or key heads) its
            third.
        backward: `(scoring, query, key, value, tokens, window, output, lse, cotangent) -> (dquery, dkey, dvalue)`.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


def own_queries(tokens: Tokens, piece: Array, pieces: int) -> Tokens:
    """Of whole rows, the queries of one piece, and the pairs that they are in.

    Args:
        tokens: the queries are all tokens of the rows.
        piece: which, from 0.
        pieces: equal ones that a row is cut into, each of whole blocks.

    Raises:
        ValueError: the row's blocks cannot be shared evenly.
    """
    length = tokens.key.position.shape[1]
    blocks = length // block_size(length, tokens.block_pairs.shape[1])
    if blocks % pieces:
        raise ValueError(
            f"attend: rows of {blocks} blocks cannot be cut into {pieces} pieces (config.mesh.context) of whole "
            "blocks; make them a multiple"
        )
    size, blocks = length // pieces, blocks // pieces
    query = Ids(*(jax.lax.dynamic_slice_in_dim(x, piece * size, size, axis=1) for x in tokens.query))
    queries, keys = jnp.moveaxis(tokens.block_pairs, -1, 0)
    holder, queries = jnp.divmod(queries, blocks)
    return Tokens(query, tokens.key, jnp.stack([queries, jnp.where(holder == piece, keys, -1)], axis=-1))


def make_walk(tokens: Tokens, *, tail: int) -> Walk:
    """Puts the rows' lists together, padding last.

    Args:
        tokens: one device's rows.
        tail: entries of padding that there are at least.

    Raises:
        ValueError: the list's length is no causal bound.
    """
    rows, length = tokens.key.position.shape
    capacity = tokens.block_pairs.shape[1]
    block = block_size(length, capacity)
    query_ids, key_ids = (jnp.stack([x.reshape(-1, block) for x in side], axis=1) for side in tokens[:2])
    blocks = [ids.shape[0] // rows for ids in (query_ids, key_ids)]
    listed = (tokens.block_pairs[..., 1] >= 0).reshape(-1)
    first = jnp.arange(rows, dtype=jnp.int32)[:, None] * jnp.array([blocks], jnp.int32)
    flat = (tokens.block_pairs + first[:, None]).reshape(-1, 2)
    size = rows * min(capacity, math.prod(blocks)) + tail  # a piece of a row has fewer pairs than the row
    place = jnp.where(listed, jnp.cumsum(listed) - 1, size)
    queries, keys = jnp.zeros((2, size), jnp.int32).at[:, place].set(flat.T, mode="drop")
    return Walk(query_ids, key_ids, queries, keys, listed.sum())


def sort_by_key(walk: Walk) -> Walk:
    """The same pairs sorted by key block, then query block."""
    order = jnp.argsort(jnp.where(walk.padding, walk.key_ids.shape[0], walk.keys), stable=True)
    return walk._replace(queries=walk.queries[order], keys=walk.keys[order])


def block_size(length: int, capacity: int) -> int:
    """The block size that makes `capacity` the causal bound n (n + 1) / 2 of n = length / block blocks.

    Raises:
        ValueError: there is none.
    """
    blocks = (math.isqrt(8 * capacity + 1) - 1) // 2
    if blocks * (blocks + 1) // 2 != capacity or length % blocks:
        raise ValueError(
            f"attend: {capacity} block pairs for rows of {length} tokens; expected n * (n + 1) / 2 with n dividing "
            "the row length. Build the list with attention.block_pairs.list_block_pairs and its default capacity."
        )
    return length // blocks


def visible(query: tuple[Array, Array, Array], key: tuple[Array, Array, Array], window: Array) -> Array:
    """The rule. Query and key are (position, group, branch), shaped so that they broadcast against each other."""
    (position_q, group_q, branch_q), (position_k, group_k, branch_k) = query, key
    distance = position_q - position_k
    allowed = (group_q == group_k) & (group_q > 0)
    allowed &= (branch_k == 0) | (branch_k == branch_q)
    return allowed & (distance >= 0) & (distance < window)
