"""Collectives and faults, read from programs whose exchanges are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from palign.plan.program import Collective, Expectation, Shape, by_kind, find_faults, read_collectives, stacked_shapes
from palign.sharding.mesh import make_mesh
from tests.compiled import uncached

# ruff: noqa: E501

# As libtpu writes it: a reduce-scatter is an all-reduce in a computation of that name, a loop's length stands in its
# condition, and an exchange that is overlapped with other work appears once in every part of its chain.
TPU = """
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[512,64]) -> bf16[64,64] {
  %input = bf16[512,64]{1,0} parameter(0)
  %all-reduce.1 = bf16[512,64]{1,0:T(8,128)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[64,64]{1,0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={64,64}
}

%async_fusion.1 (p: bf16[1,64,32]) -> bf16[1,512,32] {
  ROOT %all-gather.1 = bf16[1,512,32]{2,1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=1,'b'=8,'c'=1] {'b'}, dimensions={1}, frontend_attributes={chain_id="7"}
}

%async_fusion.2 (p: bf16[1,64,32]) -> bf16[1,512,32] {
  ROOT %all-gather.2 = bf16[1,512,32]{2,1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=1,'b'=8,'c'=1] {'b'}, dimensions={1}, frontend_attributes={chain_id="7"}
}

%head_body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %all-reduce.2 = f32[256]{0} all-reduce(%x), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}

%head_condition (p: (s32[], s32[])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%layers_body (p: (s32[])) -> (s32[]) {
  %a = bf16[1,512,32]{2,1,0} fusion(%w), kind=kCustom, calls=%async_fusion.1
  %b = bf16[1,512,32]{2,1,0} fusion(%a), kind=kCustom, calls=%async_fusion.2
  %c = bf16[64,64]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}

%layers_condition (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %layers = (s32[]) while(%t), condition=%layers_condition, body=%layers_body
  %head = (s32[], s32[]) while(%u), condition=%head_condition, body=%head_body
}
"""


def test_a_tpu_program_is_read_with_its_loops():
    found = read_collectives(TPU, slice_of=[0] * 4 + [1] * 4, unknown_trips=5)
    assert sorted(found) == [
        Collective("all-gather", (Shape("bf16", (1, 512, 32)),), 8, 2, 6, True),
        Collective("all-reduce", (Shape("f32", (256,)),), 2, 2, 5, False),  # devices 0 and 4
        Collective("reduce-scatter", (Shape("bf16", (512, 64)),), 8, 2, 6, True),
    ]
    gather, reduce, scatter = sorted(found)
    assert gather.over_links == 6 * 512 * 32 * 2 * 7 / 8
    assert gather.over_network == 6 * 512 * 32 * 2 / 2 / 4  # half comes from the other slice, through four devices
    assert scatter.over_links == 6 * 512 * 64 * 2 * 7 / 8
    assert (reduce.over_links, reduce.over_network) == (0, 5 * 256 * 4)  # twice half of it, one device a slice


def test_gpu_exchanges_count_what_is_whole():
    text = """ENTRY %main (p: f32[8]) -> f32[8] {
  %g = ((bf16[4,8]{1,0}, f32[2]{0}), (bf16[16,8]{1,0}, f32[8]{0})) all-gather-start(%p, %q), channel_id=1, replica_groups={{0,1,2,3}}
  %s = ((bf16[16,8]{1,0}), bf16[4,8]{1,0}) reduce-scatter-start(%p), channel_id=2, replica_groups={{0,1,2,3}}
  %r = f32[9]{0} all-reduce-start(%p), channel_id=3, replica_groups={{0,1,2,3}}
  %o = f32[9]{0} all-reduce-start(%p), channel_id=4, replica_groups={{0},{1}}
}"""
    found = {c.kind: c.shapes for c in read_collectives(text)}
    assert found == {
        "all-gather": (Shape("bf16", (16, 8)), Shape("f32", (8,))),
        "reduce-scatter": (Shape("bf16", (16, 8)),),
        "all-reduce": (Shape("f32", (9,)),),  # that of single devices is none
    }


@pytest.mark.parametrize(
    ("written", "members"),
    [
        ("{{0,2},{1,3}}", [0, 2]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [0, 2]),
    ],
)
def test_groups_are_read_in_every_way_of_writing_them(written, members):
    """A group crosses slices where its devices do; every device is a slice of its own here."""
    line = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={written}, x\n}}"
    (found,) = read_collectives(line, slice_of=[1 if n in members[1:] else 0 for n in range(8)])
    assert found.group == len(members) and found.slices == 2
    (found,) = read_collectives(line, slice_of=[0 if n in members else 1 for n in range(8)])
    assert found.slices == 1


@pytest.fixture(scope="module")
def scanned():
    """A scan over six layers of weights cut over eight devices, gathered one by one, and all at once."""
    mesh, layers, dim = make_mesh(data=1, fsdp=8), 6, 32
    weights = jax.ShapeDtypeStruct((layers, dim, dim), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    rows = jax.ShapeDtypeStruct((64, dim), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

    def run(gather_all, x, w):
        whole = lambda a: jax.lax.with_sharding_constraint(a, P())
        layer = lambda x, w: (jnp.tanh(x @ (w if gather_all else whole(w))), None)
        return jax.lax.scan(layer, x, whole(w) if gather_all else w)[0]

    with uncached(), jax.set_mesh(mesh):
        return {
            name: jax.jit(run, static_argnums=0).lower(gather_all, rows, weights).compile().as_text()
            for name, gather_all in (("one by one", False), ("all at once", True))
        }


def test_weights_gathered_in_a_loop_are_counted_once_a_layer(scanned):
    ((kind, crosses, found),) = by_kind(read_collectives(scanned["one by one"]))
    assert (kind, crosses) == ("all-gather", False)
    assert sum(c.bytes for c in found) == 6 * 32 * 32 * 4 and all(c.counted for c in found)


def test_a_stacked_parameter_gathered_outside_the_loop_is_a_fault(scanned):
    expected = Expectation(
        stacked_shapes([(6, 32, 32), (6, 32)]), 1, rows=8, vocabulary=999, dim=32, gathers=("all-gather",)
    )
    faults = {name: find_faults(text, read_collectives(text), expected) for name, text in scanned.items()}
    assert faults["one by one"] == []
    assert faults["all at once"] == ["all-gather of a whole stacked parameter, f32[6,32,32]"]


def test_logits_of_all_positions_are_a_fault_and_a_chunk_and_the_kernel_are_none():
    expected = Expectation(frozenset(), 1, rows=128, vocabulary=640, dim=256, gathers=())
    chunk, kernel, everything = "f32[64,640]{1,0}", "bf16[256,640]{1,0}", "f32[2,64,640]{2,1,0}"
    assert find_faults(f"{chunk} {kernel}", [], expected) == []
    assert find_faults(f"{chunk} {everything}", [], expected) == ["logits of all positions, [2,64,640]"]
