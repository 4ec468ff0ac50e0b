"""Where models come from: a stage's name, a run's workdir, `@step`, `@last`, `@best` or `@ema` behind either.

Or the directory of a Hugging Face model, which reads as a run that was left with these weights.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from palign.config.load import resolve_run
from palign.config.schema import ModelConfig, ObjectiveConfig, RunConfig, TokenizerConfig
from palign.data.tokenizers import Tokenizer, load_tokenizer
from palign.models.hf import describe, is_hf, load_weights
from palign.models.hf_files import inside
from palign.models.lora import add_lora, merge
from palign.models.protocol import LanguageModel
from palign.models.transformer import make_language_model
from palign.models.value_head import new_value_head
from palign.sharding.mesh import make_mesh
from palign.sharding.rules import parameter_shardings
from palign.train.checkpoint import load_facts, load_params
from palign.train.digest import digest
from palign.train.followers import EMA

CONFIG = "config.json"
ORIGIN = "hf"  # folder of a workdir: the small files of the Hugging Face model that its run began from
ORIGIN_FILES = (
    CONFIG,
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


class Source(NamedTuple):
    """A run's workdir and which of its checkpoints; or the directory of a Hugging Face model."""

    workdir: epath.Path
    which: str


def sibling_stages(workdir: epath.Path) -> dict[str, epath.Path]:
    """The stages that lie beside a stage's workdir `NN-name`, by name, without itself."""
    found = {d.name.partition("-")[2]: d for d in sorted(workdir.parent.glob("[0-9][0-9]-*")) if d != workdir}
    return found if workdir.name[:2].isdigit() else {}


def find_source(name: str, key: str, workdir: epath.Path) -> Source:
    """Looks a source up.

    Args:
        name: a sibling stage of `workdir`, or a workdir; either with `@step`, `@last` (the default) or `@best`. Or the
            directory of a Hugging Face model.
        key: the config key that names it, for the message.
        workdir: of the run that reads it.

    Raises:
        ValueError: neither a stage nor a directory with a run or a model in it.
    """
    place, _, which = name.partition("@")
    stages = sibling_stages(workdir)
    found = stages.get(place, epath.Path(place))
    if not (found / CONFIG).is_file():
        known = f"stages here: {', '.join(stages)}" if stages else "there are no stages here"
        raise ValueError(
            f"config.{key} = {name!r}: neither a stage nor the workdir of a run ({known}), nor the directory of a "
            f"Hugging Face model (with a {CONFIG}), which `hf download ORG/NAME --local-dir=DIR` brings"
        )
    if which and is_hf(found):
        raise ValueError(f"config.{key} = {name!r}: a Hugging Face model has no checkpoints; leave @{which} out")
    return Source(found, which or "last")


def read_config(workdir: epath.Path) -> RunConfig:
    """The resolved config of a run; of a Hugging Face model that of one which could have left it.

    Raises:
        ValueError: the directory holds neither.
    """
    file = workdir / CONFIG
    if is_hf(workdir):
        model = describe(workdir).model
        objective = ObjectiveConfig(loss_type=("bradley_terry" if model.value_head else "sft",), reference="none")
        return RunConfig(model=model, tokenizer=TokenizerConfig(path=str(workdir)), objective=objective)
    if not file.is_file():
        stages = ", ".join(str(d) for d in sorted(workdir.glob("[0-9][0-9]-*")))
        hint = f"its stages are {stages}" if stages else "train one, or name another"
        raise ValueError(f"{workdir}: not the workdir of a run (no {CONFIG}); {hint}")
    return resolve_run(json.loads(file.read_text()))


def load_source(source: Source, lm: LanguageModel, mesh: Mesh, *, dtype: str = "") -> Any:
    """Loads a source's weights into their places on the mesh; LoRA factors are merged into their base.

    Args:
        source: which weights.
        lm: the model that they are of.
        mesh: the devices.
        dtype: what they are rounded to as they are read; "": the model's own type.

    Raises:
        ValueError: no such checkpoint, weights of another shape, or a base that is not the one the factors grew on.
    """
    config = read_config(source.workdir)
    if not config.lora.rank:
        return _load(source, lm, mesh, dtype)
    base, factors = load_base(source.workdir, lm, mesh), _load(source, add_lora(lm, config.lora), mesh, "")
    check_base(source, digest(base))

    def merged(base: Any, factors: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype or x.dtype), merge(base, factors, config.lora))

    places = parameter_shardings(mesh, jax.eval_shape(lm.init, jax.random.key(0)))
    return jax.jit(merged, out_shardings=places)(base, factors)


def _load(source: Source, lm: LanguageModel, mesh: Mesh, dtype: str) -> Any:
    shapes = jax.eval_shape(lm.init, jax.random.key(0))

    def target(shape: jax.ShapeDtypeStruct, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, dtype or shape.dtype, sharding=place)

    targets = jax.tree.map(target, shapes, parameter_shardings(mesh, shapes))
    if is_hf(source.workdir):
        return load_weights(source.workdir, targets)
    return load_params(source.workdir, source.which, targets)


def load_base(workdir: epath.Path, lm: LanguageModel, mesh: Mesh) -> Any:
    """Loads the frozen base of a LoRA run: what its `init_from` names, without a value head."""
    config = read_config(workdir)

    def init(key: jax.Array) -> Any:
        return {name: leaf for name, leaf in lm.init(key).items() if name != "value_head"}

    origin = find_source(config.init_from, "init_from", workdir)
    return load_source(origin, lm._replace(init=init, values=None), mesh, dtype=config.frozen.dtype)


def check_base(source: Source, found: str) -> None:
    """Checks that factors are read with the base that they grew on.

    Args:
        source: of the factors.
        found: `digest` of the base that is there now.

    Raises:
        ValueError: it is another one.
    """
    if load_facts(source.workdir, source.which.removesuffix(EMA).removesuffix("-") or "last")["base"] != found:
        raise ValueError(
            f"{source.workdir}: its LoRA factors grew on other weights than its config.init_from = "
            f"{read_config(source.workdir).init_from!r} holds now; bring those back"
        )


def load_factors(source: Source, mesh: Mesh) -> Any:
    """Loads what a LoRA run trained, without its base."""
    config = read_config(source.workdir)
    return _load(source, add_lora(make_language_model(config.model), config.lora), mesh, "")


def keep_origin(source: Source, workdir: epath.Path) -> None:
    """Copies the small files of the Hugging Face model that a source is, or grew from: an export needs them."""
    origin = source.workdir if is_hf(source.workdir) else source.workdir / ORIGIN
    for name in ORIGIN_FILES:
        if (origin / name).is_file():
            (workdir / ORIGIN).mkdir(parents=True, exist_ok=True)
            (workdir / ORIGIN / name).write_bytes(inside(origin, name).read_bytes())


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
    """Loads model and tokenizer of a run's workdir (`@step`, `@last`, `@best` behind it) or a Hugging Face model."""
    place, _, which = name.partition("@")
    source = Source(epath.Path(place), which or "last")
    config = read_config(source.workdir)
    lm = make_language_model(config.model)
    params = load_source(source, lm, mesh or make_mesh(data=1, devices=jax.devices()[:1]))
    return Loaded(lm, params, load_tokenizer(source.workdir), config)
