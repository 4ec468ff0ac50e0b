"""Which form of attention is taken: a pure function of times and agreement, and the trials that give them."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import pytest

from palign.attention import xla
from palign.attention.attend import KERNELS
from palign.attention.walk import Kernel
from palign.config.schema import AttentionConfig, DataConfig, RunConfig
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from palign.train import kernel as choice
from palign.train.kernel import Trial, choose_kernel, describe, fastest, try_kernels
from tests.trees import TINY, make_batch, random_trees

CONFIG = RunConfig(model=TINY, data=DataConfig(rows_per_step=2))


def with_kernel(name):
    return dataclasses.replace(CONFIG, attention=AttentionConfig(kernel=name))


class Rows:
    """A data set of one step."""

    plan = SimpleNamespace(rows_per_step=2)

    def step_batch(self, step, *, micro_batches, rows):
        assert rows == slice(0, 2)
        batch = make_batch(random_trees(step, 3), rows=2, used=2, tokens=64)
        return jax.tree.map(lambda leaf: leaf[None], jax.device_get(batch))


class Nothing:
    def step_batch(self, step, **_):
        raise AssertionError("nothing is to be measured")


def one_device():
    return make_mesh(data=1, devices=jax.devices()[:1])


def mesh_of(platform):
    """What `choose_kernel` reads of a mesh before it measures."""
    return SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(platform=platform, device_kind="new")]))


def test_the_fastest_that_agrees_is_taken():
    assert fastest({"xla": Trial(2.0, 0.0), "pallas_tpu": Trial(1.0, 0.001)}) == "pallas_tpu"
    assert fastest({"xla": Trial(1.0, 0.0), "pallas_tpu": Trial(2.0, 0.001)}) == "xla"


@pytest.mark.parametrize("difference", [0.5, math.inf, math.nan])
def test_a_wrong_one_is_not_taken_however_fast(difference):
    trials = {"xla": Trial(2.0, 0.0), "pallas_tpu": Trial(1.0, difference)}
    assert fastest(trials) == "xla"
    assert "wrong" in describe("pallas_tpu", trials["pallas_tpu"])


def test_one_that_did_not_run_is_not_taken():
    trials = {"xla": Trial(2.0, 0.0), "pallas_gpu": "Shared memory size limit exceeded"}
    assert fastest(trials) == "xla"
    assert describe("pallas_gpu", trials["pallas_gpu"]) == "pallas_gpu: Shared memory size limit exceeded"


def test_trials_measure_time_and_agreement():
    def fails(*arguments):
        raise ValueError("too large\nfor this chip")

    right, plain = xla.kernel(chunk=3), xla.kernel()
    wrong = Kernel(lambda *x: plain.forward(*x), lambda *x: tuple(1.1 * g for g in plain.backward(*x)))
    kernels = {"xla": plain, "right": right, "wrong": wrong, "failing": Kernel(fails, fails)}
    mesh = one_device()
    with jax.set_mesh(mesh):
        trials = try_kernels(kernels, TINY, mesh, choice._inputs(CONFIG, mesh, Rows()))
    assert trials.pop("failing") == "too large"
    assert trials["xla"].difference == 0 and trials["right"].difference < 1e-5
    assert trials["wrong"].difference == pytest.approx(0.1, rel=1e-3)
    assert all(trial.seconds > 0 for trial in trials.values())


def test_on_a_cpu_nothing_is_measured(tmp_path):
    for name in ("auto", "xla"):
        assert choose_kernel(with_kernel(name), tmp_path, one_device(), Nothing()) == "xla"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "platform"), [("pallas_tpu", "cpu"), ("pallas_gpu", "tpu")])
def test_a_kernel_of_another_platform_is_refused(tmp_path, name, platform):
    with pytest.raises(ValueError, match=f"config.attention.kernel = '{name}' does not run on {platform}; expected"):
        choose_kernel(with_kernel(name), tmp_path, mesh_of(platform), Nothing())


def test_an_accelerator_takes_the_fastest_says_so_and_remembers(tmp_path, monkeypatch, capsys):
    trials = {"xla": Trial(0.002, 0.0), "pallas_gpu": Trial(0.001, 0.001)}
    monkeypatch.setattr(choice, "CANDIDATES", {"cpu": ("xla", "pallas_gpu")})
    monkeypatch.setattr(choice, "try_kernels", lambda *arguments: trials)
    mesh = one_device()
    assert choose_kernel(with_kernel("auto"), tmp_path, mesh, Rows()) == "pallas_gpu"
    line = "attention: pallas_gpu (xla: 2.00 ms a layer; pallas_gpu: 1.00 ms a layer)\n"
    assert capsys.readouterr().err == line
    trials["xla"] = Trial(0.0001, 0.0)
    assert choose_kernel(with_kernel("auto"), tmp_path, mesh, Rows()) == "pallas_gpu"  # goes on as it began
    (tmp_path / choice.CHOICE).write_text(json.dumps({"kernel": "pallas_gpu", "device": "another"}))
    assert choose_kernel(with_kernel("auto"), tmp_path, mesh, Rows()) == "xla"


def test_a_named_kernel_is_checked_against_the_runs_sizes_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "CANDIDATES", {"cpu": ("xla", "pallas_tpu")})
    with pytest.raises(ValueError, match=r"config\.data\.block = 16: attention's TPU kernel takes multiples of 128"):
        choose_kernel(with_kernel("pallas_tpu"), tmp_path, one_device(), Rows())


@pytest.mark.parametrize("name", KERNELS)
def test_the_model_attends_in_the_form_that_was_chosen(name):
    batch = make_batch(random_trees(0, 3), rows=2, used=2, tokens=256, block=128)
    lm = make_language_model(TINY, name)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    program = str(jax.make_jaxpr(lm.hidden)(params, batch))
    assert ("pallas_call" in program) == (name != "xla")
