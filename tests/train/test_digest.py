"""A fingerprint of weights: the same on any mesh, another for any bit in any place."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from palign.sharding.mesh import make_mesh
from palign.train.digest import digest
from tests.compiled import uncached


def tree():
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 8, 16)).astype(np.float32), "b": rng.normal(size=16).astype(np.float32)}
    return jax.tree.map(jnp.asarray, weights)


def test_weights_that_are_cut_over_devices_have_the_fingerprint_of_those_that_are_not():
    whole, mesh = tree(), make_mesh(data=2, fsdp=4)
    with uncached():
        for spec in (P(), P(None, "fsdp"), P("data", None, "fsdp")):
            cut = {"w": jax.device_put(whole["w"], NamedSharding(mesh, spec)), "b": whole["b"]}
            assert digest(cut) == digest(whole)
    assert digest(jax.device_get(whole)) == digest(whole) and len(digest(whole)) == 64


def test_any_change_gives_another_fingerprint():
    whole = tree()
    w = np.asarray(whole["w"])
    one_bit, swapped = w.copy(), w.copy()
    one_bit.view(np.uint32)[3, 7, 15] ^= 1
    swapped[0, 0, [0, 1]] = w[0, 0, [1, 0]]
    others = [
        {"w": one_bit, "b": whole["b"]},
        {"w": swapped, "b": whole["b"]},
        {"w": w[::-1], "b": whole["b"]},
        {"w": w.reshape(8, 4, 16), "b": whole["b"]},
        {"v": w, "b": whole["b"]},
        {"w": w},
        {"w": w.view(np.int32), "b": whole["b"]},
        {"w": w.astype(jnp.bfloat16), "b": whole["b"]},
        {"w": np.where(w == w[0, 0, 0], -0.0, w), "b": whole["b"]},
        {"w": np.where(w == w[0, 0, 0], 0.0, w).astype(np.float32), "b": whole["b"]},
    ]
    assert len({digest(other) for other in (whole, *others)}) == len(others) + 1
