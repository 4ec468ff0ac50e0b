"""A recipe's stages: where they run, in which order, which are skipped, and what is checked before the first."""

import json

import pytest

from palign.config.load import resolve_recipe
from palign.recipes import stages
from palign.recipes.stages import run_recipe, stage_workdirs
from palign.train.metrics import read_metrics
from tests.recipes.tiny_runs import one_device, plain, write_pairs

DPO = {"objective": {"loss_type": ["dpo"]}, "init_from": "sft", "reference_from": "sft"}


def recipe(path="x.jsonl", **given):
    settings = {key: value for key, value in plain(path).items() if key != "objective"}
    return resolve_recipe(settings | {"stages": {"sft": {"objective": {"loss_type": ["sft"]}}} | given})


@pytest.fixture
def ran(monkeypatch):
    """The stages that were run, which are only noted."""
    seen = []

    def note(config, workdir):
        seen.append((config.objective.loss_type[0], workdir.name))
        return {"eval_heldout_loss": float(len(seen))}

    monkeypatch.setattr(stages, "run", note)
    return seen


def test_stages_run_in_the_order_of_the_recipe_in_numbered_workdirs(ran, tmp_path):
    three = recipe(dpo=DPO, again=DPO | {"init_from": "dpo"})
    assert run_recipe(three, tmp_path) == {
        "sft": {"eval_heldout_loss": 1.0}, "dpo": {"eval_heldout_loss": 2.0}, "again": {"eval_heldout_loss": 3.0}
    }  # fmt: skip
    assert ran == [("sft", "01-sft"), ("dpo", "02-dpo"), ("dpo", "03-again")]


def test_a_recipe_of_one_stage_runs_in_the_workdir_itself(ran, tmp_path):
    run_recipe(recipe(), tmp_path / "run")
    assert ran == [("sft", "run")]
    assert stage_workdirs(recipe(), tmp_path) == {"sft": tmp_path}


def test_one_stage_alone_runs_in_the_workdir_that_it_has_among_the_others(ran, tmp_path):
    assert list(run_recipe(recipe(dpo=DPO, again=DPO), tmp_path, only="again")) == ["again"]
    assert ran == [("dpo", "03-again")]


def test_an_unknown_stage_is_refused_with_those_that_there_are(ran, tmp_path):
    with pytest.raises(ValueError, match=r"--stage=dop: no such stage; there are sft, dpo"):
        run_recipe(recipe(dpo=DPO), tmp_path, only="dop")
    assert not ran


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_from": ""}, r"stage dpo: config.reference_from: must be set"),
        ({"objective": {"loss_type": ["dpo"], "loss_weights": [1.0, 2.0]}}, r"stage dpo: .* loss_weights 2"),
        (
            {"objective": {"loss_type": ["simpo"], "reference": "cached"}, "reference_from": ""},
            r"stage dpo: .*'cached'",
        ),
        ({"teacher_from": "sft"}, r"stage dpo: config.teacher_from has no effect"),
    ],
)
def test_a_slip_in_the_last_stage_is_found_before_the_first_is_run(change, message, ran, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe(dpo=DPO | change), tmp_path)
    assert not ran


def test_a_finished_stage_is_skipped_and_an_unfinished_one_is_taken_up_again(tmp_path, capsys):
    path = write_pairs(tmp_path / "pairs.jsonl", 60, prompts=40)
    cached = DPO | {"objective": {"loss_type": ["dpo"], "beta": 0.2, "reference": "cached"}}
    two = recipe(str(path), dpo=cached)
    with one_device():
        with pytest.raises(ValueError, match=r"config.init_from = 'sft': neither a stage .*no stages here"):
            run_recipe(two, tmp_path / "run", only="dpo")
        assert list(run_recipe(two, tmp_path / "run", only="sft")) == ["sft"]
        assert not (tmp_path / "run" / "02-dpo").exists()
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "01-sft").rglob("*")}
        capsys.readouterr()
        metrics = run_recipe(two, tmp_path / "run")
    assert "01-sft: finished before, left as it is" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "01-sft").rglob("*")} == before
    assert read_metrics(tmp_path / "run" / "02-dpo")[-1]["step"] == 6
    assert metrics["sft"] == json.loads((tmp_path / "run" / "01-sft" / "finished.json").read_text())["metrics"]
    assert "eval_heldout_rewards/margins" in metrics["dpo"]
