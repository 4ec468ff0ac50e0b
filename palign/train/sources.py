"""Where models come from: a stage's name, a run's workdir, `@step`, `@last` or `@best` behind either."""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from palign.config.load import resolve_run
from palign.config.schema import ModelConfig, RunConfig
from palign.data.tokenizers import Tokenizer, load_tokenizer
from palign.models.protocol import LanguageModel
from palign.models.transformer import make_language_model
from palign.models.value_head import new_value_head
from palign.sharding.mesh import make_mesh
from palign.sharding.rules import parameter_shardings
from palign.train.checkpoint import load_params

CONFIG = "config.json"


class Source(NamedTuple):
    """A run's workdir and which of its checkpoints."""

    workdir: epath.Path
    which: str


def sibling_stages(workdir: epath.Path) -> dict[str, epath.Path]:
    """The stages that lie beside a stage's workdir `NN-name`, by name, without itself."""
    found = {d.name.partition("-")[2]: d for d in sorted(workdir.parent.glob("[0-9][0-9]-*")) if d != workdir}
    return found if workdir.name[:2].isdigit() else {}


def find_source(name: str, key: str, workdir: epath.Path) -> Source:
    """Looks a source up.

    Args:
        name: a sibling stage of `workdir`, or a workdir; either with `@step`, `@last` (the default) or `@best`.
        key: the config key that names it, for the message.
        workdir: of the run that reads it.

    Raises:
        ValueError: neither a stage nor a directory with a run in it.
    """
    place, _, which = name.partition("@")
    stages = sibling_stages(workdir)
    found = stages.get(place, epath.Path(place))
    if not (found / CONFIG).is_file():
        known = f"stages here: {', '.join(stages)}" if stages else "there are no stages here"
        raise ValueError(f"config.{key} = {name!r}: neither a stage nor the workdir of a run ({known})")
    return Source(found, which or "last")


def read_config(workdir: epath.Path) -> RunConfig:
    """The resolved config of a run.

    Raises:
        ValueError: the directory holds no run.
    """
    file = workdir / CONFIG
    if not file.is_file():
        stages = ", ".join(str(d) for d in sorted(workdir.glob("[0-9][0-9]-*")))
        hint = f"its stages are {stages}" if stages else "train one, or name another"
        raise ValueError(f"{workdir}: not the workdir of a run (no {CONFIG}); {hint}")
    return resolve_run(json.loads(file.read_text()))


def load_source(source: Source, lm: LanguageModel, mesh: Mesh) -> Any:
    """Loads a source's weights into their places on the mesh."""
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    places = parameter_shardings(mesh, shapes)
    targets = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
    return load_params(source.workdir, source.which, targets)


def without_value_head(model: ModelConfig) -> ModelConfig:
    """The language model alone."""
    return dataclasses.replace(model, value_head=0)


def load_policy(source: Source, config: RunConfig, mesh: Mesh) -> Any:
    """Loads what the policy starts from; a language model becomes a reward model with a new value head."""
    lm, stored = make_language_model(config.model), read_config(source.workdir).model.value_head
    if stored or not config.model.value_head:
        return load_source(source, lm, mesh)
    trunk = load_source(source, make_language_model(without_value_head(config.model)), mesh)
    head = new_value_head(jax.random.key(config.train.seed), config.model.value_head, config.model.dim)
    places = parameter_shardings(mesh, {"value_head": head})
    return trunk | jax.device_put({"value_head": head}, places)


class Loaded(NamedTuple):
    """A trained model, ready for use."""

    lm: LanguageModel
    params: Any
    tokenizer: Tokenizer
    config: RunConfig


def load_run(name: str, *, mesh: Mesh | None = None) -> Loaded:
    """Loads the model and tokenizer of a run's workdir (`@step`, `@last`, `@best` behind it)."""
    place, _, which = name.partition("@")
    source = Source(epath.Path(place), which or "last")
    config = read_config(source.workdir)
    lm = make_language_model(config.model)
    params = load_source(source, lm, mesh or make_mesh(data=1, devices=jax.devices()[:1]))
    return Loaded(lm, params, load_tokenizer(source.workdir), config)


def digest(params: Any) -> str:
    """SHA-256 of all weights, in hex."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sha.update(jax.tree_util.keystr(path).encode())
        whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        sha.update(np.ascontiguousarray(jax.device_get(whole)).tobytes())
    return sha.hexdigest()
