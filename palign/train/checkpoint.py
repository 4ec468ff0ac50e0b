"""Checkpoints through Orbax: the state, the run's facts, and weights alone for those who only read them.

A step holds the items `params`, `rest` (step counter and optimizer) and, where there is any, `carry` (what methods
remember) and the models that follow the policy, each under its role. And JSON facts of the run: what the data is, the
resolved config, the base of LoRA factors; where the data stands is the step itself. Orbax commits a step atomically;
the newest `keep` steps stay, and the best one by a named metric.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from palign.train.followers import EMA
from palign.train.paths import absolute
from palign.train.state import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that the last save is waited for."""

    def __init__(self, workdir: epath.Path, *, keep: int, best_metric: str = "", best_mode: str = "min"):
        """Opens (or begins) the checkpoints below `workdir`.

        Args:
            workdir: of the run.
            keep: how many of the newest steps stay.
            best_metric: the best step by this metric stays besides; "" for none.
            best_mode: `min` or `max`.
        """
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep)]
        if best_metric:
            sign = -1.0 if best_mode == "min" else 1.0  # the policy keeps the largest

            def rank(metrics: Mapping[str, float]) -> float:
                return sign * metrics[best_metric]

            kept.append(policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False))
        self._metric = best_metric
        self._orbax = ocp.training.Checkpointer(
            absolute(workdir / FOLDER),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the save in flight; an error of it surfaces here."""
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def save(self, state: TrainState, run: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Begins saving a step; returns once the values are copied off the devices.

        Args:
            state: the state.
            run: JSON values, for checks on resume.
            metrics: of this state; where a finite `best_metric` is not among them the step cannot become the best.
        """
        value = metrics.get(self._metric, math.nan)
        ranked = {self._metric: value} if math.isfinite(value) else None
        items = _items(state)
        self._orbax.save_checkpointables_async(int(state.step), items, metrics=ranked, custom_metadata=dict(run))

    def restore(self, shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Loads the newest step into the places that `shapes` (with shardings) gives."""
        items = self._orbax.load_checkpointables(self.steps[-1], _items(shapes))
        facts = self._orbax.checkpointables_metadata(self.steps[-1]).custom_metadata
        return _with_items(items["rest"], items), dict(facts)


def _items(state: TrainState) -> dict[str, Any]:
    """Weights, carry and models apart, so that they can be read without the rest."""
    carry = {"carry": state.carry} if state.carry else {}
    return {"params": state.params, "rest": state._replace(params={}, carry={}, models={}), **carry, **state.models}


def _with_items(state: TrainState, items: Mapping[str, Any]) -> TrainState:
    models = {role: model for role, model in items.items() if role not in ("params", "rest", "carry")}
    return state._replace(params=items["params"], carry=items.get("carry", {}), models=models)


def save_params(workdir: epath.Path, params: Any) -> None:
    """Saves weights that no run trained, as step 0."""
    with ocp.training.Checkpointer(absolute(workdir / FOLDER)) as orbax:
        orbax.save_checkpointables(0, {"params": params})


def load_params(workdir: epath.Path, which: str, shapes: Any) -> Any:
    """Loads a finished or running run's weights.

    Args:
        workdir: of the run.
        which: a step number, `last`, or `best` (by the metric the run was told to keep the best by). `ema`, or `-ema`
            behind one of these, for the moving average of the policy.
        shapes: `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        ValueError: no such checkpoint, or its parameters have other names or shapes.
    """
    item = EMA if which.endswith(EMA) else "params"
    with _opened(workdir, which.removesuffix(EMA).removesuffix("-") or "last") as (orbax, step):
        stored = orbax.checkpointables_metadata(step).metadata
        if item not in stored:
            raise ValueError(f"{workdir}@{which}: the run kept no average; it had no config.train.ema_decay")
        _check_shapes(f"{workdir}@{step}", stored[item], shapes)
        return orbax.load_checkpointables(step, {item: shapes})[item]


def load_models(workdir: epath.Path, which: str, shapes: TrainState) -> TrainState:
    """Loads what an evaluation reads: parameters, what methods remember, and the models that follow the policy.

    Args:
        workdir: of the run.
        which: a step number, `last` or `best`.
        shapes: of the state, with shardings; step and optimizer come back as they are given.
    """
    items = {name: item for name, item in _items(shapes).items() if name != "rest"}
    with _opened(workdir, which) as (orbax, step):
        return _with_items(shapes, orbax.load_checkpointables(step, items))


def load_facts(workdir: epath.Path, which: str) -> dict[str, Any]:
    """Loads the JSON facts that were saved with a checkpoint."""
    with _opened(workdir, which) as (orbax, step):
        return dict(orbax.checkpointables_metadata(step).custom_metadata)


@contextlib.contextmanager
def _opened(workdir: epath.Path, which: str) -> Iterator[tuple[Any, int]]:
    """The checkpoints of a run, and the step that is meant."""
    folder = workdir / FOLDER
    if not folder.is_dir():
        raise ValueError(f"{workdir}: holds no checkpoints; expected the workdir of a run (with {FOLDER}/ in it)")
    with ocp.training.Checkpointer(absolute(folder)) as orbax:
        yield orbax, _choose(workdir, which, {checkpoint.step: checkpoint for checkpoint in orbax.checkpoints})


def _choose(workdir: epath.Path, which: str, steps: Mapping[int, Any]) -> int:
    if not steps:
        raise ValueError(f"{workdir}: no checkpoint is complete; let the run save one first")
    if which == "last":
        return max(steps)
    if which == "best":
        ranked = [(next(iter(c.metrics.values())), step) for step, c in steps.items() if c.metrics]
        if not ranked:
            raise ValueError(f"{workdir}@best: the run kept no best step; set config.train.best_metric, or use @last")
        return _best(workdir, ranked)
    if not which.isdigit() or int(which) not in steps:
        raise ValueError(f"{workdir}@{which}: no such checkpoint; there are {sorted(steps)}, last and best")
    return int(which)


def _best(workdir: epath.Path, ranked: list[tuple[float, int]]) -> int:
    mode = json.loads((workdir / "config.json").read_text())["train"]["best_mode"]
    return (min if mode == "min" else max)(ranked)[1]


def _check_shapes(name: str, stored: Any, shapes: Any) -> None:
    def flat(tree):
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    have, want = flat(stored), flat(shapes)
    for key in sorted(have.keys() | want.keys()):
        if have.get(key) != want.get(key):
            raise ValueError(
                f"{name}: parameter {key} is {have.get(key, 'absent')} in the checkpoint and {want.get(key, 'absent')} "
                "by config.model; use the model settings (and tokenizer) that it was trained with"
            )
