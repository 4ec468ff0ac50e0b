"""A fingerprint of weights that does not depend on how they are spread over devices and processes."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from palign.sharding.mesh import SHARED
from palign.sharding.rules import on_device

LANES = 4  # independent 32-bit sums


def digest(params: Any) -> str:
    """A content hash of all weights, in hex: of their names, shapes, types and every bit in its place.

    Each leaf is reduced where it lies, by sums modulo 2^32, whose order does not matter; SHA-256 puts them together.
    It tells weights apart; it is no protection against someone who wants two to look alike.
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = jnp.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        sha.update(jax.device_get(_compile(leaf.sharding)(leaf)).tobytes())
    return sha.hexdigest()


@functools.cache
def _compile(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    whole = NamedSharding(sharding.mesh, SHARED) if isinstance(sharding, NamedSharding) else None
    return jax.jit(_sums, out_shardings=whole)  # every process reads the sums


def _sums(leaf: jax.Array) -> jax.Array:
    leaf = on_device(leaf)
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    lanes = [_mix(bits ^ _mix(place + jnp.uint32(lane * 0x9E3779B9 % 2**32))) for lane in range(LANES)]
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in lanes])


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: spreads every bit of a word over all of it."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
