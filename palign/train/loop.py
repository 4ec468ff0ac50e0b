"""One run: build, restore or begin, train, evaluate, checkpoint; a finished one is left alone, another goes on."""

import contextlib
import json
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np
from etils import epath

from palign.config.load import to_plain
from palign.config.schema import RunConfig
from palign.data.chat import stop_ids
from palign.data.loader import batches, fingerprint
from palign.models.protocol import Params
from palign.objectives.lora import BASE
from palign.sharding.mesh import to_global
from palign.sharding.processes import is_main, local_rows, notice_of_end
from palign.train.build import (
    Run,
    build,
    check_config,
    check_same_config,
    evaluate,
    find_sources,
    trained_model,
)
from palign.train.checkpoint import Checkpoints
from palign.train.digest import digest
from palign.train.lock import run_lock
from palign.train.metrics import MetricWriter, Reporter, read_metrics, say, to_floats
from palign.train.optimizer import learning_rate_schedule
from palign.train.prepare import data_key
from palign.train.rollout import make_draw, on_policy_batches
from palign.train.sources import Source, check_base
from palign.train.state import TrainState
from palign.types import Batch, Mean

FINISHED = "finished.json"


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient was not finite too many steps in a row."""


class PreemptedError(RuntimeError):
    """The machine is taken away: the run was told to stop, and has saved where it was."""


def run(config: RunConfig, workdir: epath.Path) -> dict[str, float]:
    """Trains what a config describes, into `workdir`.

    Args:
        config: resolved and checked. Its sources may name sibling stages of `workdir`.
        workdir: receives `config.json`, the tokenizer, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and at the end
            `finished.json`.

    Returns:
        The last evaluation's metrics.

    Raises:
        ValueError: bad config, data or sources; nothing was trained.
        TrainingDivergedError: not finite for `config.train.stop_after_nonfinite` steps in a row.
        PreemptedError: stopped by SIGTERM, with a checkpoint of the step that was being taken.
    """
    workdir = epath.Path(workdir)
    if (workdir / FINISHED).is_file():
        check_same_config(config, workdir)
        say(f"{workdir}: finished before, left as it is")
        return json.loads((workdir / FINISHED).read_text())["metrics"]
    check_config(config)
    find_sources(config, workdir)  # what cannot begin leaves no workdir behind
    with run_lock(workdir), notice_of_end() as told_to_stop:
        made, state = build(config, workdir)
        train = made.config.train
        best = dict(best_metric=train.best_metric, best_mode=train.best_mode)
        with Checkpoints(workdir, keep=train.keep, **best) as checkpoints:
            state = _resume(made, state, checkpoints)
            metrics = _train(made, state, checkpoints, told_to_stop)
        if is_main():
            finished = {"steps": made.data.train.num_steps, "metrics": metrics}
            (workdir / FINISHED).write_text(json.dumps(finished, indent=1))
    return metrics


def _fingerprints(made: Run) -> dict[str, str]:
    return {name: fingerprint(dataset) for name, dataset in {"train": made.data.train, **made.data.evals}.items()}


def _facts(made: Run) -> dict[str, Any]:
    base = {"base": digest(made.aux[BASE])} if BASE in made.aux else {}
    return {"data": _fingerprints(made), "config": json.loads(json.dumps(to_plain(made.config))), **base}


def _resume(made: Run, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    if not checkpoints.steps:
        return state
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, made.shardings)
    state, facts = checkpoints.restore(shapes)
    if changed := [name for name, value in _fingerprints(made).items() if facts["data"].get(name) != value]:
        raise ValueError(
            f"{made.workdir}: the data is not what this run began with ("
            f"{data_key(made.config.data)}: {', '.join(changed)}); bring the old file back, or use another --workdir"
        )
    if BASE in made.aux:
        check_base(Source(made.workdir, "last"), digest(made.aux[BASE]))
    say(f"{made.workdir}: resumes after step {int(state.step)} of {made.data.train.num_steps}")
    return state


def _train(
    made: Run, state: TrainState, checkpoints: Checkpoints, told_to_stop: Callable[[int], bool]
) -> dict[str, float]:
    """The loop. Metrics are read a step late, so that the device never waits for the host."""
    train, num_steps, start = made.config.train, made.data.train.num_steps, int(state.step)
    rate = learning_rate_schedule(made.config.optimizer, num_steps)
    writer = MetricWriter(made.workdir, start_step=start)
    facts, evaluated = _facts(made), last_evaluation(made.workdir)
    steps = _steps(made, lambda: trained_model(made, state.params), start)
    pending: tuple[int, dict[str, Mean], np.ndarray, dict[str, float]] | None = None
    try:
        with Reporter(made.workdir.name, num_steps, start=start) as progress:
            for step, host, figures in steps:
                state, metrics = made.train_step(state, made.aux, to_global(made.mesh, host))
                if pending:
                    _report(made, *pending, rate, writer, progress)
                pending = (step + 1, metrics, host.example_id, figures)
                last, fresh = step + 1 == num_steps, {}
                stops = told_to_stop(step + 1) and (step + 1) % max(made.config.rollout.every, 1) == 0
                if last or (train.eval_every and (step + 1) % train.eval_every == 0):
                    evaluated = fresh = evaluate(made, state)
                    if evaluated:
                        writer.write(step + 1, evaluated)
                if last or stops or (step + 1) % train.checkpoint_every == 0:
                    _report(made, *pending, rate, writer, progress)  # a diverged state is not worth saving
                    pending = None
                    writer.flush()
                    checkpoints.save(state, facts, fresh)
                if stops and not last:
                    raise PreemptedError(
                        f"{made.workdir}: told to stop, saved step {step + 1} of {num_steps}; the same command goes on"
                    )
    finally:
        steps.close()
        writer.close()
    return evaluated


def _steps(made: Run, current: Callable[[], Params], start: int) -> Generator[tuple[int, Batch, dict[str, float]]]:
    """Yields (step, batch, figures to be logged with it): the data's responses, or the policy's own."""
    settings, dataset, micro_batches = made.config.rollout, made.data.train, made.config.data.micro_batches
    rows = local_rows(made.mesh, dataset.plan.rows_per_step // micro_batches)
    if settings.every:
        draw = make_draw(made.lm, made.mesh, dataset, settings, eos_ids=stop_ids(made.data.tokenizer))
        seed, every = made.config.train.seed, settings.every
        yield from on_policy_batches(
            dataset, draw, current, every=every, start=start, micro_batches=micro_batches, seed=seed, rows=rows
        )
        return
    with contextlib.closing(batches(dataset, start_step=start, micro_batches=micro_batches, rows=rows)) as steps:
        for step, batch in steps:
            yield step, batch, {}


def _report(made, step, metrics, examples, figures, rate, writer, progress) -> None:
    train = made.config.train
    values = to_floats(metrics)
    progress.advance(step, values["num_tokens"], loss=values["loss"])
    if step % train.log_every == 0 or step in (1, made.data.train.num_steps):
        epoch = made.data.train.plan.epoch_of_row
        row = min(step * made.data.train.plan.rows_per_step, len(epoch)) - 1
        logged = (
            values
            | figures
            | {
                "learning_rate": float(rate(step - 1)),
                "epoch": int(epoch[row]),
                "tokens_per_second": progress.rate,
            }
        )
        writer.write(step, logged)
    if values["nonfinite"] >= train.stop_after_nonfinite:
        ids = sorted({int(i) for i in examples.reshape(-1) if i >= 0})
        raise TrainingDivergedError(
            f"{made.workdir.name}: loss or gradient not finite at step {step} (examples {ids[:20]}); parameters are "
            f"those of step {step - int(values['nonfinite'])}. Lower config.optimizer.learning_rate or look at the data"
        )


def last_evaluation(workdir: epath.Path) -> dict[str, float]:
    """The newest evaluation in a run's log."""
    for line in reversed(read_metrics(workdir)):
        if any(name.startswith("eval_") for name in line):
            return {name: value for name, value in line.items() if name != "step"}
    return {}
