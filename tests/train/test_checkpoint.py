"""What a run's checkpoints hold, which of them stay, and what is said of those that cannot be loaded."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.train.checkpoint import FOLDER, Checkpoints, load_params
from palign.train.state import TrainState

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step: int) -> TrainState:
    weights = {"w": jnp.arange(6.0).reshape(2, 3) + step, "b": jnp.full(3, step, jnp.bfloat16)}
    moments = {"mu": jax.tree.map(lambda x: x * 0.1, weights), "count": jnp.asarray(step, jnp.int32)}
    return TrainState(jnp.asarray(step, jnp.int32), weights, moments, jnp.zeros((), jnp.int32), {}, {})


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DEVICE), tree)


WANTED = shapes(state(0).params)


def write(workdir, metrics, *, keep=1, best_metric="m", best_mode="min"):
    """Saves a step for each value of the metric `m`; None saves one without."""
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"train": {"best_mode": best_mode}}))
    with Checkpoints(workdir, keep=keep, best_metric=best_metric, best_mode=best_mode) as checkpoints:
        for step, value in enumerate(metrics, 1):
            checkpoints.save(state(step), {"step": step}, {} if value is None else {"m": value, "other": -value})
    return workdir


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / FOLDER).iterdir())


def loaded_step(workdir, which) -> int:
    return int(load_params(workdir, which, WANTED)["b"][0])


def test_a_state_and_the_facts_of_its_run_come_back_as_they_were(tmp_path):
    facts = {"data": "ab12", "config": {"model": {"dim": 16}, "list": [1, 2.5, None]}}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == []
        checkpoints.save(state(3), facts, {})
        checkpoints.save(state(5), facts | {"data": "cd34"}, {})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == [3, 5]
        restored, found = checkpoints.restore(shapes(state(0)))
    assert found == facts | {"data": "cd34"}
    assert jax.tree.structure(restored) == jax.tree.structure(state(5))
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state(5)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(
    ("keep", "mode", "values", "expected", "best"),
    [
        (1, "min", [3.0, 1.0, 2.0, 4.0], [2, 4], 2),
        (1, "max", [3.0, 5.0, 2.0, 4.0], [2, 4], 2),
        (2, "min", [1.0, 3.0, 2.0, 4.0], [1, 3, 4], 1),
        (2, "min", [4.0, 3.0, 2.0, 1.0], [3, 4], 4),  # the best is among the newest
        (1, "min", [2.0, None, None], [1, 3], 1),  # a step that was not evaluated cannot be the best
        (1, "min", [2.0, math.nan, 3.0], [1, 3], 1),
        (1, "max", [2.0, math.inf, math.nan, 1.0], [1, 4], 1),
        (3, "min", [None, None, None, None], [2, 3, 4], None),
    ],
)
def test_the_newest_stay_and_the_best_besides(keep, mode, values, expected, best, tmp_path):
    workdir = write(tmp_path, values, keep=keep, best_mode=mode)
    assert kept(workdir) == expected
    assert loaded_step(workdir, "last") == len(values)
    if best is not None:
        assert loaded_step(workdir, "best") == best


def test_without_a_metric_to_keep_the_best_by_only_the_newest_stay_and_there_is_no_best(tmp_path):
    workdir = write(tmp_path, [1.0, 2.0, 3.0], keep=2, best_metric="")
    assert kept(workdir) == [2, 3]
    with pytest.raises(ValueError, match=r"@best: the run kept no best step; set config.train.best_metric"):
        load_params(workdir, "best", WANTED)


def test_the_best_outlives_a_restart_of_the_run(tmp_path):
    workdir = write(tmp_path, [1.0, 2.0])
    with Checkpoints(workdir, keep=1, best_metric="m") as checkpoints:
        for step in (3, 4):
            checkpoints.save(state(step), {}, {"m": 5.0})
    assert kept(workdir) == [1, 4]
    assert loaded_step(workdir, "best") == 1


def test_weights_alone_are_loaded_by_step_last_and_best(tmp_path):
    workdir = write(tmp_path, [2.0, 1.0, 3.0], keep=3)
    assert [loaded_step(workdir, which) for which in ("1", "2", "3", "last", "best")] == [1, 2, 3, 3, 2]
    params = load_params(workdir, "2", WANTED)
    np.testing.assert_array_equal(params["w"], state(2).params["w"])
    assert set(params) == {"w", "b"}


@pytest.mark.parametrize("which", ["9", "first", "-1", "1.0"])
def test_a_step_that_does_not_exist_is_refused_with_those_that_do(which, tmp_path):
    workdir = write(tmp_path, [2.0, 1.0], keep=2)
    with pytest.raises(ValueError, match=rf"@{which}: no such checkpoint; there are \[1, 2\], last and best"):
        load_params(workdir, which, WANTED)


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoints; expected the workdir of a run"):
        load_params(tmp_path, "last", WANTED)
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(ValueError, match="no checkpoint is complete"):
        load_params(tmp_path, "last", WANTED)


def test_a_checkpoint_that_was_cut_off_is_not_counted_and_the_run_removes_it(tmp_path):
    workdir = write(tmp_path, [1.0, 2.0], keep=2)
    (workdir / FOLDER / "2").rename(workdir / FOLDER / "2.orbax-checkpoint-tmp")
    assert loaded_step(workdir, "last") == 1
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(state(2), {}, {})
    assert kept(workdir) == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=DEVICE)}, r"\['w'\] is \(2, 3\) .* and \(2, 4\) by"),
        ({"extra": jax.ShapeDtypeStruct((1,), jnp.float32, sharding=DEVICE)}, r"\['extra'\] is absent in the check"),
        ({"b": None}, r"\['b'\] is \(3,\) in the checkpoint and absent by config.model"),
    ],
)
def test_parameters_of_another_model_are_refused_by_name_and_shape(change, message, tmp_path):
    workdir = write(tmp_path, [1.0])
    with pytest.raises(ValueError, match=message):
        load_params(workdir, "last", WANTED | change)
