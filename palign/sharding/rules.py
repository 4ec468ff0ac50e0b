"""Where parameters live: two tables, from a parameter's path to logical axes, and from logical axes to mesh axes."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Path (a full match) -> the logical axis of every dimension. Exactly one rule must match.
PARAMETER_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"embedding", ("vocab", "embed")),
    (r"unembedding", ("embed", "vocab")),
    (r"layers/attention/(query|key|value)/kernel", ("layers", "embed", "heads", "head_dim")),
    (r"layers/attention/(query|key|value)/bias", ("layers", "heads", "head_dim")),
    (r"layers/attention/output/kernel", ("layers", "heads", "head_dim", "embed")),
    (r"layers/attention/(query_norm|key_norm)/scale", ("layers", "head_dim")),
    (r"layers/mlp/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"layers/mlp/down/kernel", ("layers", "mlp", "embed")),
    (r"layers/\w+_norm/scale", ("layers", "norm")),
    (r"final_norm/scale", ("norm",)),
    (r"value_head/kernel", ("embed", "values")),
)

# Logical axis -> the mesh axis that cuts it; what is not here is not cut.
MESH_AXES: dict[str, str] = {"embed": "fsdp"}


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
        mesh: with the axes named in `MESH_AXES`.
        shapes: a tree of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: a parameter without a rule, or a dimension that its mesh axis does not divide.
    """

    def place(path, leaf):
        name = path_name(path)
        axes = logical_axes(name)
        if len(axes) != len(leaf.shape):
            raise ValueError(f"parameter {name!r} has shape {leaf.shape}, its rule names {len(axes)} axes: {axes}")
        spec = [MESH_AXES.get(axis) for axis in axes]
        for axis, mesh_axis, size in zip(axes, spec, leaf.shape, strict=True):
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise ValueError(
                    f"config.mesh.{mesh_axis} = {mesh.shape[mesh_axis]} does not divide axis {axis!r} of parameter "
                    f"{name!r}, {size} long; choose a divisor"
                )
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, shapes)
