"""The models of a run beside the policy: frozen ones, a LoRA base, those that follow the policy. And their sizes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from palign.config.schema import FrozenConfig, ModelConfig, RunConfig
from palign.models.hf_config import RUN_FIELDS, computed
from palign.models.lora import add_lora
from palign.models.protocol import LanguageModel, Params
from palign.objectives.base import REFERENCE, Objective
from palign.objectives.lora import BASE, with_base
from palign.sharding.rules import parameter_shardings
from palign.train.followers import followers_of
from palign.train.sources import Source, load_policy, load_source, read_config

# What a run that starts from a model takes from it; the rest is how a run computes, and its own.
SIZES = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name not in (*RUN_FIELDS, "value_head")}


def with_sizes(config: RunConfig, sources: Mapping[str, Source]) -> RunConfig:
    """Takes from the model that a run starts from, or reads, what `config.model` leaves at its defaults.

    Raises:
        ValueError: the config says something else than that model.
    """
    if not sources:
        return config
    role = "init" if "init" in sources else next(iter(sources))
    workdir = sources[role].workdir
    stored = read_config(workdir).model
    for name, default in SIZES.items():
        given, there = getattr(config.model, name), getattr(stored, name)
        if given not in (default, there):
            raise ValueError(
                f"config.model.{name} = {given!r}: the model in {workdir} (config.{role}_from) has {there!r}; leave it "
                "out, and the run takes it from there"
            )
    model = dataclasses.replace(config.model, **{name: getattr(stored, name) for name in SIZES})
    for role, source in sources.items():
        other = dataclasses.replace(read_config(source.workdir).model, value_head=model.value_head)
        for name in SIZES:
            ours, theirs = (getattr(computed(m), name) for m in (model, other))
            if ours != theirs:
                raise ValueError(
                    f"config.{role}_from: the model in {source.workdir} has {name} = {theirs!r}, this run's {ours!r}; "
                    "all models of a run are of one architecture and size"
                )
    return dataclasses.replace(config, model=model)


def check_models(config: RunConfig, reads: frozenset[str]) -> None:
    """Checks what the config says of models beside the policy.

    Args:
        config: of the run.
        reads: roles that its methods read.

    Raises:
        ValueError: factors without a base, a reference that cannot move, a setting without effect.
    """
    settings, methods = config.objective, ", ".join(config.objective.loss_type)
    if config.model.param_dtype != "float32":
        raise ValueError(
            f"config.model.param_dtype = {config.model.param_dtype!r}: steps smaller than a weight's rounding would be "
            "lost; use 'float32', and config.model.dtype = 'bfloat16' to compute in bfloat16"
        )
    if config.lora.rank and not config.init_from:
        raise ValueError(f"config.lora.rank = {config.lora.rank}: there is no base; name one in config.init_from")
    if settings.reference_sync_every:
        key = f"config.objective.reference_sync_every = {settings.reference_sync_every}"
        if REFERENCE not in reads:
            raise ValueError(f"{key} has no effect: {methods} reads no reference; remove it")
        if settings.reference != "live" or settings.teachers != "live":
            raise ValueError(f"{key}: a model that moves cannot be cached; use reference='live' and teachers='live'")
        if config.lora.rank or config.model.value_head:
            raise ValueError(f"{key}: only a whole language model can be followed; use lora.rank=0, model.value_head=0")
    frozen = reads - followers_of(config).keys()
    for name, value in dataclasses.asdict(config.frozen).items():
        if value != getattr(FrozenConfig(), name) and not frozen and not config.lora.rank:
            raise ValueError(f"config.frozen.{name} has no effect: {methods} reads no frozen model; remove it")


def with_factors(
    config: RunConfig, lm: LanguageModel, objective: Objective, sources: Mapping[str, Any]
) -> tuple[LanguageModel, Objective]:
    """The model whose `init` gives what is trained, and the objective of that: all weights, or LoRA factors."""
    if not config.lora.rank:
        return lm, objective
    # The base is the reference too, unless that is another model or its hidden states are cached.
    same = sources[REFERENCE] == sources[BASE] and config.objective.teachers == "live"
    shared = objective.frozen & {REFERENCE} if same else frozenset()
    return add_lora(lm, config.lora), with_base(objective, config.lora, shared)


def frozen_kernel(lm: LanguageModel, mesh: Mesh, params: Params) -> tuple[Any, Any]:
    """What the heads read of a model whose hidden states are cached, in its place on the mesh, and that place."""

    def kernel(params: Params) -> dict[str, Any]:
        return {"unembedding": lm.unembed(params).kernel}

    places = parameter_shardings(mesh, jax.eval_shape(kernel, params))
    return jax.jit(kernel, out_shardings=places)(params)["unembedding"], places["unembedding"]


def load_start(
    config: RunConfig, sources: Mapping[str, Source], trunk: LanguageModel, mesh: Mesh
) -> tuple[Params | None, dict[str, Params | None]]:
    """What the trained parameters start from, and each model that follows them; None: random, and as they start.

    A reference that moves is kept in the policy's own type: small steps would be lost in bfloat16.
    """
    start = load_policy(sources["init"], config, mesh) if "init" in sources and not config.lora.rank else None
    moving: dict[str, Any] = dict.fromkeys(followers_of(config))
    if REFERENCE in moving:
        moving[REFERENCE] = load_source(sources[REFERENCE], trunk, mesh)
    return start, moving
