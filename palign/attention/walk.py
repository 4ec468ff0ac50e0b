"""What the forms of attention share: the walk along a device's block pairs, the rule inside a pair, and the scores."""

import math
from collections.abc import Callable
from typing import NamedTuple

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


class Tokens(NamedTuple):
    """The rows' ids, and the pairs that the rule touches."""

    position: Array  # [R, T]
    group: Array  # [R, T]
    branch: Array  # [R, T]
    block_pairs: Array  # [R, N, 2]


class Walk(NamedTuple):
    """One device's rows as one list of block pairs, blocks counted through the rows."""

    ids: Array  # [n, 3, block] position, group, branch
    queries: Array  # [R * N + tail] in rising order, padding last
    keys: Array
    num_pairs: Array  # []


class Kernel(NamedTuple):
    """A form of attention, as functions of one device's rows and heads.

    Attributes:
        forward: `(scoring, query, key, value, tokens, window) -> (output, lse)`. What the log-sum-exp looks like is the
            form's own business, but rows are its first axis and heads (or key heads) its third.
        backward: `(scoring, query, key, value, tokens, window, output, lse, cotangent) -> (dquery, dkey, dvalue)`.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


def make_walk(tokens: Tokens, *, tail: int) -> Walk:
    """Puts the rows' lists together, padding last.

    Args:
        tokens: one device's rows.
        tail: entries of padding that there are at least.

    Raises:
        ValueError: the list's length is no causal bound.
    """
    rows, length = tokens.position.shape
    block = block_size(length, tokens.block_pairs.shape[1])
    blocks = length // block
    ids = jnp.stack([x.reshape(rows * blocks, block) for x in tokens[:3]], axis=1)
    listed = (tokens.block_pairs[..., 1] >= 0).reshape(-1)
    flat = (tokens.block_pairs + blocks * jnp.arange(rows, dtype=jnp.int32)[:, None, None]).reshape(-1, 2)
    place = jnp.where(listed, jnp.cumsum(listed) - 1, listed.size + tail)
    queries, keys = jnp.zeros((2, listed.size + tail), jnp.int32).at[:, place].set(flat.T, mode="drop")
    return Walk(ids, queries, keys, listed.sum())


def sort_by_key(walk: Walk) -> Walk:
    """The same pairs sorted by key block, then query block."""
    padding = jnp.arange(walk.keys.size) >= walk.num_pairs
    order = jnp.argsort(jnp.where(padding, walk.ids.shape[0], walk.keys), stable=True)
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
