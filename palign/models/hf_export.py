"""Models and adapters in the files that transformers and PEFT load.

Tensors are gathered one after another, and written once a file's worth of them is together; process 0 writes.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from palign.config.schema import LoraConfig, ModelConfig
from palign.models.hf import Layout, layouts
from palign.models.hf_config import Described, computed, from_hf, to_hf
from palign.models.hf_families import Family
from palign.models.hf_files import CONFIG, INDEX, WEIGHTS
from palign.models.protocol import Params
from palign.sharding.mesh import SHARED
from palign.sharding.processes import is_main

FILE_BYTES = 4 * 10**9  # more than this is cut into several files with an index


class Piece(NamedTuple):
    """A tensor to be written."""

    name: str
    bytes: int
    read: Callable[[], np.ndarray]  # all processes call it together


class Written(NamedTuple):
    """What was written."""

    architecture: str
    tensors: int
    parameters: int
    bytes: int


def export_model(
    directory: epath.Path, model: ModelConfig, params: Params, config: Mapping[str, Any], *, dtype: str = "float32"
) -> Written:
    """Writes `config.json` and the weights.

    Args:
        directory: is there, and empty.
        model: what the parameters are of.
        params: on any mesh.
        config: the `config.json` of the model that this one grew from; without `architectures`, keys to be put beside
            those that describe the model.
        dtype: `float32` or `bfloat16`, of the tensors.

    Raises:
        ValueError: no architecture of transformers computes this model, or that of `config` does not.
    """
    described, written = _describe(model, config)
    kind, flat = jnp.dtype(dtype), flatten_dict(params, sep="/")
    if model.value_head:
        flat.pop("unembedding", None)  # a classifier has none
    pieces = []
    for path, layout in layouts(described, flat).items():
        for layer, name in enumerate(layout.names):
            take = functools.partial(_gather, flat[path], layer if path.startswith("layers/") else None)
            read = functools.partial(_as_tensor, layout, take, kind)
            pieces.append(Piece(name, math.prod(layout.tensor_shape) * kind.itemsize, read))
    _write_files(directory, sorted(pieces, key=lambda piece: _order(piece.name)))
    if is_main():
        _write_json(directory / CONFIG, written | {"dtype" if "dtype" in written else "torch_dtype": dtype})
    return _count(described.architecture, pieces, kind)


def _as_tensor(layout: Layout, take: Callable[[], np.ndarray], kind: np.dtype) -> np.ndarray:
    return layout.to_tensor(take()).astype(kind)


def _order(name: str) -> tuple[int, str]:
    """Layer by layer, what belongs to none last."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] if numbers else 2**31, name)


def _count(architecture: str, pieces: Sequence[Piece], kind: np.dtype) -> Written:
    total = sum(piece.bytes for piece in pieces)
    return Written(architecture, len(pieces), total // kind.itemsize, total)


def _describe(model: ModelConfig, config: Mapping[str, Any]) -> tuple[Described, dict[str, Any]]:
    """The architecture of a model, and its `config.json`."""
    if "architectures" not in config:
        family, written = to_hf(model)
        return Described(family, model), {**written, **config}
    family = from_hf(config).family
    written = dict(config)
    if model.value_head:
        written |= {"architectures": [family.classifier], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if computed(from_hf(written).model) != computed(model):
        raise ValueError(f"the {CONFIG} that is kept of the model's origin describes another one than config.model")
    return Described(family, model), written


def _gather(leaf: jax.Array, layer: int | None) -> np.ndarray:
    """A parameter, or that of one layer, on the host of every process."""
    assert isinstance(leaf.sharding, NamedSharding)
    return np.asarray(_compile_gather(leaf.sharding.mesh)(leaf, layer).addressable_data(0))


@functools.cache
def _compile_gather(mesh: Mesh) -> Callable:
    def take(leaf, layer):
        return leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

    return jax.jit(take, out_shardings=NamedSharding(mesh, SHARED))


def _write_files(directory: epath.Path, pieces: Sequence[Piece]) -> None:
    files: list[list[Piece]] = [[]]
    for piece in pieces:
        if files[-1] and sum(other.bytes for other in files[-1]) + piece.bytes > FILE_BYTES:
            files.append([])
        files[-1].append(piece)
    places: dict[str, str] = {}
    for number, group in enumerate(files, start=1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(directory / name, group)
        places |= {piece.name: name for piece in group}
    if len(files) > 1 and is_main():
        total = sum(piece.bytes for piece in pieces)
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_file(file: epath.Path, pieces: Sequence[Piece]) -> None:
    tensors = {piece.name: np.ascontiguousarray(piece.read()) for piece in pieces}
    if is_main():
        file.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))


def _write_json(file: epath.Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def export_adapter(
    directory: epath.Path,
    model: ModelConfig,
    lora: LoraConfig,
    factors: Params,
    config: Mapping[str, Any],
    *,
    base: str,
) -> Written:
    """Writes LoRA factors, and a value head beside them, as an adapter of PEFT.

    Args:
        directory: is there, and empty.
        model: of the base.
        lora: rank, alpha and targets.
        factors: what was trained.
        config: as for `export_model`.
        base: where PEFT finds the base.

    Raises:
        ValueError: as `export_model`.
    """
    described, _ = _describe(model, config)
    flat = flatten_dict(factors, sep="/")
    pieces = _factor_pieces(described.family, flat, model.num_layers)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.value_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({piece.name.split(".")[-3] for piece in pieces}),
        "inference_mode": True,
    }
    if model.value_head:
        head = flat["value_head/kernel"]
        pieces.append(Piece("base_model.model.score.weight", head.nbytes, lambda: _gather(head, None).T))
        settings["modules_to_save"] = ["score"]
    _write_file(directory / "adapter_model.safetensors", pieces)
    if is_main():
        _write_json(directory / "adapter_config.json", settings)
    return _count(f"LoRA of {described.architecture}", pieces, jnp.dtype("float32"))


def _factor_pieces(family: Family, flat: Mapping[str, jax.Array], num_layers: int) -> list[Piece]:
    pieces = []
    for path, leaf in flat.items():
        kernel, _, factor = path.rpartition("/")
        if factor not in ("lora_a", "lora_b"):
            continue
        for layer in range(num_layers):
            module = family.names[f"{kernel}/kernel"].format(layer).removesuffix(".weight")
            name = f"base_model.model.{module}.lora_{factor[-1].upper()}.weight"
            read = functools.partial(_as_factor, functools.partial(_gather, leaf, layer), factor)
            pieces.append(Piece(name, leaf.nbytes // num_layers, read))
    return pieces


def _as_factor(take: Callable[[], np.ndarray], factor: str) -> np.ndarray:
    """A factor `[*in, rank]` as `[rank, in]`, or `[rank, *out]` as `[out, rank]`."""
    x = take()
    return (x.reshape(-1, x.shape[-1]) if factor == "lora_a" else x.reshape(x.shape[0], -1)).T
