"""Real processes on real files: the same run as in one process, and what happens when one of them is stopped."""

import json
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest

from palign.config.load import resolve_run
from palign.sharding.mesh import make_mesh
from palign.train import loop
from palign.train.metrics import read_metrics
from palign.train.sources import load_run
from tests.compiled import uncached
from tests.recipes.tiny_runs import one_device, plain, write_pairs
from tests.train.process_child import record

ROOT = pathlib.Path(__file__).parents[2]
STEPS = {"max_steps": 5, "eval_every": 3, "checkpoint_every": 5}


def together(place, settings, *, processes, devices, stop_at=0):
    """Trains in several processes; gives the exit code, what they printed, and the ids that each was given."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({settings!r})\n"
    )
    command = [sys.executable, "-m", "palign.cli.launch", f"--processes={processes}", f"--devices={devices}", "--"]
    command += [sys.executable, "-m", "tests.train.process_child"]
    command += [f"--config={place / 'config.py'}", f"--workdir={place / 'run'}"]
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "RECORD": str(place), "STOP_AT": str(stop_at)}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, timeout=500)
    files = [place / f"ids-{i}.json" for i in range(processes)]
    return done, [json.loads(file.read_text()) if file.is_file() else [] for file in files]


def alone(place, settings, *, devices):
    """The same run in this process; gives the ids of all rows."""
    seen: list = []

    def first(**shape):
        return make_mesh(**shape, devices=jax.devices()[:devices])

    with (
        mock.patch("palign.train.build.make_mesh", first),
        mock.patch.object(loop, "to_global", record(seen)),
        uncached(),
    ):
        loop.run(resolve_run(settings), place / "run")
    return seen


def assert_same_run(one, other, ids, parts):
    """Losses, metrics and parameters of two workdirs are equal, and the parts' rows are the rows."""
    assert len(ids) == len(parts[0]) > 0
    for step, whole in enumerate(ids):  # rows lie along the second axis
        np.testing.assert_array_equal(np.concatenate([np.asarray(part[step]) for part in parts], axis=1), whole)
    for expected, line in zip(read_metrics(one / "run"), read_metrics(other / "run"), strict=True):
        assert expected.pop("tokens_per_second", None) is None or line.pop("tokens_per_second") > 0
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    expected, params = (load_run(str(place / "run"), mesh=mesh).params for place in (one, other))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), params, expected)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("processes") / "pairs.jsonl", 60, prompts=40)


def test_two_processes_of_two_devices_train_as_one_of_four(pairs, tmp_path):
    settings = plain(pairs, train=STEPS, mesh={"data": 2, "fsdp": 2})
    done, parts = together(tmp_path / "two", settings, processes=2, devices=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two", alone(tmp_path / "one", settings, devices=4), parts)
    assert [np.shape(part[0])[1] for part in parts] == [2, 2]  # each built its own rows alone
    # Gloo talks in between, and its lines may come in two pieces, of which the second is a number.
    lines = [line for line in done.stderr.splitlines() if "peer ranks" not in line and re.search(r"\] .*[a-z]", line)]
    assert "[0] process 0 of 2: 2 of 4 cpu devices, by flags" in lines
    assert [line for line in lines if line.startswith("[1]")] == ["[1] process 1 of 2: 2 of 4 cpu devices, by flags"]
    assert not (tmp_path / "two" / "run" / "run.lock").exists()


@pytest.fixture(scope="module")
def sources(pairs, tmp_path_factory):
    """The workdirs of an SFT run and two that go on from it."""
    root = tmp_path_factory.mktemp("sources")
    with one_device():
        loop.run(resolve_run(plain(pairs, train=STEPS)), root / "sft")
        for name, rate in (("dpo", 0.02), ("reverse", 0.03)):
            more = dict(init_from=str(root / "sft"), optimizer={"learning_rate": rate})
            loop.run(resolve_run(plain(pairs, train=STEPS, **more)), root / name)
    return root


def runs(sources):
    """Runs whose parts are spread over processes: caches, frozen models, the policy's own responses, micro-batches."""
    sft, dpo, reverse = (str(sources / name) for name in ("sft", "dpo", "reverse"))
    distil = {"objective": {"loss_type": ["aligndistil"], "scale": 1.0}}
    teachers = {"init_from": sft, "teacher_from": dpo, "reverse_from": reverse, **distil}
    live = {"init_from": sft, "reference_from": sft, "objective": {"loss_type": ["dpo"], "beta": 0.2}}
    return {
        "cached reference": {
            "init_from": sft,
            "reference_from": sft,
            "objective": {"loss_type": ["dpo"], "beta": 0.2, "reference": "cached"},
        },
        "cached teachers": teachers | {"objective": distil["objective"] | {"teachers": "cached"}},
        "on-policy": teachers | {"rollout": {"every": 1, "max_new_tokens": 8}},
        "micro-batches": {"data": {"rows_per_step": 8, "micro_batches": 2}},
        "kept examples": {"data": {"cache": str(sources / "kept")}},
        "tensor": {**live, "mesh": {"data": 1, "fsdp": 2, "tensor": 2}},
        "context": {**live, "mesh": {"data": 2, "context": 2}},
    }


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "name", ["cached reference", "cached teachers", "on-policy", "micro-batches", "kept examples", "tensor", "context"]
)
def test_every_kind_of_run_is_the_same_in_several_processes(name, processes, pairs, sources, tmp_path):
    more = dict(runs(sources)[name])
    data = {"eval_fraction": 0.2, "path": str(pairs)} | more.pop("data", {})
    mesh = more.pop("mesh", {"data": 2, "fsdp": 2})
    settings = plain(pairs, train=STEPS, data=data, mesh=mesh, **more)
    done, parts = together(tmp_path / "some", settings, processes=processes, devices=4 // processes)
    assert done.returncode == 0, done.stderr
    alike = processes // (mesh["data"] * mesh.get("fsdp", 1)) or 1  # neighbours that hold parts of the same rows
    ids = alone(tmp_path / "one", settings, devices=4)
    assert_same_run(tmp_path / "one", tmp_path / "some", ids, parts[::alike])
    assert all(parts[i] == parts[i - i % alike] for i in range(processes))


@pytest.mark.slow
def test_sigterm_to_one_process_saves_in_all_at_the_same_step_and_the_run_goes_on(pairs, tmp_path):
    settings = plain(pairs, train=STEPS | {"max_steps": 8, "checkpoint_every": 100}, mesh={"data": 1, "fsdp": 2})
    straight, _ = together(tmp_path / "straight", settings, processes=2, devices=1)
    done, _ = together(tmp_path / "stopped", settings, processes=2, devices=1, stop_at=3)
    assert (straight.returncode, done.returncode) == (0, 75), done.stderr
    said = re.findall(r"\[(\d)\] palign: error: .*told to stop, saved step (\d+) of 8; the same command", done.stderr)
    assert sorted(i for i, _ in said) == ["0", "1"] and len({step for _, step in said}) == 1
    again, _ = together(tmp_path / "stopped", settings, processes=2, devices=1)
    assert again.returncode == 0 and f"resumes after step {said[0][1]} of 8" in again.stderr, again.stderr
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    one, two = (load_run(str(tmp_path / name / "run"), mesh=mesh).params for name in ("straight", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_a_second_run_in_the_workdir_ends_all_processes_with_code_2(pairs, tmp_path):
    (tmp_path / "twice" / "run").mkdir(parents=True)
    owner = {"host": os.uname().nodename, "pid": os.getpid(), "beat": 0}
    (tmp_path / "twice" / "run" / "run.lock").write_text(json.dumps(owner))
    done, _ = together(tmp_path / "twice", plain(pairs, train=STEPS), processes=2, devices=1)
    assert done.returncode == 2 and f"process {os.getpid()} on" in done.stderr


def test_sigterm_to_a_run_of_one_process_saves_the_step_and_ends_it(pairs, tmp_path, monkeypatch):
    settings = plain(pairs, train=STEPS | {"max_steps": 6, "checkpoint_every": 2, "eval_every": 3})
    advance = loop.Reporter.advance

    def stop(self, done, *args, **kwargs):
        if done == 2 and self._title == "run":  # of the run, reported while step 3 is taken
            os.kill(os.getpid(), 15)
        advance(self, done, *args, **kwargs)

    with one_device():
        with monkeypatch.context() as patch, pytest.raises(loop.PreemptedError, match="saved step 3 of 6; the same"):
            patch.setattr(loop.Reporter, "advance", stop)
            loop.run(resolve_run(settings), tmp_path / "stopped" / "run")
        loop.run(resolve_run(settings), tmp_path / "stopped" / "run")
        loop.run(resolve_run(settings), tmp_path / "straight" / "run")
    one, two = (load_run(str(tmp_path / name / "run")).params for name in ("straight", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
