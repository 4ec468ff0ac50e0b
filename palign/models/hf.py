"""Hugging Face models on disk: what they are, and their weights straight onto a mesh.

Every process reads its share of each matrix. On the devices the matrices are turned and laid into the stacked
parameters, a few layers at a time, so that little more than the parameters is ever in memory.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from palign.config.schema import ModelConfig
from palign.models.hf_config import Described, from_hf
from palign.models.hf_files import CONFIG, Tensor, check_tensors, find_tensors, inside, read_json
from palign.models.lora import NUM_IN
from palign.models.protocol import Params
from palign.models.transformer import make_language_model
from palign.sharding.rules import logical_axes

CONFIG_LIMIT = 1_000_000  # bytes
GROUP_BYTES = 2**31  # of layers that are read at a time, over all devices
HEAD = "lm_head.weight"


def describe(directory: epath.Path) -> Described:
    """Reads which model a directory holds.

    Raises:
        ValueError: none, or none that palign computes.
    """
    given = read_json(inside(directory, CONFIG), CONFIG_LIMIT)
    try:
        return from_hf(given)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None


def is_hf(directory: epath.Path) -> bool:
    """Whether a directory's `config.json` is that of a Hugging Face model, not of a run."""
    file = directory / CONFIG
    return file.is_file() and bool(read_json(file, CONFIG_LIMIT).keys() & {"architectures", "model_type"})


class Layout(NamedTuple):
    """How a parameter is stored: as one tensor, or as one for each layer.

    Attributes:
        names: of the tensors.
        shape: of the parameter, in one layer, without the padding of the vocabulary.
        tensor_shape: of a tensor.
        inner: how many of the parameter's axes are summed over; a tensor has them last. 0: it is no matrix.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    inner: int

    def to_parameter(self, tensor: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A tensor as the parameter of a layer; ids beyond the vocabulary get zeros up to `shape`."""
        x = (tensor.T if self.inner else tensor).reshape(self.shape)
        return jnp.pad(x, [(0, wanted - n) for wanted, n in zip(shape, self.shape, strict=True)])

    def to_tensor(self, parameter: np.ndarray) -> np.ndarray:
        """The parameter of a layer as a tensor: the inverse."""
        x = parameter[tuple(slice(n) for n in self.shape)]
        return x.reshape(self.tensor_shape[::-1]).T if self.inner else x.reshape(self.tensor_shape)


def layouts(described: Described, shapes: Mapping[str, Any]) -> dict[str, Layout]:
    """How the parameters of a model are stored.

    Args:
        described: the model.
        shapes: path -> what has the parameter's shape.
    """
    found, model = {}, described.model
    for path, leaf in shapes.items():
        axes, name = logical_axes(path), described.family.names[path]
        shape = tuple(model.vocab_size if axis == "vocab" else n for axis, n in zip(axes, leaf.shape, strict=True))
        names: tuple[str, ...] = (name,)
        if axes[0] == "layers":
            names, shape = tuple(name.format(layer) for layer in range(model.num_layers)), shape[1:]
        *parents, last = path.split("/")
        inner = NUM_IN.get(parents[-1] if parents else "", 1) if last in ("kernel", "unembedding") else 0
        stored = (math.prod(shape[inner:]), math.prod(shape[:inner])) if inner else (math.prod(shape),)
        found[path] = Layout(names, shape, shape if path == "embedding" else stored, inner)
    return found


def parameter_shapes(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of the parameters of a model."""
    return flatten_dict(jax.eval_shape(make_language_model(model).init, jax.random.key(0)), sep="/")


def checked_tensors(directory: epath.Path, described: Described) -> dict[str, Tensor]:
    """Lists a model's tensors, after all checks that headers allow.

    Raises:
        ValueError: what is wrong with the files, see `palign.models.hf_files`.
    """
    found, stored = find_tensors(directory), layouts(described, parameter_shapes(described.model))
    wanted = {name: layout.tensor_shape for layout in stored.values() for name in layout.names}
    if HEAD in found and described.model.tie_embedding and not described.model.value_head:
        wanted[HEAD] = stored["embedding"].tensor_shape
    check_tensors(directory, found, wanted)
    return found


def load_weights(directory: epath.Path, targets: Any) -> Params:
    """Loads a model's weights into their places.

    Args:
        directory: of the model.
        targets: a tree of `jax.ShapeDtypeStruct`s with shardings, of the model that the directory describes; the
            vocabulary may be padded further.

    Raises:
        ValueError: what is wrong with the files, or targets of another model.
    """
    described = describe(directory)
    files = checked_tensors(directory, described)
    flat = flatten_dict(targets, sep="/")
    _check_targets(directory, described, flat)
    stored = layouts(described, flat)
    layers = {path: target for path, target in flat.items() if path.startswith("layers/")}
    loaded = _load_layers(files, stored, layers)
    for path in sorted(flat.keys() - layers.keys()):  # in one order in all processes
        layout, target = stored[path], flat[path]
        (tensor,) = _read(files, {layout.names[0]: _source(layout, target)}).values()
        loaded[path] = jax.jit(layout.to_parameter, static_argnums=1, out_shardings=target.sharding)(
            tensor, target.shape
        )
    if HEAD in files and "unembedding" not in flat:
        (head,) = _read(files, {HEAD: _source(stored["embedding"], flat["embedding"])}).values()
        if not jnp.array_equal(head, loaded["embedding"][: head.shape[0]]):
            raise ValueError(
                f"{directory}: {HEAD} differs from the embedding, though {CONFIG} says tie_word_embeddings = true; set "
                "it to false, or remove the tensor"
            )
    return unflatten_dict(loaded, sep="/")


def _check_targets(directory: epath.Path, described: Described, targets: Mapping[str, Any]) -> None:
    def unpadded(shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        axes = {path: zip(logical_axes(path), leaf.shape, strict=True) for path, leaf in shapes.items()}
        return {path: tuple(n for axis, n in named if axis != "vocab") for path, named in axes.items()}

    have, want = unpadded(parameter_shapes(described.model)), unpadded(targets)
    for path in sorted(have.keys() | want.keys()):
        if have.get(path) != want.get(path):
            raise ValueError(
                f"{directory}: parameter {path} is {have.get(path, 'absent')} by its {CONFIG} and "
                f"{want.get(path, 'absent')} by config.model (the vocabulary apart)"
            )


def _load_layers(
    files: Mapping[str, Tensor], stored: Mapping[str, Layout], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The stacked parameters of all layers, filled some layers at a time."""
    places = {path: target.sharding for path, target in targets.items()}
    count = next(iter(targets.values())).shape[0]
    layer_bytes = sum(target.size * target.dtype.itemsize for target in targets.values()) // count
    group = max(1, min(count, GROUP_BYTES // layer_bytes))

    @functools.partial(jax.jit, out_shardings=places)
    def empty():
        return {path: jnp.zeros(target.shape, target.dtype) for path, target in targets.items()}

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=places)
    def fill(stacked, tensors, start):
        for path, parameter in stacked.items():
            block = [stored[path].to_parameter(tensor, parameter.shape[1:]) for tensor in tensors[path]]
            stacked[path] = jax.lax.dynamic_update_slice_in_dim(parameter, jnp.stack(block), start, axis=0)
        return stacked

    stacked = empty()
    for start in range(0, count, group):
        start = min(start, count - group)  # the last group may take layers again
        names = {path: stored[path].names[start : start + group] for path in targets}
        read = _read(files, {name: _source(stored[path], targets[path]) for path in names for name in names[path]})
        stacked = fill(stacked, {path: [read[name] for name in names[path]] for path in names}, start)
    return stacked


def _source(layout: Layout, target: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A tensor in the type of its parameter, its rows dealt to the devices that the parameter is cut over.

    Rows lie side by side in a file, columns do not: cut as the parameter is, every process would read all of it.
    """
    mesh, axes = target.sharding.mesh, tuple(axis for axis in target.sharding.spec if axis)
    whole = layout.tensor_shape[0] % math.prod(mesh.shape[axis] for axis in axes) != 0
    place = NamedSharding(mesh, P() if whole else P(axes or None))
    return jax.ShapeDtypeStruct(layout.tensor_shape, target.dtype, sharding=place)


def _read(files: Mapping[str, Tensor], targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads tensors, file by file."""
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    read: dict[str, jax.Array] = {}
    with context:
        for file in sorted({files[name].file for name in targets}):
            read |= ocp.load(file, {name: target for name, target in targets.items() if files[name].file == file})
    return read
