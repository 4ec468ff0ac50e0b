"""A plan: what one step of a config needs of every chip of a topology, compiled for it and computed beside it."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from palign.config.schema import RunConfig
from palign.models.config import padded_vocabulary
from palign.plan.cost import Times, Work, bytes_on_device, bytes_on_host, times_of, work_of
from palign.plan.devices import topology_devices
from palign.plan.program import Collective, Expectation, by_kind, find_faults, read_collectives, stacked_shapes
from palign.plan.step import AbstractStep, abstract_step
from palign.plan.topology import GIB, Topology

REMEDIES = (
    "more devices along config.mesh.fsdp, config.model.remat, more config.data.micro_batches, a shorter "
    "config.data.row_length, a smaller config.objective.head_chunk, or config.objective.reference='cached'"
)


class Origin(NamedTuple):
    """Where a config comes from."""

    config: str  # its file
    stage: str
    overrides: tuple[str, ...]  # KEY=VALUE


class DoesNotFitError(ValueError):
    """The step needs more memory than a device has."""


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: int  # computed from shapes and shardings, like the four that follow
    optimizer: int
    frozen: int
    host: int  # of the frozen, in the host's memory
    batch: int
    temporary: int  # compiled: activations, gradients, gathered weights, whatever lives inside a step only
    total: int  # compiled: arguments, results that do not take an argument's place, and the temporary
    available: int  # of the chip


class Exchange(NamedTuple):
    """All collectives of a kind."""

    kind: str
    over: str  # links (inside a slice or node) or network
    times: int  # compiled
    bytes: int  # compiled: of the whole arrays
    moved: int  # computed: received by every device, of what crosses over the network alone
    counted: bool  # whether all trip counts stand in the program; else computed


class Step(NamedTuple):
    """What a step takes in, as assumed."""

    tokens: int
    targets: int
    examples: int
    responses: int  # of an example
    part: int  # tokens of a prompt, and of a response


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One config on one topology. Everything is of one step, and of one device where not said otherwise."""

    origin: Origin
    topology: str
    devices: int
    mesh: dict[str, int]
    settings: dict[str, Any]  # those that a sweep may change, and what decides the sizes
    parameters: int  # of the model, all devices
    step: Step  # all devices
    memory: Memory
    work: Work
    exchanges: tuple[Exchange, ...]
    times: Times
    faults: tuple[str, ...]
    compile_seconds: float
    jax_version: str = jax.__version__

    def mfu(self, seconds: float) -> float:
        """Useful FLOPs over what the chips could do in so many seconds."""
        return self.work.model_flops / (seconds * self.peak)

    @property
    def share(self) -> float:
        """Of the device's memory that is taken."""
        return self.memory.total / self.memory.available

    @property
    def peak(self) -> float:
        """FLOP/s of a chip."""
        return self.work.flops / self.times.compute

    @property
    def seconds_per_token(self) -> float:
        """What sweeps compare: the step's work one after another."""
        return self.times.one_after_another / self.step.tokens


def make_plan(config: RunConfig, topology: Topology, origin: Origin, *, responses: int = 0) -> Plan:
    """Compiles the training step for a topology and reads what it needs.

    Args:
        config: of one run.
        topology: which devices; none of them needs to exist.
        origin: where the config comes from, for the report.
        responses: of an example; see `abstract_step`.

    Raises:
        ValueError: the config cannot be trained so.
        DoesNotFitError: the step needs more memory than a device has.
    """
    devices = topology_devices(topology)
    step = abstract_step(config, devices, responses=responses)
    began = time.monotonic()
    compiled = _compile(step, topology)
    seconds = time.monotonic() - began
    memory = _memory(step, compiled.memory_analysis(), int(topology.chip.memory))
    if memory.total > memory.available:
        raise DoesNotFitError(_too_large(step, topology, f"{_gib(memory.total)} of {_gib(memory.available)}"))
    text, work = compiled.as_text(), work_of(step)
    collectives = read_collectives(text, slice_of=_slices(step), unknown_trips=_head_trips(step))
    return Plan(
        origin=origin,
        topology=topology.name,
        devices=len(devices),
        mesh=dict(step.mesh.shape),
        settings=_settings(step.config),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(step.state.params)),
        step=_step(step),
        memory=memory,
        work=work,
        exchanges=_exchanges(collectives),
        times=times_of(work, collectives, topology.chip),
        faults=tuple(find_faults(text, collectives, _expectation(step))),
        compile_seconds=round(seconds, 1),
    )


def _compile(step: AbstractStep, topology: Topology) -> Any:
    try:
        with jax.set_mesh(step.mesh):
            return step.compiled.lower(step.state, step.aux, step.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # "Used 37.17G of 15.75G hbm", or "... (1.82T) exceeds available HBM (30.75G)"
        said = re.search(r"(?!RESOURCE)[^.:\n]*[\d.]+[KMGT]\)? (?:of|exceeds).*?[\d.]+[KMGT]\b[^.\n]*", str(error))
        raise DoesNotFitError(_too_large(step, topology, (said[0] if said else str(error)[:200]).strip())) from None


def _too_large(step: AbstractStep, topology: Topology, said: str) -> str:
    parts = {"parameters": step.state.params, "optimizer": step.state.opt_state, "frozen models": step.aux}
    placed = ", ".join(f"{name} {_gib(bytes_on_device(tree))}" for name, tree in parts.items())
    return f"--topology={topology.name}: does not fit, the compiler says: {said} ({placed} a device); try {REMEDIES}"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _memory(step: AbstractStep, analysis: Any, available: int) -> Memory:
    arguments, results = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    return Memory(
        parameters=bytes_on_device(step.state.params),
        optimizer=bytes_on_device(step.state.opt_state),
        frozen=bytes_on_device(step.aux),
        host=bytes_on_host(step.aux),
        batch=bytes_on_device(step.batch),
        temporary=analysis.temp_size_in_bytes,
        total=arguments + results - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes,
        available=available,
    )


def _slices(step: AbstractStep) -> Sequence[int]:
    """The slice (TPU) or node (GPU: its process) of every device, in the mesh's order."""

    def slice_of(device: jax.Device) -> int:
        return device.process_index if device.platform == "gpu" else getattr(device, "slice_index", 0)

    return [slice_of(device) for device in step.mesh.devices.flat]


def _head_trips(step: AbstractStep) -> int:
    """Loops whose length is data and that hold collectives are the heads': how often they run on a full row."""
    targets = step.rows_per_device * int(np.sum(step.row.target_slot > 0))
    return math.ceil(targets / step.config.objective.head_chunk)


def _exchanges(collectives: Sequence[Collective]) -> tuple[Exchange, ...]:
    return tuple(
        Exchange(
            kind=kind,
            over="network" if crosses else "links",
            times=sum(c.times for c in those),
            bytes=sum(c.bytes for c in those),
            moved=round(sum(c.over_network if crosses else c.over_links for c in those)),
            counted=all(c.counted for c in those),
        )
        for kind, crosses, those in by_kind(collectives)
    )


def _expectation(step: AbstractStep) -> Expectation:
    model, mesh = step.config.model, dict(step.mesh.shape)
    pure = mesh["data"] == 1  # where there are copies, their gradients are added up whole
    gathers = ("all-gather", "all-to-all", "collective-permute", *(("all-reduce",) if pure else ()))
    return Expectation(
        layers=stacked_shapes(leaf.shape for leaf in jax.tree.leaves(step.state.params["layers"]) if _is_cut(leaf)),
        outside=step.config.data.micro_batches,
        rows=int(step.rows_per_device * step.row.token.size),
        vocabulary=padded_vocabulary(model) // mesh.get("tensor", 1),
        dim=model.dim,
        gathers=gathers,
    )


def _is_cut(leaf: jax.ShapeDtypeStruct) -> bool:
    return leaf.sharding.shard_shape(leaf.shape) != leaf.shape


def _step(step: AbstractStep) -> Step:
    row, rows = step.row, step.config.data.rows_per_step
    lengths = np.bincount(row.target_slot)[1:]
    return Step(
        tokens=rows * int(np.sum(row.group > 0)),
        targets=rows * int(np.sum(row.target_slot > 0)),
        examples=rows * int(np.sum(row.example_id >= 0)),
        responses=int(np.sum(row.valid[0])),
        part=int(lengths.max()),
    )


def _settings(config: RunConfig) -> dict[str, Any]:
    model, data, objective = config.model, config.data, config.objective
    return {
        "loss_type": list(objective.loss_type),
        "reference": objective.reference,
        "teachers": objective.teachers,
        "head_chunk": objective.head_chunk,
        "remat": model.remat,
        "dtype": model.dtype,
        "row_length": data.row_length,
        "rows_per_step": data.rows_per_step,
        "micro_batches": data.micro_batches,
        "block": data.block,
    }
