"""Runs that train LoRA factors: from the base exactly, resumed, evaluated, sampled from and trained on as any other."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from palign.config.load import to_plain
from palign.train import build as build_module
from palign.train import loop
from palign.train.build import build, check_config
from palign.train.checkpoint import load_facts
from palign.train.digest import digest
from palign.train.evaluate import evaluate_run
from palign.train.loop import FINISHED, run
from palign.train.metrics import read_metrics
from palign.train.sources import load_run, read_config
from tests.recipes.tiny_runs import config

LORA = {"rank": 4, "alpha": 8.0}
DPO = {"loss_type": ["dpo"], "beta": 0.2}
TRAIN = {"best_metric": "", "eval_every": 0, "checkpoint_every": 3}
pytestmark = pytest.mark.usefixtures("single")


@pytest.fixture(scope="module")
def dpo(pairs, sft):
    return config(pairs, objective=DPO, lora=LORA, init_from=str(sft), train=TRAIN)


@pytest.fixture(scope="module")
def trained(dpo, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    return workdir, run(dpo, workdir)


def same(tree, other):
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


def test_the_first_loss_is_log_2_and_the_base_is_the_reference_in_one_copy(dpo, sft, trained, tmp_path):
    made, state = build(dpo, tmp_path / "run")
    assert made.aux.keys() == {"base"} and same(made.aux["base"], load_run(str(sft)).params)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)} == {"lora_a", "lora_b"}
    losses = [line["loss"] for line in read_metrics(trained[0]) if "loss" in line]
    assert losses[:2] == pytest.approx([math.log(2)] * 2, abs=1e-7)  # the first rate is 0
    assert losses[-1] < losses[0] - 1e-4


def test_the_base_is_what_a_cached_reference_is_computed_with(pairs, sft, trained, tmp_path, monkeypatch):
    loaded, load = [], build_module.load_source
    monkeypatch.setattr(
        build_module, "load_source", lambda source, **kwargs: loaded.append(source) or load(source, **kwargs)
    )
    cached = config(pairs, objective=DPO | {"reference": "cached"}, lora=LORA, init_from=str(sft), train=TRAIN)
    made, _ = build(cached, tmp_path / "run")
    assert len(loaded) == 1 and made.aux.keys() == {"base"} and made.data.train.reference_logps is not None


def test_a_checkpoint_holds_the_factors_alone_and_names_its_base(trained, sft):
    workdir, _ = trained
    assert load_facts(workdir, "last")["base"] == digest(load_run(str(sft)).params)
    with ocp.training.Checkpointer(workdir / "checkpoints") as orbax:
        stored = jax.tree_util.tree_leaves_with_path(orbax.checkpointables_metadata(6).metadata)
    arrays = [(str(path), leaf) for path, leaf in stored if math.prod(leaf.shape) > 1]
    assert len(arrays) > 20 and all("lora_" in path for path, _ in arrays)  # of the parameters and both moments
    assert json.loads((workdir / "config.json").read_text())["init_from"] == str(sft)


def test_a_run_that_stops_and_goes_on_ends_with_the_same_bits(dpo, trained, tmp_path, monkeypatch):
    report = loop._report

    def stopping(made, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        report(made, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_report", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(dpo, tmp_path / "run")
    assert [d.name for d in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    assert run(dpo, tmp_path / "run") == trained[1]
    assert same(load_run(str(tmp_path / "run")).params, load_run(str(trained[0])).params)


def test_a_trained_model_is_loaded_whole_and_evaluates_and_trains_on_as_any_other(pairs, sft, dpo, trained, tmp_path):
    workdir, metrics = trained
    loaded = load_run(str(workdir))
    assert jax.tree.structure(loaded.params) == jax.tree.structure(load_run(str(sft)).params)
    moved = loaded.params["layers"]["mlp"]["up"]["kernel"] - load_run(str(sft)).params["layers"]["mlp"]["up"]["kernel"]
    ranks = np.linalg.matrix_rank(np.asarray(moved), tol=1e-5 * np.abs(moved).max())
    assert set(ranks.tolist()) == {LORA["rank"]}
    again = evaluate_run(str(workdir))
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    # A next stage sees the merged model: as its start, as its reference, and as the base of other factors.
    stage = config(pairs, objective=DPO, init_from=str(workdir), reference_from=str(workdir))
    made, state = build(stage, tmp_path / "whole")
    assert same(state.params, loaded.params) and same(made.aux["reference"], loaded.params)
    stage = config(pairs, objective=DPO, init_from=str(workdir), lora=LORA, frozen={"dtype": "bfloat16"})
    made, state = build(stage, tmp_path / "more")
    assert same(made.aux["base"], jax.tree.map(lambda x: x.astype("bfloat16"), loaded.params))  # rounded as it is read
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}


def test_factors_are_not_read_with_another_base(dpo, sft, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    (workdir / FINISHED).unlink()
    other = dataclasses.replace(read_config(workdir), init_from=f"{sft}@4")  # the same run, two steps earlier
    (workdir / "config.json").write_text(json.dumps(to_plain(other)))
    for use in (load_run, evaluate_run, lambda _: run(other, workdir)):
        with pytest.raises(ValueError, match=r"run: its LoRA factors grew on other weights than its config.init_from"):
            use(str(workdir))


@pytest.mark.slow
def test_a_reward_model_trains_its_head_and_factors_on_a_language_model(pairs, sft, tmp_path):
    judged = config(
        pairs, objective={"loss_type": ["bradley_terry"], "reference": "none"}, model={"value_head": 1},
        lora={"rank": 2}, init_from=str(sft), train=TRAIN | {"max_steps": 4},
    )  # fmt: skip
    metrics = run(judged, tmp_path / "reward")
    loaded, again = load_run(str(tmp_path / "reward")), evaluate_run(str(tmp_path / "reward"))
    assert loaded.params["value_head"]["kernel"].shape == (16, 1)
    assert again["eval_heldout_loss"] == pytest.approx(metrics["eval_heldout_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (dict(lora={"rank": 4}), r"config.lora.rank = 4: there is no base; name one in config.init_from"),
        (dict(lora={"alpha": 4.0}), r"config.lora.alpha = 4.0 has no effect while config.lora.rank = 0"),
        (dict(lora={"rank": 4, "targets": ["embedding"]}), r"config.lora.targets = .*: expected some of query, key"),
        (dict(frozen={"dtype": "bfloat16"}), r"config.frozen.dtype has no effect: sft reads no frozen model"),
        (dict(frozen={"placement": "host"}), r"config.frozen.placement has no effect: sft reads no frozen model"),
        (dict(frozen={"dtype": "float16"}), r"config.frozen.dtype = 'float16': expected one of"),
        (dict(model={"param_dtype": "bfloat16"}), r"config.model.param_dtype = 'bfloat16': steps smaller than"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(sections, message, pairs):
    with pytest.raises(ValueError, match=message):
        check_config(config(pairs, **sections))
