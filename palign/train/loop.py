"""One run: prepare, restore or begin, train, evaluate, checkpoint. A finished run is left alone, an unfinished resumes."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from palign.config.load import to_plain
from palign.config.schema import RunConfig
from palign.data.loader import Dataset, batches, fingerprint
from palign.models.protocol import LanguageModel
from palign.models.transformer import make_language_model
from palign.objectives.base import REFERENCE, Objective
from palign.objectives.registry import make_objective
from palign.sharding.mesh import make_mesh, num_row_shards, to_global
from palign.sharding.rules import parameter_shardings
from palign.train.checkpoint import Checkpoints
from palign.train.metrics import MetricWriter, Reporter, add, read_metrics, say, to_floats
from palign.train.optimizer import learning_rate_schedule, make_optimizer
from palign.train.prepare import Prepared, prepare, with_vocabulary
from palign.train.reference import cache_reference
from palign.train.sources import CONFIG, Source, find_source, load_source
from palign.train.state import TrainState, init_state, state_shardings
from palign.train.step import make_eval_step, make_train_step
from palign.types import Mean

FINISHED = "finished.json"


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient was not finite too many steps in a row."""


class Run(NamedTuple):
    """Everything that the loop works with."""

    config: RunConfig
    workdir: pathlib.Path
    mesh: Mesh
    lm: LanguageModel
    data: Prepared
    objective: Objective
    aux: dict[str, Any]
    shardings: TrainState
    train_step: Callable
    eval_step: Callable


def run(config: RunConfig, workdir: pathlib.Path, *, stages: Mapping[str, pathlib.Path] | None = None) -> dict[str, float]:
    """Trains what a config describes, into `workdir`.

    Args:
        config: resolved and checked.
        workdir: receives `config.json`, the tokenizer, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and at the end
            `finished.json`.
        stages: earlier stages' workdirs by name, which `init_from` and the like may name.

    Returns:
        The last evaluation's metrics.

    Raises:
        ValueError: bad config, data or sources; nothing was trained.
        TrainingDivergedError: not finite for `config.train.stop_after_nonfinite` steps in a row.
    """
    if (workdir / FINISHED).is_file():
        say(f"{workdir}: finished before, left as it is")
        return json.loads((workdir / FINISHED).read_text())["metrics"]
    workdir.mkdir(parents=True, exist_ok=True)
    sources = _find_sources(config, stages or {})
    inherited = next((source.workdir for source in sources.values()), None)
    data = prepare(config, workdir, inherited)
    config = with_vocabulary(config, data.tokenizer)
    _keep_config(config, workdir)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    _check_rows(config, mesh)
    made, state = _build(config, workdir, mesh, data, sources)
    with Checkpoints(
        workdir, keep=config.train.keep, best_metric=config.train.best_metric, best_mode=config.train.best_mode
    ) as checkpoints:
        state = _resume(made, state, checkpoints)
        metrics = _train(made, state, checkpoints)
    (workdir / FINISHED).write_text(json.dumps({"steps": data.train.num_steps, "metrics": metrics}, indent=1))
    return metrics


def _find_sources(config: RunConfig, stages: Mapping[str, pathlib.Path]) -> dict[str, Source]:
    named = {"init": config.init_from, **config.sources}
    return {role: find_source(name, f"{role}_from", stages) for role, name in named.items() if name}


def _keep_config(config: RunConfig, workdir: pathlib.Path) -> None:
    """Writes the resolved config; a run that goes on must go on with the one it began with."""
    plain, file = to_plain(config), workdir / CONFIG
    if file.is_file() and (before := json.loads(file.read_text())) != json.loads(json.dumps(plain)):
        raise ValueError(
            f"{workdir}: began with another config ({_first_difference(before, plain)}); take the old value back, or "
            "another --workdir"
        )
    file.write_text(json.dumps(plain, indent=1))


def _first_difference(before: Any, now: Any, key: str = "config") -> str:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != json.loads(json.dumps(now.get(name))):
                return _first_difference(before.get(name), now.get(name), f"{key}.{name}")
    return f"{key} was {before!r}, is {now!r}"


def _check_rows(config: RunConfig, mesh: Mesh) -> None:
    shards, rows = num_row_shards(mesh), config.data.rows_per_step // config.data.micro_batches
    if rows % shards:
        raise ValueError(
            f"config.data.rows_per_step = {config.data.rows_per_step} in {config.data.micro_batches} micro-batches gives "
            f"{rows} rows, which {shards} devices (config.mesh) cannot share evenly; use a multiple of "
            f"{shards * config.data.micro_batches}"
        )


def _build(config, workdir, mesh, data, sources) -> tuple[Run, TrainState]:
    lm = make_language_model(config.model)
    settings = config.objective
    cached = settings.reference == "cached"
    objective = make_objective(
        lm,
        settings.loss_type,
        loss_weights=settings.loss_weights,
        hyper=settings.hyper,
        cached_reference=cached,
        chunk=settings.head_chunk,
    )
    _check_roles(config, objective, sources)
    places = parameter_shardings(mesh, jax.eval_shape(lm.init, jax.random.key(0)))
    aux = {role: load_source(sources[role], lm, mesh) for role in sorted(objective.frozen)}
    if cached:
        data = _with_cached_reference(config, workdir, mesh, lm, data, sources[REFERENCE])
    tx = make_optimizer(config.optimizer, data.train.num_steps)
    start = load_source(sources["init"], lm, mesh) if "init" in sources else None
    state = init_state(mesh, lm, tx, seed=config.train.seed, params=start)
    shardings = state_shardings(mesh, lm, tx)
    aux_places = dict.fromkeys(aux, places)
    train_step = make_train_step(objective, tx, mesh, shardings, aux_places)
    eval_step = make_eval_step(objective, mesh, places, aux_places)
    return Run(config, workdir, mesh, lm, data, objective, aux, shardings, train_step, eval_step), state


def _check_roles(config: RunConfig, objective: Objective, sources: Mapping[str, Source]) -> None:
    reads = objective.frozen | ({REFERENCE} if config.objective.reference == "cached" else frozenset())
    methods = ", ".join(config.objective.loss_type)
    if REFERENCE in reads and config.objective.reference == "none":
        raise ValueError(f"config.objective.reference = 'none': {methods} reads a reference; use 'live' or 'cached'")
    for role in sorted(reads - sources.keys()):
        raise ValueError(f"config.{role}_from: must be set, {methods} reads it; name a stage or a run's workdir")
    for role in sorted(sources.keys() - reads - {"init"}):
        raise ValueError(f"config.{role}_from has no effect on {methods}; remove it")


def _with_cached_reference(config, workdir, mesh, lm, data: Prepared, source: Source) -> Prepared:
    params = load_source(source, lm, mesh)

    def cache(name: str, dataset: Dataset) -> Dataset:
        return cache_reference(dataset, name, lm, params, mesh, workdir, chunk=config.objective.head_chunk)

    evals = {name: cache(name, dataset) for name, dataset in data.evals.items()}
    return data._replace(train=cache("train", data.train), evals=evals)


def _facts(made: Run) -> dict[str, Any]:
    return {"data": fingerprint(made.data.train), "config": json.loads(json.dumps(to_plain(made.config)))}


def _resume(made: Run, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    if not checkpoints.steps:
        return state
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, made.shardings)
    state, facts = checkpoints.restore(shapes)
    if facts["data"] != fingerprint(made.data.train):
        raise ValueError(
            f"{made.workdir}: the data is not what this run began with (config.data.path = {made.config.data.path!r}); "
            "bring the old file back, or use another --workdir"
        )
    say(f"{made.workdir}: resumes after step {int(state.step)} of {made.data.train.num_steps}")
    return state


def _train(made: Run, state: TrainState, checkpoints: Checkpoints) -> dict[str, float]:
    """The loop. Metrics are read a step late, so that the device never waits for the host."""
    train, num_steps, start = made.config.train, made.data.train.num_steps, int(state.step)
    rate = learning_rate_schedule(made.config.optimizer, num_steps)
    writer = MetricWriter(made.workdir, start_step=start)
    facts, evaluated = _facts(made), last_evaluation(made.workdir)
    steps = batches(made.data.train, start_step=start, micro_batches=made.config.data.micro_batches)
    pending: tuple[int, dict[str, Mean], np.ndarray] | None = None
    try:
        with Reporter(made.workdir.name, num_steps, start=start) as progress:
            for step, host in steps:
                state, metrics = made.train_step(state, made.aux, to_global(made.mesh, host))
                if pending:
                    _report(made, *pending, rate, writer, progress)
                pending = (step + 1, metrics, host.example_id)
                last = step + 1 == num_steps
                if last or (train.eval_every and (step + 1) % train.eval_every == 0):
                    evaluated = evaluate(made, state.params)
                    writer.write(step + 1, evaluated)
                if last or (step + 1) % train.checkpoint_every == 0:
                    _report(made, *pending, rate, writer, progress)  # a diverged state is not worth saving
                    pending = None
                    checkpoints.save(state, facts, evaluated)
    finally:
        steps.close()
        writer.close()
    return evaluated


def _report(made, step, metrics, examples, rate, writer, progress) -> None:
    train = made.config.train
    values = to_floats(metrics)
    progress.advance(step, values["num_tokens"], loss=values["loss"])
    if step % train.log_every == 0 or step in (1, made.data.train.num_steps):
        epoch = made.data.train.plan.epoch_of_row
        row = min(step * made.data.train.plan.rows_per_step, len(epoch)) - 1
        writer.write(step, values | {"learning_rate": float(rate(step - 1)), "epoch": int(epoch[row])})
    if values["nonfinite"] >= train.stop_after_nonfinite:
        ids = sorted({int(i) for i in examples.reshape(-1) if i >= 0})
        raise TrainingDivergedError(
            f"{made.workdir.name}: loss or gradient not finite at step {step} (examples {ids[:20]}); parameters are "
            f"those of step {step - int(values['nonfinite'])}. Lower config.optimizer.learning_rate, or look at the data"
        )


def last_evaluation(workdir: pathlib.Path) -> dict[str, float]:
    """The newest evaluation in a run's log."""
    for line in reversed(read_metrics(workdir)):
        if any(name.startswith("eval_") for name in line):
            return {name: value for name, value in line.items() if name != "step"}
    return {}


def evaluate(made: Run, params: Any) -> dict[str, float]:
    """Metrics of every held-out set, each example counted once, as `eval_SET_METRIC`."""
    values: dict[str, float] = {}
    for name, dataset in made.data.evals.items():
        total: dict[str, Mean] | None = None
        for _, batch in batches(dataset, start_step=0, micro_batches=1):
            total = add(total, made.eval_step(params, made.aux, to_global(made.mesh, batch)))
        assert total is not None
        means = to_floats(total)
        weights = made.objective.weights
        means["loss"] = sum(weight * means.get(f"loss/{term}", 0.0) for term, weight in weights.items())
        values |= {f"eval_{name}_{metric}": value for metric, value in means.items()}
    return values

