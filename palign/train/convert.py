"""Hugging Face models to workdirs that read as runs, and runs to models and adapters that transformers loads."""

import json
import math
import time
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from palign.config.load import to_plain
from palign.config.schema import RunConfig
from palign.data.tokenizers import load_tokenizer
from palign.models.hf import describe, is_hf, layouts, parameter_shapes
from palign.models.hf_export import Written, export_adapter, export_model
from palign.models.hf_files import read_json
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from palign.sharding.processes import is_main
from palign.train.checkpoint import save_params
from palign.train.metrics import say
from palign.train.prepare import with_vocabulary
from palign.train.sources import (
    CONFIG,
    ORIGIN,
    Source,
    keep_origin,
    load_factors,
    load_source,
    read_config,
)
from palign.train.staging import staged

DTYPES = ("float32", "bfloat16")


class Converted(NamedTuple):
    """What was converted, and in how long."""

    written: Written
    seconds: float


def convert(name: str, to: epath.PathLike, *, dtype: str = "float32", adapter: bool = False) -> Converted:
    """Turns a Hugging Face model into a workdir, or a run into a Hugging Face model.

    Args:
        name: the directory of a Hugging Face model, or a run's workdir (`@STEP`, `@last`, `@best` behind it).
        to: a directory that is not there yet, or empty; on a local file system it is there whole or not at all.
        dtype: `float32` or `bfloat16`, of the weights that are written.
        adapter: of a LoRA run: its factors for PEFT, instead of the whole model.

    Raises:
        ValueError: nothing to convert, a model that the other side does not know, or a directory in use.
    """
    start, (place, _, which) = time.perf_counter(), name.partition("@")
    source = Source(epath.Path(place), which or "last")
    config = read_config(source.workdir)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)}")
    if is_hf(source.workdir) and (which or adapter):
        raise ValueError(f"--from={name}: a Hugging Face model has neither checkpoints nor an adapter to choose")
    if adapter and not config.lora.rank:
        raise ValueError(f"--adapter: {source.workdir} trained all weights (config.lora.rank = 0); leave it out")
    if adapter and dtype != "float32":
        raise ValueError(f"--dtype={dtype} has no effect on an adapter, which is float32; leave it out")
    write = _import_model if is_hf(source.workdir) else _export_adapter if adapter else _export_model
    with staged(epath.Path(to), "--to") as stage:
        written = write(source, config, stage, make_mesh(data=1, fsdp=-1), dtype)
    return Converted(written, time.perf_counter() - start)


def _import_model(source: Source, config: RunConfig, stage: epath.Path, mesh: Mesh, dtype: str) -> Written:
    tokenizer, described = load_tokenizer(source.workdir), describe(source.workdir)
    config = with_vocabulary(config, tokenizer)
    params = load_source(source, make_language_model(config.model), mesh, dtype=dtype)
    save_params(stage, params)
    if is_main():
        tokenizer.save(stage)
        keep_origin(source, stage)
        (stage / CONFIG).write_text(json.dumps(to_plain(config), indent=1))
    stored = layouts(described, parameter_shapes(described.model)).values()
    parameters = sum(len(layout.names) * math.prod(layout.tensor_shape) for layout in stored)
    tensors, size = sum(len(layout.names) for layout in stored), sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return Written(described.architecture, tensors, parameters, size)


def _export_model(source: Source, config: RunConfig, stage: epath.Path, mesh: Mesh, dtype: str) -> Written:
    params = load_source(source, make_language_model(config.model), mesh, dtype=dtype)
    if config.model.value_head and not config.model.tie_embedding:
        say("the map to the vocabulary is left out: transformers has none in a model that values texts")
    origin = _copy_beside(source, config, stage)
    return export_model(stage, config.model, params, origin, dtype=dtype)


def _export_adapter(source: Source, config: RunConfig, stage: epath.Path, mesh: Mesh, dtype: str) -> Written:
    if not is_hf(epath.Path(config.init_from)):
        say(f"the adapter's base is {config.init_from}, no Hugging Face model: convert that too, and name it to PEFT")
    origin = _copy_beside(source, config, stage)
    factors = load_factors(source, mesh)
    return export_adapter(stage, config.model, config.lora, factors, origin, base=config.init_from)


def _copy_beside(source: Source, config: RunConfig, stage: epath.Path) -> dict[str, Any]:
    """Writes what lies beside the weights, as it came with the model or from the run, and returns its `config.json`."""
    tokenizer, origin = load_tokenizer(source.workdir), source.workdir / ORIGIN
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    kept = read_json(origin / CONFIG) if origin.is_dir() else {"max_position_embeddings": config.data.max_length}
    if is_main():
        files = {file.name: file for file in origin.iterdir()} if origin.is_dir() else {}
        if not files:
            tokenizer.save(stage)
        template = source.workdir / "chat_template.jinja"  # the run's own, where it has another
        for name, file in (files | ({template.name: template} if template.is_file() else {})).items():
            if name != CONFIG:
                (stage / name).write_bytes(file.read_bytes())
        generation = stage / "generation_config.json"
        if generation.name not in files:  # the tokenizer may have written all the ids that end a response
            several = read_json(generation) if generation.is_file() else {}
            generation.write_text(json.dumps(special | several, indent=2) + "\n")
    return special | {name: value for name, value in kept.items() if value is not None}
