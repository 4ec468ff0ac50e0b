"""The device mesh and the one way to run a function on each device's own rows.

Rows of a batch are spread over the axes in `ROW_AXES`. Attention and the heads gather and scatter inside a row, which
automatic partitioning turns into collectives over whole activations, so they run under `over_rows` instead: each device
sees its rows only, and what must be added up across devices is added with `sum_over_rows`.

A mesh may have one more axis, `TENSOR_AXIS`, over which single arrays are cut. It stays automatic, inside `over_rows`
too: what is cut along it is said with `over_tensor`, and the compiler adds the collectives.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROW_AXES = ("data", "fsdp")
ROWS = P(ROW_AXES)
SHARED = P()
TENSOR_AXIS = "tensor"


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds a mesh with axes `data` (copies of the weights), `fsdp` (the weights cut into pieces) and maybe `tensor`.

    Args:
        data: how many copies; -1 takes all devices that the others leave.
        fsdp: over how many devices the weights are cut; -1 takes all devices that the others leave.
        tensor: over how many neighbouring devices the vocabulary is cut; at 1 the mesh has no such axis.
        devices: the devices to use, all by default.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = {"data": data, "fsdp": fsdp} | ({TENSOR_AXIS: tensor} if tensor != 1 else {})
    free = [name for name, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    if len(free) > 1:
        raise ValueError("config.mesh: both data and fsdp are -1, so neither can be inferred; set one of them")
    if free and len(devices) % fixed == 0:
        shape[free[0]] = len(devices) // fixed
    if math.prod(shape.values()) != len(devices):
        raise ValueError(
            f"config.mesh: data={data}, fsdp={fsdp}, tensor={tensor} does not make {len(devices)} devices; "
            "set data or fsdp to -1 to take what the others leave"
        )
    grid = np.asarray(devices).reshape(tuple(shape.values()))
    # Auto axes: the default (Explicit) turns with_sharding_constraint into an assertion.
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def num_row_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def row_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """The sharding of an array whose dimension `axis` is the rows."""
    return NamedSharding(mesh, P(*(None,) * axis, ROW_AXES))


def to_global(mesh: Mesh, batch: Any, *, axis: int = 1) -> Any:
    """Makes global arrays from this process's rows: leaves `[A, R, ...]`, A unsharded, R over `ROW_AXES`.

    Micro-batches are laid out on the host: reshaping a sharded `[R]` to `[A, R/A]` would gather it.
    """
    sharding = row_sharding(mesh, axis=axis)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def in_mesh() -> bool:
    """Whether a mesh is set (`jax.set_mesh`); borrowers of attention and heads need none."""
    return not jax.sharding.get_abstract_mesh().empty


def over_rows(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Runs `function` on each device's own rows; without a mesh it is `function` itself.

    Other axes of the mesh stay automatic inside it: the compiler spreads the work over them as shardings say.

    Args:
        function: pure, sees the local rows of the arguments marked `ROWS` and the whole of those marked `SHARED`.
        in_specs: `ROWS` or `SHARED` per argument (a prefix of its tree).
        out_specs: the same for the results; a `SHARED` result must be equal on all devices (`sum_over_rows`).
    """
    if not in_mesh():
        return function
    # Never differentiated through (its callers are custom_vjp), so the replication check buys nothing.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(ROW_AXES), check_vma=False)


def sum_over_rows(tree: Any) -> Any:
    """Adds values over the devices that hold rows; call it inside `over_rows`."""
    return jax.lax.psum(tree, ROW_AXES) if in_mesh() else tree


def over_tensor(array: jax.Array) -> jax.Array:
    """Cuts an array's last dimension over the tensor axis, where the mesh has one; it must divide the dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    if TENSOR_AXIS not in mesh.axis_names:
        return array
    return jax.lax.with_sharding_constraint(array, P(*(P.UNCONSTRAINED,) * (array.ndim - 1), TENSOR_AXIS))


def constrain(array: jax.Array, spec: P) -> jax.Array:
    """`with_sharding_constraint` where there is a mesh."""
    return jax.lax.with_sharding_constraint(array, spec) if in_mesh() else array
