"""Models that follow the policy: an average for evaluation, a reference that moves; the recurrence in NumPy."""

import shutil

import jax
import numpy as np
import pytest

from palign.train.build import build, check_config
from palign.train.checkpoint import load_models
from palign.train.evaluate import evaluate_run
from palign.train.followers import Follower, follow
from palign.train.loop import FINISHED, run
from palign.train.metrics import read_metrics
from palign.train.sources import load_run, read_config
from tests.recipes.tiny_runs import config

DECAY, EVERY, MIXUP = 0.75, 2, 1.0
DPO = {"loss_type": ["dpo"], "beta": 0.2, "reference_sync_every": EVERY, "reference_mixup": MIXUP}
TRAIN = {"ema_decay": DECAY, "checkpoint_every": 1, "keep": 9, "eval_every": 3, "max_steps": 5}
pytestmark = pytest.mark.usefixtures("single")


@pytest.fixture(scope="module")
def settings(pairs, sft):
    warmed = {"learning_rate": 0.01, "warmup_steps": 0}  # the first step moves too
    return config(pairs, objective=DPO, init_from=str(sft), reference_from=str(sft), train=TRAIN, optimizer=warmed)


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, run(settings, workdir)


@pytest.fixture(scope="module")
def restored(trained, settings):
    """Step -> the state in that checkpoint."""
    made, state = build(settings, trained[0])
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, made.shardings)
    read = {step: load_models(trained[0], str(step), shapes) for step in range(1, 6)}
    return {0: jax.device_get(state)} | {
        step: jax.device_get(s._replace(step=0, opt_state=0, nonfinite=0)) for step, s in read.items()
    }


def leaf(tree):
    return np.asarray(tree["layers"]["mlp"]["up"]["kernel"], np.float64)


def test_both_models_follow_the_recurrence_step_by_step(restored):
    ema = reference = leaf(restored[0].params)
    assert sorted(restored) == list(range(6))
    for step in range(1, 6):
        policy = leaf(restored[step].params)
        assert np.abs(policy - leaf(restored[step - 1].params)).max() > 1e-4
        ema = DECAY * ema + (1 - DECAY) * policy
        if step % EVERY == 0:
            reference = MIXUP * policy + (1 - MIXUP) * reference
        np.testing.assert_allclose(leaf(restored[step].models["ema"]), ema, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(leaf(restored[step].models["reference"]), reference, rtol=1e-5, atol=1e-7)
        if step % EVERY:
            np.testing.assert_array_equal(*(leaf(restored[s].models["reference"]) for s in (step, step - 1)))


@pytest.mark.parametrize("mixup", [1.0, 0.6])
def test_a_model_moves_when_it_is_due_and_by_its_share(mixup):
    """All of the policy is taken to the last bit, whatever the sizes."""
    policy, model = {"w": np.float32([0.1, 1e8, -3.3])}, {"w": np.float32([1e8, 0.3, 7.7])}
    moved = {"w": mixup * policy["w"].astype(np.float64) + (1 - mixup) * model["w"].astype(np.float64)}
    for step, expected in ((4, model), (6, moved)):
        got = follow({"reference": Follower(3, mixup)}, {"reference": model}, policy, np.int32(step))["reference"]["w"]
        np.testing.assert_allclose(got, expected["w"], rtol=0 if mixup == 1 or step == 4 else 1e-6)


def test_right_after_the_reference_was_copied_the_loss_is_log_2_and_the_gradient_goes_on(trained):
    losses = {line["step"]: line["loss"] for line in read_metrics(trained[0]) if "loss" in line}
    assert [losses[step] for step in (1, 3, 5)] == pytest.approx([np.log(2)] * 3, abs=2e-7)
    assert abs(losses[2] - np.log(2)) > 1e-3 and abs(losses[4] - np.log(2)) > 1e-3


def test_the_average_is_evaluated_beside_the_policy_and_loaded_by_name(trained, restored):
    workdir, metrics = trained
    policy, ema = (load_run(f"{workdir}@{which}").params for which in ("last", "ema"))
    np.testing.assert_array_equal(leaf(ema), leaf(restored[5].models["ema"]))
    np.testing.assert_array_equal(leaf(load_run(f"{workdir}@3-ema").params), leaf(restored[3].models["ema"]))
    assert np.abs(leaf(policy) - leaf(ema)).max() > 1e-4
    assert metrics["eval_ema_heldout_loss"] != metrics["eval_heldout_loss"]
    for name, value in evaluate_run(str(workdir)).items():
        assert value == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name
    with pytest.raises(ValueError, match=r"the run kept no average; it had no config.train.ema_decay"):
        load_run(f"{read_config(workdir).init_from}@ema")


def test_a_run_that_goes_on_ends_with_the_same_bits(trained, settings, restored, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    (workdir / FINISHED).unlink()
    for step in (4, 5):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert run(settings, workdir) == trained[1]
    for which in ("last", "ema"):
        one, other = (jax.tree.leaves(load_run(f"{place}@{which}").params) for place in (workdir, trained[0]))
        assert all(map(np.array_equal, one, other))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            dict(objective=DPO | {"loss_type": ["cpo"], "reference": "none"}, reference_from=""),
            r"= 2 has no effect: cpo reads no ref",
        ),
        (
            dict(objective=DPO | {"reference": "cached"}),
            r"reference_sync_every = 2: a model that moves cannot be cached",
        ),
        (dict(objective=DPO, lora={"rank": 2}, init_from="sft"), r"sync_every = 2: only a whole language model can be"),
        (dict(objective={"reference_mixup": 0.5}), r"config.objective.reference_mixup = 0.5 has no effect while"),
        (dict(objective=DPO | {"reference_mixup": 1.5}), r"config.objective.reference_mixup = 1.5: expected at most 1"),
        (dict(objective=DPO, frozen={"dtype": "bfloat16"}), r"config.frozen.dtype has no effect: dpo reads no frozen"),
        (dict(train={"ema_decay": 1.0}), r"config.train.ema_decay = 1.0: expected below 1"),
    ],
)
def test_what_cannot_follow_is_refused_by_name(sections, message, pairs):
    with pytest.raises(ValueError, match=message):
        check_config(config(pairs, **{"reference_from": "sft"} | sections))
