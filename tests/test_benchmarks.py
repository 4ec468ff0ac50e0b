"""Every benchmark runs, at sizes at which its figures mean nothing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHARED = {"driver.py", "worker.py", "cases.py", "single.py"}
# Question -> goals that need no peers, of which there must be ratios.
QUESTIONS = {
    "equal_shapes": {"prompt shared", "plain JAX", "peak memory"},
    "realistic": {"plain JAX", "memory"},
    "lists": {"C5, token ratio", "sharing alone"},
    "distill_head": {"C8", "closed forms alone"},
    "sampling": set(),
    "loss_head": {"full logits"},
    "large_step": {"H4"},
}
# Question that is no race -> what its tables show.
SINGLE = {"growth": "| width of the model | 64, 128 |", "memory": "| `lora.rank=16` |"}
ALONE = {"compile_time", "profile_step"}  # questions with a test of their own below


def run(*command):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_benchmark_is_run_here():
    here = {f"{name}.py" for name in (*QUESTIONS, *SINGLE, *ALONE)}
    assert here == {file.name for file in (ROOT / "benchmarks").glob("*.py")} - SHARED


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_a_question_that_is_no_race_prints_tables_and_writes_its_result(name, tmp_path):
    assert SINGLE[name] in run("-m", f"benchmarks.{name}", "--tiny", "--rounds=1", f"--out={tmp_path}")
    assert json.loads((tmp_path / f"{name}.json").read_text())["name"] == name


@pytest.mark.slow
@pytest.mark.parametrize("name", QUESTIONS)
def test_contestants_agree_and_get_their_ratios(name, tmp_path):
    """With an interpreter in PALIGN_TRANSFORMERS_PYTHON that has TRL, peers take part and no goal is left out."""
    peers = os.environ.get("PALIGN_TRANSFORMERS_PYTHON")
    flags = [f"--peers-python={peers}"] if peers else []
    run("-m", f"benchmarks.{name}", "--tiny", "--rounds=1", f"--out={tmp_path}", *flags)
    races = json.loads((tmp_path / f"{name}.json").read_text())["races"]
    goals = [goal for race in races for goal in race["goals"]]
    assert {goal["id"] for goal in goals if goal["ratio"]} >= QUESTIONS[name]
    assert not peers or all(goal["ratio"] for goal in goals)


@pytest.mark.slow
def test_the_profile_says_which_share_of_the_products_rate_a_step_reaches(tmp_path):
    assert "C10" in run("-m", "benchmarks.profile_step", "--tiny", "--rounds=1", f"--out={tmp_path}")
    (goal,) = json.loads((tmp_path / "profile_step.json").read_text())["goals"]
    assert 0 < goal["share"] and goal["met"] == (goal["share"] >= goal["at_least"])


@pytest.mark.slow
def test_an_epoch_of_varied_lengths_compiles_nothing_after_its_first_step(tmp_path):
    run("-m", "benchmarks.compile_time", "--tiny", "--rounds=1", f"--out={tmp_path}")
    epoch = json.loads((tmp_path / "compile_time.json").read_text())["epoch"]
    assert epoch["compilations"] == 0 and len(set(epoch["targets"])) > 1


# What machines with an accelerator may lack, and what must be there without it.
MISSING = ("grain", "ml_collections", "tensorflow_datasets", "tensorflow")
BLOCKED = f"""
import importlib, importlib.abc, runpy, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""
GPU_SET = ("loss_head", "large_step", "profile_step", "realistic", "distill_head")
GPU_SET += tuple(f"contestants.{name}" for name in ("palign_step", "plain_jax", "head_jax", "distill_jax"))
STEP = ("losses", "heads.target_values", "heads.weighted_sum", "models.hf", "models.lora", "objectives.compose")
STEP += ("train.step", "train.optimizer", "train.state", "plan.cost", "generate.sample")


def test_the_step_and_the_gpu_set_are_imported_where_data_libraries_are_missing():
    modules = [f"palign.{name}" for name in STEP] + [f"benchmarks.{name}" for name in GPU_SET]
    run("-c", f"{BLOCKED}\nfor name in {modules}: importlib.import_module(name)")


@pytest.mark.slow
def test_the_profile_runs_where_data_libraries_are_missing(tmp_path):
    program = f"{BLOCKED}\nrunpy.run_module('benchmarks.profile_step', run_name='__main__')"
    run("-c", program, "--tiny", "--rounds=1", f"--out={tmp_path}")
    assert (tmp_path / "profile_step.json").exists()
