"""The device mesh and the one way to run a function on each device's own rows.

Rows of a batch are spread over the axes in `ROW_AXES`. Attention and the heads gather and scatter inside a row, which
automatic partitioning turns into collectives over whole activations, so they run under `over_rows` instead: each device
sees its rows only, and what must be added up across devices is added with `sum_over_rows`.

A mesh may have two more axes. Over `CONTEXT_AXIS` the tokens of a row are cut into pieces (`TOKENS`): what one token
has of its own is computed by the device that holds it, attention gathers keys and values, and the heads of the
vocabulary leave every target to the device that holds the hidden state which predicts it. What says where tokens stand
and which targets there are is small, and whole on every device of the axis.

Over `TENSOR_AXIS` single arrays are cut. Attention sees its own heads only (`HEADS`). For the heads of the vocabulary
the axis stays automatic, inside `over_rows` too: what is cut along it is said with `over_tensor`, and the compiler adds
the collectives.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROW_AXES = ("data", "fsdp")
CONTEXT_AXIS = "context"
TENSOR_AXIS = "tensor"
ROWS = P(ROW_AXES)
TOKENS = P(ROW_AXES, CONTEXT_AXIS)  # of arrays whose second dimension is a row's tokens
HEADS = P(ROW_AXES, CONTEXT_AXIS, TENSOR_AXIS)  # and whose third is the attention heads
SHARED = P()


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    dcn_data: int = 1,
    dcn_fsdp: int = 1,
    devices: list[jax.Device] | None = None,
) -> Mesh:
    """Builds a mesh with axes `data` and `fsdp`, and `context` and `tensor` where they are more than 1.

    One of the axes may be -1 and takes all devices that the others leave. Neighbours along the last axes have the
    fastest links: the devices' order follows the machine's topology (`jax.experimental.mesh_utils`).

    Args:
        data: copies of the weights.
        fsdp: over how many devices each copy is cut, to be gathered layer by layer.
        context: over how many devices the tokens of a row are cut.
        tensor: over how many devices heads, the feed-forward width and the vocabulary are cut.
        dcn_data: how many slices (groups of devices with fast links inside) `data` spans.
        dcn_fsdp: how many slices `fsdp` spans.
        devices: the devices to use, all by default.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or do not span its slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _infer_sizes({"data": data, "fsdp": fsdp, CONTEXT_AXIS: context, TENSOR_AXIS: tensor}, len(devices))
    shape = {name: size for name, size in sizes.items() if name in ROW_AXES or size > 1}
    grid = _arrange(shape, {"data": dcn_data, "fsdp": dcn_fsdp}, devices)
    # Auto axes: the default (Explicit) turns with_sharding_constraint into an assertion.
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _infer_sizes(sizes: dict[str, int], num_devices: int) -> dict[str, int]:
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"config.mesh: {' and '.join(free)} are -1, and only one can be inferred; set the others")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    inferred = {name: num_devices // fixed for name in free if fixed and num_devices % fixed == 0}
    if math.prod((sizes | inferred).values()) != num_devices:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"config.mesh: {given} does not make {num_devices} devices; expected a product of {num_devices}, where one "
            "may be -1 (what the others leave)"
        )
    return sizes | inferred


def _arrange(shape: Mapping[str, int], slices: Mapping[str, int], devices: list[jax.Device]) -> np.ndarray:
    """Puts devices in an order in which neighbours along the last axes have the fastest links."""
    spanned, found = math.prod(slices.values()), len({getattr(device, "slice_index", None) for device in devices})
    if spanned == 1 and (found == 1 or devices[0].platform != "tpu"):
        return mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    if spanned != found:
        given = ", ".join(f"dcn_{name}={size}" for name, size in slices.items())
        raise ValueError(
            f"config.mesh: {given} is for {spanned} slices, and the devices form {found}; expected {found}"
        )
    for name, size in slices.items():
        if shape[name] % size:
            raise ValueError(f"config.mesh.dcn_{name} = {size}: expected a divisor of {name} = {shape[name]}")
    outer = [slices.get(name, 1) for name in shape]
    inner = [size // slices.get(name, 1) for name, size in shape.items()]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
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

    A tensor axis that no spec names stays automatic inside it: the compiler spreads the work over it as shardings say.

    Args:
        function: pure, sees the local rows of the arguments marked `ROWS`, of those marked `TOKENS` its piece of these
            rows, of those marked `HEADS` the local heads of its piece, and the whole of those marked `SHARED`.
        in_specs: `ROWS`, `TOKENS`, `HEADS` or `SHARED` per argument (a prefix of its tree).
        out_specs: the same for the results; a `SHARED` result must be equal on all devices (`sum_over_rows`), and one
            marked `ROWS` on all that hold pieces of a row (`sum_over_pieces`).
    """
    if not in_mesh():
        return function
    names = jax.sharding.get_abstract_mesh().axis_names
    leaf = lambda x: isinstance(x, P)

    def present(spec):
        return P(*(None if isinstance(axis, str) and axis not in names else axis for axis in spec))

    specs = in_specs, out_specs = jax.tree.map(present, (in_specs, out_specs), is_leaf=leaf)
    named = {axis for spec in jax.tree.leaves(specs, is_leaf=leaf) for axis in spec if isinstance(axis, str)}
    manual = {*ROW_AXES, *named} | ({CONTEXT_AXIS} & set(names))
    # Never differentiated through (its callers are custom_vjp), so the replication check buys nothing.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False)


def sum_over_rows(tree: Any) -> Any:
    """Adds values over the devices that hold rows or pieces of them; call it inside `over_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    # A sum over one device beside an automatic axis is refused by XLA's partitioner (jax 0.10).
    rows = jax.lax.psum(tree, ROW_AXES) if not mesh.empty and num_row_shards(mesh) > 1 else tree
    return sum_over_pieces(rows)


def context_size() -> int:
    """Into how many pieces the tokens of a row are cut."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(CONTEXT_AXIS, 1)


def context_index() -> jax.Array:
    """Which piece of its rows a device holds, from 0; call it inside `over_rows`."""
    return jax.lax.axis_index(CONTEXT_AXIS) if context_size() > 1 else jnp.int32(0)


def own_columns(columns: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Which columns of a row lie in the device's piece of `length`, and where in it; call it inside `over_rows`."""
    piece, place = jnp.divmod(columns, length)
    return piece == context_index(), place


def gather_pieces(array: jax.Array) -> jax.Array:
    """Puts rows together from their pieces, `[R, T / pieces, ...] -> [R, T, ...]`; call it inside `over_rows`."""
    return jax.lax.all_gather(array, CONTEXT_AXIS, axis=1, tiled=True) if context_size() > 1 else array


def scatter_pieces(array: jax.Array) -> jax.Array:
    """Adds whole rows up, in float32, and keeps the device's piece: the transpose of `gather_pieces`."""
    if context_size() == 1:
        return array
    total = jax.lax.psum_scatter(array.astype(jnp.float32), CONTEXT_AXIS, scatter_dimension=1, tiled=True)
    return total.astype(array.dtype)


def sum_over_pieces(tree: Any) -> Any:
    """Adds values over the devices that hold pieces of a row; call it inside `over_rows`."""
    return jax.lax.psum(tree, CONTEXT_AXIS) if context_size() > 1 else tree


def tensor_size() -> int:
    """Over how many devices single arrays are cut."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(TENSOR_AXIS, 1)


def over_tensor(array: jax.Array) -> jax.Array:
    """Cuts an array's last dimension over the tensor axis, where the mesh has one; it must divide the dimension."""
    if tensor_size() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, P(*(P.UNCONSTRAINED,) * (array.ndim - 1), TENSOR_AXIS))
