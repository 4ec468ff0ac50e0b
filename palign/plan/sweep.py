"""Tries the settings that decide memory and time, and ranks those that fit."""

import copy
import dataclasses
import itertools
import pathlib
import pprint
from collections.abc import Iterator, Mapping
from typing import Any

from palign.config.schema import RunConfig
from palign.models.config import padded_vocabulary
from palign.plan.cost import RECOMPUTED, layer_products, layer_values
from palign.plan.plan import DoesNotFitError, Origin, Plan, make_plan
from palign.plan.topology import GIB, Topology
from palign.train.metrics import say

SWEPT = ("mesh.data", "mesh.fsdp", "model.remat", "data.micro_batches")


def sweep(config: RunConfig, topology: Topology, origin: Origin, *, responses: int = 0) -> list[Plan]:
    """Compiles every variant that could fit, and prints how each one does.

    Args:
        config: of one run; its values of the settings in `SWEPT` are replaced.
        topology: which devices.
        origin: where the config comes from; a plan's overrides hold its variant too.
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
        settings = tuple(f"{key}={_setting(variant, key)}" for key in SWEPT)
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
    return sorted(plans, key=lambda plan: plan.seconds_per_token)


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
    kept = model.dim if RECOMPUTED[model.remat] else layer_values(model) / 2  # of what is read and written, one side
    return 8 * parameters / mesh.fsdp + 2 * model.num_layers * tokens * kept


def _setting(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def write_config(plan: Plan, plain: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the config of a sweep's plan as a file that `--config` takes.

    Args:
        plan: the one to write.
        plain: the nested values of the config that was swept.
        path: of the new file.
    """
    values, stages = copy.deepcopy(dict(plain)), dict(plain.get("stages") or {})
    values.pop("stages", None)
    chosen = stages[plan.origin.stage] = copy.deepcopy(stages[plan.origin.stage]) if stages else values
    for key, value in (setting.split("=") for setting in plan.origin.overrides[-len(SWEPT) :]):
        section, name = key.split(".")
        chosen.setdefault(section, {})[name] = (
            {"True": True, "False": False}.get(value) if value.isalpha() else int(value)
        )
    given = (
        f"    config.stages = ordered(**{pprint.pformat(stages, sort_dicts=False)})\n" if plain.get("stages") else ""
    )
    path.write_text(
        f'"""{plan.origin.config}, stage {plan.origin.stage}, as `palign.cli.plan --sweep` chose for {plan.topology}."""\n\n'
        "from ml_collections import ConfigDict\n\n"
        + ("from palign.config.load import ordered\n\n\n" if given else "\n")
        + f"def get_config() -> ConfigDict:\n    config = ConfigDict({pprint.pformat(values, sort_dicts=False)})\n"
        + f"{given}    return config\n",
        encoding="utf-8",
    )
