"""What a sweep tries, what it leaves out, and what it writes."""

import dataclasses
import math

import pytest

from palign.config.load import load_plain, resolve_recipe
from palign.config.schema import DataConfig, MeshConfig, ModelConfig, RunConfig
from palign.plan import sweep as sweeping
from palign.plan.plan import DoesNotFitError, Origin
from palign.plan.sweep import AXES, list_variants, sweep, write_config
from palign.plan.topology import parse_topology
from palign.sharding.mesh import make_mesh
from palign.train.build import check_rows
from tests.plan.test_plan import tiny_plan

MODEL = ModelConfig(vocab_size=256, num_layers=2, dim=48, num_heads=4, num_key_heads=2, head_dim=16, hidden_dim=64)
CONFIG = RunConfig(
    model=MODEL, data=DataConfig(max_length=64, row_length=128, rows_per_step=16, block=16), mesh=MeshConfig(fsdp=-1)
)
PLAIN = """from ml_collections import ConfigDict


def get_config():
    model = dict(vocab_size=256, num_layers=2, dim=48, num_heads=4, num_key_heads=2, head_dim=16, hidden_dim=64)
    return ConfigDict(dict(model=model, data=dict(max_length=64, row_length=128, rows_per_step=16, block=16)))
"""


def variants(topology, axes=("fsdp",), config=CONFIG):
    return list(list_variants(config, parse_topology(topology), axes))


@pytest.mark.parametrize("axes", [("fsdp",), ("tensor",), ("fsdp", "tensor"), ("context",), AXES], ids="+".join)
def test_every_variant_is_a_mesh_of_all_devices_that_the_sizes_allow(axes):
    found = variants("cpu:8", axes)
    for variant in found:
        make_mesh(**dataclasses.asdict(variant.mesh))
        check_rows(variant, make_mesh(**dataclasses.asdict(variant.mesh)))
    meshes = {tuple(getattr(variant.mesh, axis) for axis in AXES) for variant in found}
    sizes = {axis: {mesh[i] for mesh in meshes} for i, axis in enumerate(AXES)}
    assert sizes["fsdp"] == {1, 2, 4, 8}  # 8 divides the width 48; -1 in the config leaves the axis free
    assert sizes["tensor"] == ({1, 2, 4} if "tensor" in axes else {1})  # 8 does not divide four heads
    assert sizes["context"] == ({1, 2, 4, 8} if "context" in axes else {1})
    assert {variant.model.remat for variant in found} == {"none", "dots", "attention", "full"}
    assert len(found) == len({(v.mesh, v.model.remat, v.data.micro_batches) for v in found})


def test_an_axis_that_is_not_swept_keeps_the_size_that_the_config_gives_it():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2, tensor=2))
    assert {(v.mesh.fsdp, v.mesh.tensor) for v in variants("cpu:8", ("fsdp",), config)} == {(1, 2), (2, 2), (4, 2)}


def test_an_axis_spans_the_slices_of_a_tpu():
    meshes = {variant.mesh for variant in variants("2xv5e:2x2")}
    assert all(math.prod((m.dcn_data, m.dcn_fsdp)) == 2 for m in meshes)
    assert {(m.data, m.fsdp, m.dcn_data) for m in meshes} == {
        (8, 1, 2),
        (4, 2, 2),
        (4, 2, 1),
        (2, 4, 2),
        (2, 4, 1),
        (1, 8, 1),
    }
    assert {variant.mesh.dcn_data for variant in variants("h100:2x8")} == {1}


def test_what_fits_is_ranked_and_the_best_is_a_config_that_loads(monkeypatch, tmp_path, capsys):
    """Compilation is replaced: variants with few pieces do not fit, and more micro-batches take longer."""
    tried = []

    def compile_variant(config, topology, origin, responses):
        tried.append(config)
        if config.mesh.fsdp < 4:
            raise DoesNotFitError("too large")
        times = tiny_plan().times._replace(compute=float(config.data.micro_batches) / config.mesh.fsdp)
        return dataclasses.replace(tiny_plan(), origin=origin, times=times)

    monkeypatch.setattr(sweeping, "make_plan", compile_variant)
    (tmp_path / "x.py").write_text(PLAIN)
    origin = Origin(str(tmp_path / "x.py"), "x", ())
    plans = sweep(CONFIG, parse_topology("cpu:8"), origin)
    assert len(tried) == len(variants("cpu:8")) and len(plans) == sum(c.mesh.fsdp >= 4 for c in tried)
    assert [p.seconds_per_token for p in plans] == sorted(p.seconds_per_token for p in plans)
    assert {"mesh.fsdp=8", "data.micro_batches=1"} <= set(plans[0].origin.overrides)
    assert "does not fit" in capsys.readouterr().err
    best = tmp_path / "best.py"
    write_config(plans[0], load_plain(origin.config, plans[0].origin.overrides), best)
    (stage,) = resolve_recipe(load_plain(str(best), ()), name="best").stages.values()
    assert (stage.mesh.fsdp, stage.mesh.data, stage.data.micro_batches) == (8, 1, 1)


def test_what_arithmetic_excludes_is_not_compiled(monkeypatch):
    monkeypatch.setattr(sweeping, "make_plan", lambda *_, **__: pytest.fail("compiled"))
    huge = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, num_layers=10**6))
    with pytest.raises(ValueError, match="no variant fits"):
        sweep(huge, parse_topology("cpu:8"), Origin("x.py", "x", ()))


def test_an_axis_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"--axes=fsdp,expert: 'expert' is not one of fsdp, context, tensor"):
        sweep(CONFIG, parse_topology("cpu:8"), Origin("x.py", "x", ()), axes=["fsdp", "expert"])
