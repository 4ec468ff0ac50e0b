"""Tries the settings that decide memory and time, and ranks those that fit."""

import dataclasses
import itertools
import pathlib
import pprint
from collections.abc import Iterator, Mapping
from typing import Any

from palign.config.schema import RunConfig
from palign.models.config import padded_vocabulary
from palign.plan.cost import RECOMPUTED, kept_values, layer_products
from palign.plan.plan import DoesNotFitError, Origin, Plan, make_plan
from palign.plan.show import print_sweep
from palign.plan.topology import GIB, Topology
from palign.train.metrics import say

SWEPT = ("mesh.data", "mesh.fsdp", "model.remat", "data.micro_batches")


def sweep(config: RunConfig, topology: Topology, origin: Origin, *, prefix: str = "", responses: int = 0) -> list[Plan]:
    """Compiles every variant that could fit, prints how each one does, and then the ranking.

    Args:
        config: of one run; its values of the settings in `SWEPT` are replaced.
        topology: which devices.
        origin: where the config comes from; a plan's overrides hold its variant too.
        prefix: of the swept keys where the config has stages, such as `stages.dpo.`.
        responses: of an example; see `abstract_step`.

    Returns:
        The plans that fit, the shortest time a token first.

    Raises:
        ValueError: none fits, or the config is wrong whatever the variant.
    """
    variants = list(_variants(config, topology.slices * topology.per_slice))
    possible = [variant for variant in variants if least_memory(variant) <= topology.chip.memory]
    say(f"{topology.name}: {len(variants)} variants, {len(variants) - len(possible)} of them too large by arithmetic")
    plans = []
    for variant in possible:
        settings = tuple(f"{prefix}{key}={_setting(variant, key)}" for key in SWEPT)
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


def _variants(config: RunConfig, devices: int) -> Iterator[RunConfig]:
    rows = config.data.rows_per_step
    pieces = [n for n in range(1, devices + 1) if devices % n == 0 and config.model.dim % n == 0]
    parts = [n for n in range(1, rows + 1) if rows % n == 0 and (rows // n) % devices == 0]
    for fsdp, remat, micro_batches in itertools.product(pieces, RECOMPUTED, parts):
        yield dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, data=devices // fsdp, fsdp=fsdp),
            model=dataclasses.replace(config.model, remat=remat),
            data=dataclasses.replace(config.data, micro_batches=micro_batches),
        )


def least_memory(config: RunConfig) -> float:
    """Bytes that a device needs at least: parameters, their gradient, and what layers keep for the backward."""
    model, data, mesh = config.model, config.data, config.mesh
    parameters = layer_products(model) + padded_vocabulary(model) * model.dim * (2 - model.tie_embedding)
    tokens = data.rows_per_step // data.micro_batches * data.row_length / (mesh.data * mesh.fsdp)
    return 8 * parameters / mesh.fsdp + 2 * model.num_layers * tokens * kept_values(model)


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
