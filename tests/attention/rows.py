"""Random packed rows, and a form of attention beside the dense rule: what the tests of every form share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from palign.attention.attend import attend
from palign.attention.block_pairs import list_block_pairs
from palign.attention.dense import attend_dense
from tests.trees import random_ids

EVERYTHING = 2**30


@functools.cache
def compile_both(kernel, softcap=None):
    """`(arrays, ids, pairs, window) -> ((output, gradients) by block pairs, the same by the dense rule)`."""

    def pull(function, arrays, cotangent):
        output, pull_back = jax.vjp(function, *arrays)
        return output, pull_back(cotangent.astype(output.dtype))

    @jax.jit
    def both(arrays, ids, pairs, window):
        (*qkv, cotangent), (group, branch, position) = arrays, ids
        options = dict(scale=0.25, softcap=softcap)
        by_pairs = lambda q, k, v: attend(q, k, v, position, group, branch, pairs, window, kernel=kernel, **options)
        dense = lambda q, k, v: attend_dense(q, k, v, position, group, branch, window, **options)
        return pull(by_pairs, qkv, cotangent), pull(dense, [x.astype(jnp.float32) for x in qkv], cotangent)

    return both


def random_arrays(rng, *, rows, tokens, heads, key_heads, width):
    """Query, key, value and the output's cotangent."""
    shapes = [(rows, tokens, n, width) for n in (heads, key_heads, key_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def random_rows(rng, *, rows, tokens, block, shuffle=False):
    """Group, branch, position as `[3, rows, tokens]`, and the rows' lists."""
    made = [random_ids(rng, tokens) for _ in range(rows)]
    made = [shuffle_blocks(rng, row, block) for row in made] if shuffle else made
    pairs = np.stack([list_block_pairs(*row, block) for row in made])
    return jnp.asarray(np.stack(made, axis=1)), jnp.asarray(pairs)


def shuffle_blocks(rng, ids, block):
    """The row's blocks in another order, and the tokens inside each: as many pairs of blocks as before."""
    tokens = ids.shape[1]
    order = rng.permuted(np.arange(tokens).reshape(-1, block)[rng.permutation(tokens // block)], axis=1)
    return ids[:, order.reshape(-1)]
