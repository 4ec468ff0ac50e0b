"""Tries the settings that decide memory and time, and ranks those that fit."""

import dataclasses
import itertools
import math
import pathlib
import pprint
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from palign.config.schema import MeshConfig, RunConfig
from palign.models.config import padded_vocabulary
from palign.plan.cost import RECOMPUTED, kept_values, layer_products
from palign.plan.plan import DoesNotFitError, Origin, Plan, make_plan
from palign.plan.show import print_sweep
from palign.plan.topology import GIB, Topology
from palign.train.metrics import say

AXES = ("fsdp", "context", "tensor")  # that may be swept; data takes the devices that they leave
SWEPT = (
    *("mesh.data", *(f"mesh.{axis}" for axis in AXES), "mesh.dcn_data", "mesh.dcn_fsdp"),
    *("model.remat", "data.micro_batches"),
)


def sweep(
    config: RunConfig,
    topology: Topology,
    origin: Origin,
    *,
    axes: Collection[str] = ("fsdp",),
    prefix: str = "",
    responses: int = 0,
) -> list[Plan]:
    """Compiles every variant that could fit, prints how each one does, and then the ranking.

    Args:
        config: of one run; its values of the settings in `SWEPT` are replaced.
        topology: which devices.
        origin: where the config comes from; a plan's overrides hold its variant too.
        axes: of `AXES`, whose sizes are tried; those of the others stay as they are.
        prefix: of the swept keys where the config has stages, such as `stages.dpo.`.
        responses: of an example; see `abstract_step`.

    Returns:
        The plans that fit, the shortest time a token first.

    Raises:
        ValueError: none fits, an axis that there is not, or the config is wrong whatever the variant.
    """
    if unknown := set(axes).difference(AXES):
        raise ValueError(f"--axes={','.join(axes)}: {min(unknown)!r} is not one of {', '.join(AXES)}")
    variants = list(list_variants(config, topology, axes))
    possible = [variant for variant in variants if least_memory(variant) <= topology.chip.memory]
    say(f"{topology.name}: {len(variants)} variants, {len(variants) - len(possible)} of them too large by arithmetic")
    plans = []
    for variant in possible:
        settings = tuple(f"{prefix}{key}={_setting(variant, key)}" for key in _varied(variants))
        variant_origin = origin._replace(overrides=(*origin.overrides, *settings))
        try:
            plan = make_plan(variant, topology, variant_origin, responses=responses)
        except DoesNotFitError:
            say(f"{' '.join(settings)}: does not fit")
            continue
        memory = f"{plan.memory.total / GIB:.2f} GiB"
        say(f"{' '.join(settings)}: {1e6 * plan.seconds_per_token:.3g} us a token, {memory}")
        plans.append(plan)
    if not plans:
        raise ValueError(f"--topology={topology.name}: no variant fits; use more devices, or larger ones")
    plans.sort(key=lambda plan: plan.seconds_per_token)
    print_sweep(plans)
    return plans


def list_variants(config: RunConfig, topology: Topology, axes: Collection[str]) -> Iterator[RunConfig]:
    """Every config that a sweep could compile, those that cannot fit included."""
    rows = config.data.rows_per_step
    for mesh in _meshes(config, topology, axes):
        parts = [n for n in range(1, rows + 1) if rows % n == 0 and (rows // n) % (mesh.data * mesh.fsdp) == 0]
        for remat, micro_batches in itertools.product(RECOMPUTED, parts):
            yield dataclasses.replace(
                config,
                mesh=mesh,
                model=dataclasses.replace(config.model, remat=remat),
                data=dataclasses.replace(config.data, micro_batches=micro_batches),
            )


def _meshes(config: RunConfig, topology: Topology, axes: Collection[str]) -> Iterator[MeshConfig]:
    """Every mesh of the topology's devices over which the model's and the row's sizes can be cut."""
    model, blocks = config.model, config.data.row_length // config.data.block
    heads = [model.num_heads, model.hidden_dim, padded_vocabulary(model)]
    divided = {"fsdp": [model.dim], "context": [blocks], "tensor": heads}
    devices, fixed = topology.slices * topology.per_slice, dataclasses.asdict(config.mesh)
    free = [n for n in range(1, devices + 1) if devices % n == 0]
    sizes = [free if axis in axes or fixed[axis] == -1 else [fixed[axis]] for axis in AXES]
    for chosen in itertools.product(*sizes):
        mesh, data = dict(zip(AXES, chosen, strict=True)), devices // math.prod(chosen)
        fits = not any(size % mesh[axis] for axis in AXES for size in divided[axis])
        if fits and data * math.prod(chosen) == devices:
            yield from _over_slices(MeshConfig(data=data, **mesh), topology)


def _over_slices(mesh: MeshConfig, topology: Topology) -> Iterator[MeshConfig]:
    """The axis that spans a TPU's slices is named, `data` or `fsdp`; the nodes of GPUs follow from the order."""
    if topology.slices == 1 or topology.chip.platform != "tpu":
        yield mesh
        return
    if mesh.data % topology.slices == 0:
        yield dataclasses.replace(mesh, dcn_data=topology.slices)
    if mesh.fsdp % topology.slices == 0:
        yield dataclasses.replace(mesh, dcn_fsdp=topology.slices)


def least_memory(config: RunConfig) -> float:
    """Bytes that a device needs at least: parameters, their gradient, and what layers keep for the backward."""
    model, data, mesh = config.model, config.data, config.mesh
    parameters = layer_products(model) + padded_vocabulary(model) * model.dim * (2 - model.tie_embedding)
    tokens = data.rows_per_step // data.micro_batches * data.row_length / (mesh.data * mesh.fsdp * mesh.context)
    kept = 2 * model.num_layers * tokens * kept_values(model) / mesh.tensor
    return 8 * parameters / (mesh.fsdp * mesh.tensor) + kept


def _varied(variants: Sequence[RunConfig]) -> list[str]:
    """The settings that a variant's name holds: data, fsdp, and what differs between variants or from its default."""
    plain = RunConfig()
    return [
        key
        for key in SWEPT
        if key in ("mesh.data", "mesh.fsdp", "model.remat", "data.micro_batches")
        or {_setting(variant, key) for variant in variants} != {_setting(plain, key)}
    ]


def _setting(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def write_config(plan: Plan, plain: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes a config as a file that `--config` takes.

    Args:
        plan: of the config; its first line says where the file comes from.
        plain: the nested values.
        path: of the new file.
    """
    values = {key: pprint.pformat(value, sort_dicts=False, width=100) for key, value in plain.items()}
    stages = values.pop("stages", "")
    lines = [
        f'"""{plan.origin.config} as `palign.cli.plan --sweep` chose for {plan.topology}."""\n',
        "from ml_collections import ConfigDict\n",
        *(["from palign.config.load import ordered\n"] if stages else []),
        "\ndef get_config() -> ConfigDict:",
        "    config = ConfigDict()",
        *(f"    config.{key} = {value}" for key, value in values.items()),
        *([f"    config.stages = ordered(**{stages})"] if stages else []),
        "    return config\n",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
