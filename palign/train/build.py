"""From a config to everything that a run works with: sources, data, model, objective, compiled steps."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from palign.config.load import to_plain
from palign.config.schema import ObjectiveConfig, RunConfig
from palign.data.formats import FORMATS
from palign.data.loader import Dataset, batches
from palign.data.stored import tree_sizes
from palign.data.tokenizers import Tokenizer, load_tokenizer
from palign.eval import diagnostics
from palign.eval.displacement import hidden_sums_by_slot
from palign.models.hf import is_hf
from palign.models.lora import attach
from palign.models.protocol import LanguageModel
from palign.models.transformer import make_language_model
from palign.objectives.base import REFERENCE, Forward, Needs, Objective, lengths_by_slot, sum_by_slot
from palign.objectives.compose import Diagnosis, make_objective
from palign.objectives.lora import BASE
from palign.objectives.readings import WEIGHTS, policy_sums, reference_sums
from palign.objectives.registry import find_method, needs_of, resolve_methods
from palign.sharding.mesh import CONTEXT_AXIS, TENSOR_AXIS, make_mesh, num_row_shards, to_global
from palign.sharding.processes import is_main, local_rows
from palign.sharding.rules import FROZEN_SHARDINGS
from palign.train.cached import cache_hidden, cache_reference
from palign.train.followers import EMA, followers_of
from palign.train.kernel import choose_kernel
from palign.train.matching import match_prompts
from palign.train.metrics import add, say, to_floats
from palign.train.models import SIZES, check_models, frozen_kernel, load_start, with_factors, with_sizes
from palign.train.optimizer import make_optimizer
from palign.train.prepare import Prepared, data_key, has_preference, with_vocabulary
from palign.train.prepare_once import prepare_cached
from palign.train.sources import CONFIG, Source, find_source, keep_origin, load_source, without_value_head
from palign.train.state import TrainState, init_state, state_shardings
from palign.train.step import make_eval_step, make_train_step
from palign.types import Batch, Mean


class Run(NamedTuple):
    """Everything that the loop works with."""

    config: RunConfig
    workdir: epath.Path
    mesh: Mesh
    lm: LanguageModel
    data: Prepared
    objective: Objective
    aux: dict[str, Any]
    shardings: TrainState
    train_step: Callable
    eval_step: Any  # with the compiled function beside it, see `make_eval_step`


def build(config: RunConfig, workdir: epath.Path) -> tuple[Run, TrainState]:
    """Builds a run in its workdir, and the state that it begins with.

    Raises:
        ValueError: bad config, data or sources; nothing was trained.
    """
    check_config(config)
    check_same_config(config, workdir)
    sources = find_sources(config, workdir)
    config = with_sizes(config, sources)
    workdir.mkdir(parents=True, exist_ok=True)
    data = prepare_cached(config, workdir, next((source.workdir for source in sources.values()), None))
    _check_tokenizers(data.tokenizer, sources)
    _check_preferences(config, data)
    _check_ratings(config, data)
    config = with_vocabulary(config, data.tokenizer)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_rows(config, mesh)
    _say_what_stays_whole(config, mesh)
    made, state = assemble(config, workdir, mesh, data, sources)
    _check_best_metric(made, state)
    if is_main():
        for source in list(sources.values())[:1]:
            keep_origin(source, workdir)
        (workdir / CONFIG).write_text(json.dumps(to_plain(config), indent=1))  # last: what was refused has not begun
    return made, state


def find_sources(config: RunConfig, workdir: epath.Path) -> dict[str, Source]:
    """Where the policy and the frozen models come from, by role; a stage's name means the sibling of that name."""
    named = {"init": config.init_from, **config.sources}
    sources = {role: find_source(name, f"{role}_from", workdir) for role, name in named.items() if name}
    # What LoRA factors are trained on is what they start from, and the reference where no other is named.
    return {BASE: sources["init"], REFERENCE: sources["init"]} | sources if config.lora.rank else sources


def check_same_config(config: RunConfig, workdir: epath.Path) -> None:
    """A run that was begun goes on, or is left as it is, under the config that it began with.

    Raises:
        ValueError: the workdir holds a run of another config; names the first difference. Or no run.
    """
    if not (workdir / CONFIG).is_file():
        return
    if is_hf(workdir):
        raise ValueError(f"{workdir}: holds a Hugging Face model, not a run; take another --workdir")
    before, now = json.loads((workdir / CONFIG).read_text()), json.loads(json.dumps(to_plain(config)))
    sources = config.init_from or config.sources
    for name in SIZES if sources else ("vocab_size",):  # what is left out is the model's that it starts from
        if getattr(config.model, name) == SIZES[name]:
            now["model"][name] = before["model"][name]
    if before != now:
        raise ValueError(
            f"{workdir}: began with another config ({_first_difference(before, now)}); take the old value back, or "
            "another --workdir"
        )


def _first_difference(before: Any, now: Any, key: str = "config") -> str:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                return _first_difference(before.get(name), now.get(name), f"{key}.{name}")
    return f"{key} was {before!r}, is {now!r}"


def _check_preferences(config: RunConfig, data: Prepared) -> None:
    comparing = [name for name in config.objective.loss_type if find_method(name).compares]
    if comparing and not any(has_preference(size) for size in tree_sizes(data.train.trees)):
        raise ValueError(
            f"{data_key(config.data)}: no record has two responses of different scores, so "
            f"{', '.join(comparing)} would learn nothing; give it pairs or lists, or train with loss_type=('sft',)"
        )


def _check_ratings(config: RunConfig, data: Prepared) -> None:
    rated = [format.name for format in FORMATS if format.weights]
    if config.data.score_weights and not any(data.counts.get(f"format/{name}") for name in rated):
        raise ValueError(f"config.data.score_weights has no effect: no data is {' or '.join(rated)}; remove it")


def _check_tokenizers(tokenizer: Tokenizer, sources: Mapping[str, Source]) -> None:
    for role, source in sources.items():
        if load_tokenizer(source.workdir).fingerprint() != tokenizer.fingerprint():
            raise ValueError(
                f"config.{role}_from: {source.workdir} was trained with another tokenizer than this run uses; all "
                "models of a run must share one: leave config.tokenizer.path empty, and name runs of one family"
            )


def check_rows(config: RunConfig, mesh: Mesh) -> None:
    """Checks that the devices can share a micro-batch's rows evenly, and the blocks of a row.

    Raises:
        ValueError: they cannot.
    """
    shards, rows = num_row_shards(mesh), config.data.rows_per_step // config.data.micro_batches
    if rows % shards:
        raise ValueError(
            f"config.data.rows_per_step = {config.data.rows_per_step} in {config.data.micro_batches} micro-batches "
            f"gives {rows} rows, which {shards} devices (config.mesh: data times fsdp) cannot share evenly; use a "
            f"multiple of {shards * config.data.micro_batches}"
        )
    pieces, length, block = mesh.shape.get(CONTEXT_AXIS, 1), config.data.row_length, config.data.block
    if length % (pieces * block):
        raise ValueError(
            f"config.data.row_length = {length} in blocks of config.data.block = {block}: {pieces} devices "
            f"(config.mesh.context) cannot share a row's blocks evenly; use a multiple of {pieces * block}"
        )


def _say_what_stays_whole(config: RunConfig, mesh: Mesh) -> None:
    tensor, heads = mesh.shape.get(TENSOR_AXIS, 1), config.model.num_key_heads
    if heads % tensor:
        say(
            f"config.mesh.tensor = {tensor} does not divide config.model.num_key_heads = {heads}: every device of the "
            "axis holds all key and value weights"
        )


def assemble(
    config: RunConfig, workdir: epath.Path, mesh: Mesh, data: Prepared, sources: Mapping[str, Source]
) -> tuple[Run, TrainState]:
    """Loads the models, makes the objective and compiles nothing yet."""
    pieces = mesh.shape.get(CONTEXT_AXIS, 1)
    data = _with_each(data, lambda _, dataset: dataclasses.replace(dataset, pieces=pieces))
    kernel = choose_kernel(config, workdir, mesh, data.train)
    lm, trunk = (make_language_model(model, kernel) for model in (config.model, without_value_head(config.model)))
    settings, followers = config.objective, followers_of(config)
    trained, objective = with_factors(config, lm, objective_of(config, lm), sources)
    places = FROZEN_SHARDINGS[config.frozen.placement](mesh, jax.eval_shape(trunk.init, jax.random.key(0)))

    def load(source: Source) -> Any:
        return jax.device_put(load_source(source, lm=trunk, mesh=mesh, dtype=config.frozen.dtype), places)

    aux = {role: load(sources[role]) for role in sorted(objective.frozen - followers.keys())}

    def reference() -> Any:
        held = BASE if sources.get(BASE) == sources[REFERENCE] else REFERENCE
        return aux[held] if held in aux else load(sources[REFERENCE])

    if any(WEIGHTS in find_method(name).reads for name in settings.loss_type):
        data = match_prompts(data, trunk, reference(), mesh, workdir, seed=config.data.seed)
    if settings.reference == "cached":
        data = _with_cached_reference(config, workdir, mesh, trunk, data, reference())
    aux_places = dict.fromkeys(aux, places)
    if settings.teachers == "cached":
        for role in sorted(aux.keys() - {BASE}):
            data = _with_cached_hidden(role, workdir, mesh, trunk, data, aux[role])
            aux[role], aux_places[role] = frozen_kernel(trunk, mesh, aux[role])
    tx, init_carry = make_optimizer(config.optimizer, data.train.num_steps), objective.init_carry
    start, moving = load_start(config, sources, trunk, mesh)
    state = init_state(mesh, trained, tx, seed=config.train.seed, params=start, init_carry=init_carry, models=moving)
    shardings = state_shardings(mesh, trained, tx, init_carry, followers)
    train_step = make_train_step(objective, tx, mesh, shardings, aux_places, followers)
    read = {role: place for role, place in shardings.models.items() if role in objective.frozen}
    eval_step = make_eval_step(objective, mesh, shardings.params, aux_places | read)
    return Run(config, workdir, mesh, lm, data, objective, aux, shardings, train_step, eval_step), state


def trained_model(made: Run, params: Any) -> Any:
    """Parameters of the whole model, from those that are trained."""
    return attach(made.aux[BASE], params, made.config.lora) if made.config.lora.rank else params


def objective_of(config: RunConfig, lm: LanguageModel) -> Objective:
    """What a config asks to be minimised.

    Raises:
        ValueError: methods, weights, hyper-parameters and reference do not fit together.
    """
    settings = config.objective
    return make_objective(
        lm,
        settings.loss_type,
        loss_weights=settings.loss_weights,
        hyper=settings.hyper,
        cached_reference=settings.reference == "cached",
        chunk=settings.head_chunk,
        diagnosis=diagnosis_of(settings),
    )


def _check_best_metric(made: Run, state: TrainState) -> None:
    best = made.config.train.best_metric
    if not best:
        return
    names = set()
    for name, dataset in made.data.evals.items():
        with jax.set_mesh(made.mesh):
            batch = dataset.step_batch(0, micro_batches=1)
            aux = made.aux | _read_by(made.objective, state)
            metrics = jax.eval_shape(made.eval_step.compiled, state.params, state.carry, aux, batch)
        names |= {f"eval_{who}{name}_{metric}" for metric in (*metrics, "loss") for who in _evaluated(state)}
    if best not in names:
        raise ValueError(
            f"config.train.best_metric = {best!r}: no evaluation of this run has it; expected one of "
            f"{', '.join(sorted(names)) or 'none, for nothing is held out'}"
        )


def check_config(config: RunConfig) -> None:
    """Checks what sections of a config say of each other, before anything is read or trained.

    Raises:
        ValueError: an unknown method, a hyper-parameter or a source without effect, or a source that is missing.
    """
    settings, methods = config.objective, ", ".join(config.objective.loss_type)
    resolve_methods(settings.loss_type, settings.hyper)
    needs = needs_of(settings.loss_type)
    reads = needs.frozen | ({REFERENCE} if needs.reference else frozenset())
    if REFERENCE in reads and settings.reference == "none":
        raise ValueError(f"config.objective.reference = 'none': {methods} reads a reference; use 'live' or 'cached'")
    missing = reads - config.sources.keys() - ({REFERENCE} if config.lora.rank else set())
    for role in sorted(missing):
        raise ValueError(f"config.{role}_from: must be set, {methods} reads it; name a stage or a run's workdir")
    for role in sorted(config.sources.keys() - reads):
        raise ValueError(f"config.{role}_from has no effect on {methods}; remove it")
    if needs.values and not config.model.value_head:
        raise ValueError(f"config.model.value_head = 0: {methods} trains a value head; use 1 for a reward model")
    if config.model.value_head and not needs.values:
        raise ValueError(f"config.model.value_head has no effect on {methods}; use 0")
    check_models(config, reads)
    _check_teachers(config, needs.frozen)
    _check_rollout(config)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 1)  # the tokenizer's, not known yet
    objective_of(config, make_language_model(model))


def _check_teachers(config: RunConfig, frozen: frozenset[str]) -> None:
    if config.objective.teachers == "live":
        return
    if not frozen:
        methods = ", ".join(config.objective.loss_type)
        raise ValueError(f"config.objective.teachers = 'cached' has no effect: {methods} reads no frozen logits")
    if config.rollout.every:
        raise ValueError(
            "config.objective.teachers = 'cached': the responses are the policy's own (config.rollout.every = "
            f"{config.rollout.every}) and not known before training; use 'live'"
        )


def _check_rollout(config: RunConfig) -> None:
    every, length, kept = config.rollout.every, config.rollout.max_new_tokens, config.train.checkpoint_every
    if not every:
        return
    if judged := [name for name in config.objective.loss_type if not find_method(name).distils]:
        raise ValueError(
            f"config.rollout.every = {every}: {', '.join(judged)} learns from responses that somebody has judged or "
            "written, and nobody has the policy's own; distillation methods can, such as aligndistil"
        )
    if length >= config.data.max_length:
        raise ValueError(
            f"config.rollout.max_new_tokens = {length} leaves no room for a prompt in config.data.max_length = "
            f"{config.data.max_length}; lower the one or raise the other"
        )
    if kept % every:
        raise ValueError(
            f"config.train.checkpoint_every = {kept}: expected a multiple of config.rollout.every = {every}, or a run "
            "that goes on would draw other samples"
        )


def diagnosis_of(settings: ObjectiveConfig) -> Diagnosis | None:
    """The diagnostics that a config asks for, measured in the pass that trains.

    Raises:
        ValueError: an unknown name, or one that reads a reference where no method does.
    """
    if not settings.diagnostics:
        return None
    read = diagnostics.needs(settings.diagnostics)
    if (read.reference or read.kl) and not needs_of(settings.loss_type).reference:
        raise ValueError(
            f"config.objective.diagnostics = {settings.diagnostics}: some read a reference, "
            f"{', '.join(settings.loss_type)} has none; leave them out"
        )
    if read.kl and settings.reference != "live":
        raise ValueError(
            f"config.objective.reference = {settings.reference!r}: diagnostics/kl reads the reference's whole "
            "distributions; use 'live', or leave it out"
        )
    beta = settings.hyper.get("beta", 0.1)

    def measure(forward: Forward, batch: Batch) -> dict[str, Mean]:
        return diagnostics.diagnose(
            settings.diagnostics,
            policy_sums(forward, batch),
            lengths_by_slot(batch),
            batch,
            reference_logps=reference_sums(forward, batch) if read.reference else None,
            hidden_sums=hidden_sums_by_slot(forward.tower.hidden, batch) if read.hidden else None,
            sequence_kl=sum_by_slot(forward.per_target["policy_kl"], batch) if read.kl else None,
            beta=beta,
        )

    distributions = Needs(per_target=frozenset({"policy_kl"}), frozen=frozenset({REFERENCE})) if read.kl else Needs()
    return Diagnosis(measure, Needs(logps=True, reference=read.reference) | distributions)


def _with_cached_reference(config, workdir, mesh, lm, data: Prepared, params: Any) -> Prepared:
    def cache(name: str, dataset: Dataset) -> Dataset:
        return cache_reference(dataset, name, lm, params, mesh, workdir, chunk=config.objective.head_chunk)

    return _with_each(data, cache)


def _with_cached_hidden(role: str, workdir, mesh, lm, data: Prepared, params: Any) -> Prepared:
    def cache(name: str, dataset: Dataset) -> Dataset:
        return cache_hidden(dataset, name, role, lm, params, mesh, workdir)

    return _with_each(data, cache)


def _with_each(data: Prepared, cache: Callable[[str, Dataset], Dataset]) -> Prepared:
    evals = {name: cache(name, dataset) for name, dataset in data.evals.items()}
    return data._replace(train=cache("train", data.train), evals=evals)


def evaluate(made: Run, state: TrainState) -> dict[str, float]:
    """Metrics of every held-out set, each example counted once, as `eval_SET_METRIC`.

    Those of the policy's moving average are `eval_ema_SET_METRIC`. Methods remember what they do in training (BCO's
    shift), so the loss is the one that is trained.
    """
    values: dict[str, float] = {}
    aux, weights = made.aux | _read_by(made.objective, state), made.objective.weights
    for (who, params), (name, dataset) in itertools.product(_evaluated(state).items(), made.data.evals.items()):
        total: dict[str, Mean] | None = None
        rows = local_rows(made.mesh, dataset.plan.rows_per_step)
        for _, batch in batches(dataset, start_step=0, micro_batches=1, rows=rows):
            total = add(total, made.eval_step(params, state.carry, aux, to_global(made.mesh, batch)))
        assert total is not None
        means = to_floats(total)
        means["loss"] = sum(weight * means.get(f"loss/{term}", 0.0) for term, weight in weights.items())
        values |= {f"eval_{who}{name}_{metric}": value for metric, value in means.items()}
    return values


def _evaluated(state: TrainState) -> dict[str, Any]:
    return {"": state.params} | ({f"{EMA}_": state.models[EMA]} if EMA in state.models else {})


def _read_by(objective: Objective, state: TrainState) -> dict[str, Any]:
    """The models of a state that an objective reads: a reference that moves."""
    return {role: model for role, model in state.models.items() if role in objective.frozen}
