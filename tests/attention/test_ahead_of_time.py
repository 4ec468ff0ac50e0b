"""The Pallas kernels compiled for chips that are not here, as a CPU can: nothing is run."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from palign import plan
from palign.attention.attend import KERNELS, attend
from palign.sharding.mesh import make_mesh, row_sharding
from tests.compiled import Collective, collectives, largest_buffer

pytestmark = pytest.mark.slow
H100 = pathlib.Path(plan.__file__).parent / "targets" / "h100.textproto"
NO_PROBES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
SHAPES = [
    dict(tokens=2048, heads=8, key_heads=2, width=128, dtype=jnp.bfloat16, softcap=None),
    dict(tokens=1024, heads=4, key_heads=1, width=64, dtype=jnp.float32, softcap=30.0),
]
of_shapes = pytest.mark.parametrize("shape", SHAPES, ids=["8 heads of 128, bfloat16", "4 heads of 64, float32"])


def compile_for(devices, name, *, tokens, heads, key_heads, width, dtype, softcap, block, context=1):
    """Forward and backward of one row a device, or of one row for several."""
    mesh = make_mesh(data=1, fsdp=-1, context=context, devices=devices)
    rows, blocks = len(devices) // context, tokens // block
    sharded = lambda shape, dtype: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=row_sharding(mesh))
    arrays = [sharded((tokens, n, width), dtype) for n in (heads, key_heads, key_heads, heads)]
    ids = [sharded((tokens,), jnp.int32)] * 3
    pairs = sharded((blocks * (blocks + 1) // 2, 2), jnp.int32)

    def run(query, key, value, cotangent, position, group, branch, pairs):
        options = dict(scale=0.1, softcap=softcap, kernel=KERNELS[name])
        of = lambda q, k, v: attend(q, k, v, position, group, branch, pairs, 512, **options)
        output, pull_back = jax.vjp(of, query, key, value)
        return output, pull_back(cotangent)

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(*arrays, *ids, pairs).compile()


def check(compiled, shape, target):
    """Three kernels, every device by itself, and no row-by-row matrix."""
    assert compiled.as_text().count(f'custom_call_target="{target}"') == 3
    assert not collectives(compiled)
    arrays = shape["tokens"] * shape["heads"] * max(shape["width"], 128)  # a TPU fills a width up to its lanes
    assert largest_buffer(compiled) <= arrays < shape["heads"] * shape["tokens"] ** 2


@of_shapes
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_kernels_compile(topology, shape, monkeypatch):
    for name, value in NO_PROBES.items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    compiled = compile_for(devices, "pallas_tpu", block=2 * shape["width"], **shape)
    check(compiled, shape, "tpu_custom_call")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_kernels_compile_for_pieces_of_rows(monkeypatch):
    for name, value in NO_PROBES.items():
        monkeypatch.setenv(name, value)
    devices, shape = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices, SHAPES[0]
    compiled = compile_for(devices, "pallas_tpu", block=256, context=2, **shape)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    keys, piece = ((1, shape["tokens"] // n, shape["key_heads"], shape["width"]) for n in (1, 2))
    # The backward pass is beside the forward here, so that what is gathered for the one serves the other.
    assert collectives(compiled) == [Collective("all-gather", keys)] * 2 + [Collective("reduce-scatter", piece)] * 2


@of_shapes
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the CUDA plugin is not installed")
def test_the_gpu_kernels_compile(shape):
    target = H100.read_text(encoding="utf-8")
    devices = topologies.get_topology_desc("h100", platform="cuda", topology="1x1x8", target_config=target).devices
    compiled = compile_for(devices, "pallas_gpu", block=64, **shape)
    check(compiled, shape, "__gpu$xla.gpu.triton")
