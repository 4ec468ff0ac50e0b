"""Whole runs: killed and resumed, finished, changed, diverged; what they keep, and where their models come from."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.config.load import resolve_run
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from palign.train import loop
from palign.train.build import build, check_config
from palign.train.checkpoint import Checkpoints
from palign.train.loop import FINISHED, TrainingDivergedError, run
from palign.train.metrics import read_metrics
from palign.train.sources import Source, find_source, load_run, load_source, read_config
from tests.recipes.tiny_runs import config, one_device, plain, write_pairs

ROOT = pathlib.Path(__file__).parents[2]
BEST = "eval_heldout_loss"

# A run whose process is killed when step N is reported, when its checkpoint is begun (`saving`) or committed (`saved`),
# or after the Nth evaluation of the process.
CHILD = """
import itertools, json, os, pathlib, signal, sys
import tests.conftest
from palign.config.load import resolve_run
from palign.train import checkpoint, loop, metrics
from tests.recipes.tiny_runs import one_device

settings, workdir, where, at = json.loads(sys.stdin.read())
advance, save, evaluate = metrics.Reporter.advance, checkpoint.Checkpoints.save, loop.evaluate
calls = itertools.count(1)

def pass_by(place, step):
    if (place, step) == (where, at):
        os.kill(os.getpid(), signal.SIGKILL)

def dangerous_advance(self, done, *args, **kwargs):
    if self._title == pathlib.Path(workdir).name:  # of the run, not of what comes before
        pass_by("reported", done)
    advance(self, done, *args, **kwargs)

def dangerous_save(self, state, *args):
    save(self, state, *args)
    pass_by("saving", int(state.step))
    self._orbax.wait()
    pass_by("saved", int(state.step))

def dangerous_evaluate(*args):
    evaluated = evaluate(*args)
    pass_by("evaluated", next(calls))
    return evaluated

metrics.Reporter.advance, checkpoint.Checkpoints.save = dangerous_advance, dangerous_save
loop.evaluate = dangerous_evaluate
with one_device():
    loop.run(resolve_run(settings), pathlib.Path(workdir))
"""


@pytest.fixture(scope="module", autouse=True)
def single():
    with one_device():
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 60, prompts=40)


@pytest.fixture(scope="module")
def settings(pairs):
    return plain(pairs, train={"best_metric": BEST, "eval_every": 1, "checkpoint_every": 2, "keep": 1, "max_steps": 6})


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    """A run that nobody disturbed: its workdir and what it returned."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    return workdir, run(resolve_run(settings), workdir)


@pytest.fixture(scope="module")
def state_of(straight, settings):
    """Reads the state in the newest checkpoint of a run of these settings, through `Checkpoints.restore`."""
    made, state = build(resolve_run(settings), straight[0])
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, made.shardings)

    def read(workdir: pathlib.Path):
        with Checkpoints(workdir, keep=9) as checkpoints:
            return jax.device_get(checkpoints.restore(shapes)[0])

    return read


def logged(workdir):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(workdir)]


def killed(settings, workdir, where, at):
    """Runs the settings in a process that is killed at a step."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, timeout=300,
        input=json.dumps([settings, str(workdir), where, at]), env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]


def assert_ends_like(straight, settings, workdir, state_of):
    metrics = run(resolve_run(settings), workdir)
    assert metrics == straight[1]
    one, other = state_of(straight[0]), state_of(workdir)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
    assert int(one.step) == 6 and any(np.abs(m).max() > 0 for m in jax.tree.leaves(one.opt_state))
    assert logged(workdir) == logged(straight[0])
    assert [path.name for path in sorted((workdir / "checkpoints").iterdir())] == [
        path.name for path in sorted((straight[0] / "checkpoints").iterdir())
    ]


def test_a_run_killed_between_checkpoints_and_started_again_ends_bit_equal(straight, settings, state_of, tmp_path):
    workdir = tmp_path / "run"
    killed(settings, workdir, "reported", 4)  # step 2 is saved; 3 is logged and has to be taken again
    assert max(line["step"] for line in read_metrics(workdir)) >= 3
    assert not (workdir / FINISHED).is_file() and (workdir / "checkpoints" / "2").is_dir()
    assert_ends_like(straight, settings, workdir, state_of)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        [("reported", 1)],  # before anything was saved
        [("saving", 2)],
        [("saved", 2), ("saved", 4)],
        [("saving", 4), ("saving", 6)],  # the last step
        [("evaluated", 3), ("reported", 5), ("saved", 6)],  # the last: all but `finished.json`
    ],
    ids=str,
)
def test_wherever_and_however_often_a_run_is_killed_it_ends_bit_equal(kills, straight, settings, state_of, tmp_path):
    for where, at in kills:
        killed(settings, tmp_path / "run", where, at)
    assert_ends_like(straight, settings, tmp_path / "run", state_of)


def test_a_finished_run_is_left_as_it_is(straight, settings, capsys):
    workdir, metrics = straight
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert run(resolve_run(settings), workdir) == metrics
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    assert "finished before" in capsys.readouterr().err


def test_the_training_log_holds_every_step_once_and_every_evaluation(straight, settings):
    trained = [line for line in read_metrics(straight[0]) if "loss" in line]
    evaluated = [line for line in read_metrics(straight[0]) if BEST in line]
    assert [line["step"] for line in trained] == [line["step"] for line in evaluated] == [1, 2, 3, 4, 5, 6]
    assert trained[0]["learning_rate"] == 0.0 and trained[2]["learning_rate"] == pytest.approx(0.01)
    assert all(line["nonfinite"] == 0 and line["grad_norm"] > 0 and line["num_tokens"] > 0 for line in trained)
    assert [line["epoch"] for line in trained] == sorted(line["epoch"] for line in trained)
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert straight[1] == {k: v for k, v in evaluated[-1].items() if k != "step"}


def test_evaluation_comes_every_n_steps_and_at_the_end(pairs, tmp_path):
    train = {"eval_every": 4, "log_every": 4, "checkpoint_every": 9}
    run(config(pairs, train=train), tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if BEST in line] == [4, 6]
    assert [line["step"] for line in lines if "loss" in line] == [1, 4, 6]  # the first, every fourth, the last
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"6"}


def test_the_best_step_is_one_that_was_evaluated_not_one_after_it(pairs, tmp_path, monkeypatch):
    values = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(loop, "evaluate", lambda made, state: {BEST: next(values)})
    train = {"eval_every": 2, "checkpoint_every": 1, "keep": 1, "best_metric": BEST, "best_mode": "max"}
    run(config(pairs, train=train), tmp_path / "run")
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"2", "6"}
    best, second = (jax.tree.leaves(load_run(f"{tmp_path / 'run'}@{which}").params) for which in ("best", "2"))
    assert all(map(np.array_equal, best, second))


def test_the_resolved_config_round_trips_through_its_file(straight, settings):
    stored = read_config(straight[0])
    assert stored.model.vocab_size > 0
    given = resolve_run(settings)
    assert stored.data == given.data and stored.optimizer == given.optimizer and stored.train == given.train
    assert resolve_run(json.loads((straight[0] / "config.json").read_text())) == stored


@pytest.mark.parametrize(
    ("section", "key", "value"), [("optimizer", "learning_rate", 0.02), ("data", "seed", 1), ("train", "max_steps", 7)]
)
def test_another_config_is_refused_with_the_key_that_changed(section, key, value, straight, settings):
    changed = settings | {section: settings[section] | {key: value}}
    with pytest.raises(ValueError, match=rf"began with another config \(config.{section}.{key} was .*, is {value}\)"):
        run(resolve_run(changed), straight[0])


def test_another_data_file_is_refused_on_resume(straight, settings, pairs, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    (tmp_path / "run" / FINISHED).unlink()
    assert run(resolve_run(settings), tmp_path / "run") == straight[1]  # nothing is left to do
    (tmp_path / "run" / FINISHED).unlink()
    before = pairs.read_text()
    try:
        pairs.write_text(before.replace(" good ", " bad ", 1))
        with pytest.raises(ValueError, match=r"the data is not what this run began with \(config.data.path = .*pairs"):
            run(resolve_run(settings), tmp_path / "run")
    finally:
        pairs.write_text(before)


def test_a_run_that_was_refused_may_be_started_again_with_what_mends_it(pairs, tmp_path):
    words = {"model_type": "word", "vocab_size": 50}
    with pytest.raises(ValueError, match="warm-up steps"):
        run(config(pairs, train={"max_steps": 2}, tokenizer=words), tmp_path / "run")
    mended = config(
        pairs, train={"max_steps": 1}, optimizer={"warmup_steps": 0}, tokenizer={"model_type": "bpe", "vocab_size": 300}
    )
    made, _ = build(mended, tmp_path / "run")
    assert made.data.tokenizer.vocab_size > 256  # not the words of the first attempt
    assert read_config(tmp_path / "run").optimizer.warmup_steps == 0


def test_rows_that_the_devices_cannot_share_are_refused(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("palign.train.build.make_mesh", make_mesh)
    with pytest.raises(ValueError, match=r"config.data.rows_per_step = 4 .* 8 devices .* use a multiple of 8"):
        build(config(pairs), tmp_path / "run")
    with pytest.raises(ValueError, match=r"config.data.row_length = 64 in blocks of .* = 32: 4 devices .* of 128"):
        build(config(pairs, mesh={"data": 2, "context": 4}), tmp_path / "run")


class Poisoned:
    """Steps as they are, but from one step on the loss is not a number."""

    def __init__(self, step, first):
        self._step, self._first = step, first

    def __call__(self, state, aux, batch):
        if int(state.step) + 1 >= self._first:
            bad = jax.tree.map(lambda x: x * jnp.nan, state.params)
            good = jax.tree.map(jnp.copy, state.params)
            after, metrics = self._step(state._replace(params=bad), aux, batch)
            return after._replace(params=good), metrics
        return self._step(state, aux, batch)


def poisoned(monkeypatch, first):
    def build_poisoned(*args):
        made, state = build(*args)
        return made._replace(train_step=Poisoned(made.train_step, first)), state

    monkeypatch.setattr(loop, "build", build_poisoned)


@pytest.mark.parametrize(("tolerated", "reported"), [(1, 4), (2, 5)])
def test_a_loss_that_is_not_finite_stops_the_run_and_never_reaches_a_checkpoint(
    tolerated, reported, pairs, tmp_path, monkeypatch
):
    poisoned(monkeypatch, 4)
    settings = config(pairs, train={"stop_after_nonfinite": tolerated, "checkpoint_every": 3, "eval_every": 0})
    with pytest.raises(TrainingDivergedError, match=rf"not finite at step {reported} \(examples \[") as caught:
        run(settings, tmp_path / "run")
    assert "parameters are those of step 3" in str(caught.value)
    assert not (tmp_path / "run" / FINISHED).is_file()
    lines = read_metrics(tmp_path / "run")  # JSON has no NaN
    assert [line["loss"] is None for line in lines if "loss" in line] == [False] * 3 + [True] * tolerated
    loaded = load_run(str(tmp_path / "run"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(loaded.params))
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"3"}


def test_the_examples_named_are_those_of_the_step(pairs, tmp_path, monkeypatch):
    poisoned(monkeypatch, 2)
    with pytest.raises(TrainingDivergedError) as caught:
        run(config(pairs), tmp_path / "run")
    made, _ = build(config(pairs), tmp_path / "other")
    batch = made.data.train.step_batch(1, micro_batches=1)
    expected = sorted({int(i) for i in batch.example_id.reshape(-1) if i >= 0})
    assert f"at step 2 (examples {expected[:20]})" in str(caught.value)


def test_a_policy_and_its_reference_start_from_a_stage_by_name_or_from_a_run_by_path(straight, pairs, tmp_path):
    (tmp_path / "01-sft").symlink_to(straight[0])
    parts = {}
    for place, init in (("02-named", "sft"), ("03-path", str(straight[0])), ("04-step", "sft@6")):
        made, state = build(
            config(pairs, init_from=init, reference_from=init, objective={"loss_type": ["dpo"]}), tmp_path / place
        )
        parts[place] = jax.device_get((state.params, made.aux["reference"]))
    stored = jax.device_get(load_run(str(straight[0])).params)
    for both in parts.values():
        for params in both:
            assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(stored)))


def test_the_model_that_a_run_starts_from_is_copied_and_the_reference_never_moves(straight, pairs, tmp_path):
    source = str(straight[0])
    dpo = config(pairs, init_from=source, reference_from=source, objective={"loss_type": ["dpo"], "beta": 0.2})
    made, _ = build(dpo, tmp_path / "run")
    before = jax.device_get(made.aux["reference"])
    run(dpo, tmp_path / "run")
    after = jax.device_get(load_source(Source(straight[0], "last"), made.lm, made.mesh))
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    moved = jax.device_get(load_run(str(tmp_path / "run")).params)
    assert not any(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(moved)))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert losses[:2] == pytest.approx([np.log(2)] * 2, abs=2e-7)  # the first rate is 0
    assert losses[2] < losses[0]


def test_an_unknown_source_is_refused_with_the_stages_that_there_are(straight, tmp_path):
    (tmp_path / "01-sft").symlink_to(straight[0])
    with pytest.raises(ValueError, match=r"config.init_from = 'stf': neither a stage .*stages here: sft"):
        find_source("stf", "init_from", tmp_path / "02-dpo")
    with pytest.raises(ValueError, match=r"config.teacher_from = 'stf': .*no stages here"):
        find_source("stf", "teacher_from", tmp_path / "elsewhere")
    assert find_source("sft@best", "init_from", tmp_path / "02-dpo") == Source(tmp_path / "01-sft", "best")


def test_a_source_with_another_tokenizer_is_refused(straight, pairs, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text().replace("soup", "stew"))  # as many words
    run(config(other), tmp_path / "other")
    dpo = {"loss_type": ["dpo"]}
    with pytest.raises(ValueError, match=r"config.reference_from: .* another tokenizer"):
        build(
            config(pairs, init_from=str(straight[0]), reference_from=str(tmp_path / "other"), objective=dpo),
            tmp_path / "run",
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(objective={"loss_type": ["dpo"]}), r"config.reference_from: must be set, dpo reads it"),
        (dict(objective={"loss_type": ["dpo"], "reference": "none"}), r"objective.reference = 'none': dpo reads"),
        (dict(objective={"loss_type": ["sft"], "reference": "cached"}), r"config.objective.reference = 'cached': sft"),
        (dict(objective={"loss_type": ["simpo"], "reference": "cached"}), r"config.objective.reference = 'cached'"),
        (
            dict(
                objective={"loss_type": ["aligndistil_theorem1"], "beta": 0.1, "reference": "cached"},
                teacher_from="x", reference_from="x",
            ),
            r"config.objective.reference = 'cached': .* use 'live'",
        ),
        (dict(reference_from="x"), r"config.reference_from has no effect on sft"),
        (dict(teacher_from="x"), r"config.teacher_from has no effect on sft"),
        (dict(reverse_from="x"), r"config.reverse_from has no effect on sft"),
        (dict(objective={"loss_type": ["sft"], "beta": 0.1}), r"config.objective.beta has no effect on sft"),
        (
            dict(objective={"loss_type": ["dpo"], "bta": 0.1}, reference_from="x"),
            r"config.objective.bta has no effect on dpo \(did you mean 'beta'\?\)",
        ),
        (
            dict(objective={"loss_type": ["dppo"]}, reference_from="x"),
            r"config.objective.loss_type: 'dppo' is not a method \(did you mean 'dpo'\?\)",
        ),
        (
            dict(objective={"loss_type": ["dpo", "sft"], "loss_weights": [1.0]}, reference_from="x"),
            r"loss_type has 2 methods .* loss_weights 1",
        ),
        (dict(objective={"loss_type": ["aligndistil"]}, teacher_from="x"), r"config.reverse_from: must be set"),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_without_effect_or_a_missing_one_is_refused_before_anything_is_read(settings, message):
    with pytest.raises(ValueError, match=message):
        check_config(config(pathlib.Path("nowhere.jsonl"), **settings))


def test_configs_whose_every_setting_has_an_effect_are_taken():
    for settings in (
        dict(),
        dict(objective={"loss_type": ["dpo"], "beta": 0.2, "reference": "cached"}, reference_from="x"),
        dict(objective={"loss_type": ["dpo", "sft"], "loss_weights": [1.0, 0.1]}, reference_from="x"),
        dict(objective={"loss_type": ["simpo"], "reference": "none"}),
        dict(objective={"loss_type": ["aligndistil"]}, teacher_from="x", reverse_from="y"),
        dict(objective={"loss_type": ["aligndistil_theorem1"], "beta": 1.0}, teacher_from="x", reference_from="y"),
    ):
        check_config(config(pathlib.Path("nowhere.jsonl"), **settings))


def test_load_run_gives_the_model_that_was_trained(straight):
    loaded = load_run(f"{straight[0]}@last")
    shapes = jax.eval_shape(make_language_model(loaded.config.model).init, jax.random.key(0))
    assert jax.tree.structure(loaded.params) == jax.tree.structure(shapes)
    assert loaded.tokenizer.vocab_size == loaded.config.model.vocab_size
    with pytest.raises(ValueError, match="not the workdir of a run"):
        load_run(str(straight[0].parent))
