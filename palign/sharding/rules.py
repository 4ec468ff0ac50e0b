"""Where arrays live: two tables, from a parameter's path to logical axes, and from logical axes to mesh axes.

Where a layer uses them, weights are whole over `fsdp`, and weights and activations are cut as `USE_AXES` says.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from palign.sharding.mesh import CONTEXT_AXIS, ROW_AXES, TENSOR_AXIS

# Path (a full match) -> the logical axis of every dimension. Exactly one rule must match.
PARAMETER_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"embedding", ("vocab", "embed")),
    (r"unembedding", ("embed", "vocab")),
    (r"layers/attention/query/kernel", ("layers", "embed", "heads", "head_dim")),
    (r"layers/attention/query/bias", ("layers", "heads", "head_dim")),
    (r"layers/attention/(key|value)/kernel", ("layers", "embed", "key_heads", "head_dim")),
    (r"layers/attention/(key|value)/bias", ("layers", "key_heads", "head_dim")),
    (r"layers/attention/output/kernel", ("layers", "heads", "head_dim", "embed")),
    (r"layers/attention/(query_norm|key_norm)/scale", ("layers", "head_dim")),
    (r"layers/mlp/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"layers/mlp/down/kernel", ("layers", "mlp", "embed")),
    (r"layers/attention/(query|key|value)/lora_a", ("layers", "embed", "rank")),
    (r"layers/attention/query/lora_b", ("layers", "rank", "heads", "head_dim")),
    (r"layers/attention/(key|value)/lora_b", ("layers", "rank", "key_heads", "head_dim")),
    (r"layers/attention/output/lora_a", ("layers", "heads", "head_dim", "rank")),
    (r"layers/attention/output/lora_b", ("layers", "rank", "embed")),
    (r"layers/mlp/(gate|up)/lora_a", ("layers", "embed", "rank")),
    (r"layers/mlp/(gate|up)/lora_b", ("layers", "rank", "mlp")),
    (r"layers/mlp/down/lora_a", ("layers", "mlp", "rank")),
    (r"layers/mlp/down/lora_b", ("layers", "rank", "embed")),
    (r"layers/\w+_norm/scale", ("layers", "norm")),
    (r"final_norm/scale", ("norm",)),
    (r"value_head/kernel", ("embed", "values")),
)

# Logical axis -> the mesh axis that cuts it; what is not here is not cut.
MESH_AXES: dict[str, str] = {
    "embed": "fsdp",
    "vocab": TENSOR_AXIS,
    "heads": TENSOR_AXIS,
    "key_heads": TENSOR_AXIS,
    "mlp": TENSOR_AXIS,
}
HOST = "pinned_host"  # the memory kind of what devices read from their host
WHOLE_IF_INDIVISIBLE = {"key_heads"}  # they may be fewer than the devices: then each device has them all

# Letter of an einsum -> the mesh axes that cut that dimension of an array in use.
USE_AXES: dict[str, tuple[str, ...]] = {
    "r": ROW_AXES,
    "t": (CONTEXT_AXIS,),
    **dict.fromkeys("hjfv", (TENSOR_AXIS,)),
}


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/attention/query/kernel` from jax's key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def logical_axes(name: str) -> tuple[str, ...]:
    """The logical axes of a parameter.

    Raises:
        ValueError: no rule matches, or several do.
    """
    matches = [axes for pattern, axes in PARAMETER_AXES if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise ValueError(
            f"parameter {name!r} matches {len(matches)} rules of palign.sharding.rules.PARAMETER_AXES; expected one"
        )
    return matches[0]


def parameter_shardings(mesh: Mesh, shapes: Any) -> Any:
    """A sharding for every parameter, from its path.

    Args:
        mesh: any; axes of `MESH_AXES` that it does not have cut nothing.
        shapes: a tree of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The same tree of shardings.

    Raises:
        ValueError: a parameter without a rule, one that a mesh axis would cut twice, or a dimension that its mesh axis
            does not divide.
    """

    def place(path, leaf):
        name = path_name(path)
        return NamedSharding(mesh, P(*_cut(mesh.shape, name, logical_axes(name), leaf.shape)))

    return jax.tree_util.tree_map_with_path(place, shapes)


def _whole_shardings(mesh: Mesh, shapes: Any) -> Any:
    """As `parameter_shardings`, but nothing is cut over `fsdp`, so nothing has to be gathered."""

    def place(sharding):
        return NamedSharding(mesh, P(*(None if axis == MESH_AXES["embed"] else axis for axis in sharding.spec)))

    return jax.tree.map(place, parameter_shardings(mesh, shapes))


def _host_shardings(mesh: Mesh, shapes: Any) -> Any:
    """As `parameter_shardings`, but the matrices stay in the host's memory; `in_use` brings each one over."""

    def place(path, sharding):
        matrix = re.search(r"(kernel|embedding)$", path_name(path))
        return sharding.with_memory_kind(HOST) if matrix else sharding

    return jax.tree_util.tree_map_with_path(place, parameter_shardings(mesh, shapes))


# Where the weights of models that are only read lie: `config.frozen.placement`.
FROZEN_SHARDINGS: dict[str, Callable[[Mesh, Any], Any]] = {
    "sharded": parameter_shardings,  # as those that are trained
    "whole": _whole_shardings,
    "host": _host_shardings,
}


def _cut(mesh_shape: Mapping[str, int], name: str, axes: Sequence[str], shape: Sequence[int]) -> list[str | None]:
    """The mesh axis of every dimension of a parameter."""
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name!r} has shape {shape}, its rule names {len(axes)} axes: {axes}")
    cut: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axis = MESH_AXES.get(axis, "")
        devices = mesh_shape.get(mesh_axis, 1)
        if mesh_axis not in mesh_shape or (size % devices and axis in WHOLE_IF_INDIVISIBLE):
            cut.append(None)
            continue
        if size % devices:
            remedy = ", or a multiple of it as config.model.vocab_multiple" if axis == "vocab" else ""
            raise ValueError(
                f"config.mesh.{mesh_axis} = {devices} does not divide axis {axis!r} of parameter {name!r}, "
                f"{size} long; choose a divisor{remedy}"
            )
        if mesh_axis in cut:
            raise ValueError(
                f"parameter {name!r}: mesh axis {mesh_axis!r} would cut both {axes[cut.index(mesh_axis)]!r} and "
                f"{axis!r}; give one of them another mesh axis in palign.sharding.rules.MESH_AXES, or none"
            )
        cut.append(mesh_axis)
    return cut


def on_device(array: jax.Array) -> jax.Array:
    """Brings an array over that lies in the host's memory."""
    host = jax.typeof(array).memory_space == jax.memory.Space.Host
    return jax.device_put(array, jax.memory.Space.Device) if host else array


def in_use(array: jax.Array, letters: str, dtype: Any = None) -> jax.Array:
    """Places an array where it is used, as `USE_AXES` says of its einsum letters; without a mesh it stays.

    A weight is gathered over `fsdp` here; a dimension that its mesh axes do not divide stays whole.

    Args:
        array: weights or activations.
        letters: one a dimension.
        dtype: what it is rounded to before it travels between devices; None = its own.
    """
    mesh_shape = dict(jax.sharding.get_abstract_mesh().shape)
    array = on_device(array)
    if dtype is not None and array.dtype != dtype:
        array = array.astype(dtype)
        if mesh_shape.get("fsdp", 1) > 1:
            array = jax.lax.optimization_barrier(array)  # else XLA may gather first and round after
    if not mesh_shape:
        return array

    def cut(letter, size):
        axes = tuple(axis for axis in USE_AXES.get(letter, ()) if axis in mesh_shape)
        return axes if size % math.prod(mesh_shape[axis] for axis in axes) == 0 else None

    return jax.lax.with_sharding_constraint(array, P(*map(cut, letters, array.shape)))
