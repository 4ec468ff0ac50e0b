"""Checkpoints through Orbax: the state, the run's facts, and weights alone for those who only read them.

A step holds the items `params`, `rest` (step counter and optimizer) and, where methods remember anything, `carry`, and
JSON facts of the run: what the data is
and the resolved config; where the data stands is the step itself. Orbax commits a step atomically; the newest `keep`
steps stay, and the best one by a named metric.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

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
        state = items["rest"]._replace(params=items["params"], carry=items.get("carry", {}))
        return state, dict(facts)


def _items(state: TrainState) -> dict[str, Any]:
    """Weights and carry apart, so that they can be read without the rest."""
    carry = {"carry": state.carry} if state.carry else {}
    return {"params": state.params, "rest": state._replace(params={}, carry={}), **carry}


def load_params(workdir: epath.Path, which: str, shapes: Any) -> Any:
    """Loads a finished or running run's weights.

    Args:
        workdir: of the run.
        which: a step number, `last`, or `best` (by the metric the run was told to keep the best by).
        shapes: `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        ValueError: no such checkpoint, or its parameters have other names or shapes.
    """
    folder = workdir / FOLDER
    if not folder.is_dir():
        raise ValueError(f"{workdir}: holds no checkpoints; expected the workdir of a run (with {FOLDER}/ in it)")
    with ocp.training.Checkpointer(absolute(folder)) as orbax:
        steps = {checkpoint.step: checkpoint for checkpoint in orbax.checkpoints}
        step = _choose(workdir, which, steps)
        _check_shapes(f"{workdir}@{step}", orbax.checkpointables_metadata(step).metadata["params"], shapes)
        return orbax.load_checkpointables(step, {"params": shapes})["params"]


def load_carry(workdir: epath.Path, which: str, shapes: Any) -> Any:
    """Loads what a run's methods remembered at a checkpoint.

    Args:
        workdir: of the run, whose parameters have been loaded (so the checkpoint is there).
        which: as in `load_params`.
        shapes: `jax.ShapeDtypeStruct`s with shardings; nothing is read where there are none.
    """
    if not shapes:
        return shapes
    with ocp.training.Checkpointer(absolute(workdir / FOLDER)) as orbax:
        step = _choose(workdir, which, {checkpoint.step: checkpoint for checkpoint in orbax.checkpoints})
        return orbax.load_checkpointables(step, {"carry": shapes})["carry"]


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
