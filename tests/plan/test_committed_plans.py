"""The plans beside the configs: what they say is what the configs still compile to."""

import os
import pathlib
import subprocess
import sys

import pytest

from docs.make_plans import PAGE, PLANS, with_table
from palign.config.load import load_recipe
from palign.plan.show import from_json
from palign.plan.topology import parse_topology

FILES = sorted(PLANS.glob("*.json"))
PYTHONS = {"tpu": "PALIGN_TPU_PYTHON", "gpu": "PALIGN_CUDA_PYTHON"}  # interpreters with libtpu, with the CUDA plugin


def read(file):
    return from_json(file.read_text(encoding="utf-8"))


def test_the_page_shows_the_committed_plans():
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run python docs/make_plans.py"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_plan_is_of_its_config_fits_and_has_no_faults(file):
    plan = read(file)
    recipe = load_recipe(plan.origin.config, plan.origin.overrides)
    config, topology = recipe.stages[plan.origin.stage], parse_topology(plan.topology)
    assert file.name == f"{pathlib.Path(plan.origin.config).stem}.{plan.topology.replace(':', '_')}.json"
    assert plan.devices == topology.slices * topology.per_slice
    said = (config.data.row_length, config.data.rows_per_step, config.data.micro_batches, config.model.remat)
    assert said == tuple(plan.settings[name] for name in ("row_length", "rows_per_step", "micro_batches", "remat"))
    assert plan.memory.total <= plan.memory.available and not plan.faults


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_plan_still_compiles_to_what_it_says(file, tmp_path):
    plan, again = read(file), tmp_path / "plan.json"
    variable = PYTHONS[parse_topology(plan.topology).chip.platform]
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"set {variable} to a Python that can compile for {plan.topology}")
    flags = [f"--config.{override}" for override in plan.origin.overrides]
    flags += [f"--config={plan.origin.config}", f"--stage={plan.origin.stage}", f"--topology={plan.topology}"]
    flags += [f"--responses={plan.step.responses}", f"--json={again}"]
    subprocess.run([python, "-m", "palign.cli.plan", *flags], check=True, timeout=3000, env=clean_environment())
    new = read(again)
    assert new.memory.total == pytest.approx(plan.memory.total, rel=0.05)
    assert sum(e.moved for e in new.exchanges) == pytest.approx(sum(e.moved for e in plan.exchanges), rel=0.05)


def test_the_command_plans_for_forced_devices(tmp_path):
    file = tmp_path / "plan.json"
    small = ("num_layers=2", "dim=64", "num_heads=4", "hidden_dim=64", "vocab_size=128", "dtype='float32'")
    flags = [f"--config.model.{setting}" for setting in small]
    flags += ["--config.data.row_length=256", "--config.data.micro_batches=1", "--config.data.max_length=128"]
    command = [sys.executable, "-m", "palign.cli.plan", "--config=configs/dpo_0_5b.py", "--topology=cpu:2", *flags]
    quick = clean_environment() | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    run = subprocess.run([*command, f"--json={file}"], capture_output=True, text=True, env=quick, timeout=600)
    assert run.returncode == 0, run.stderr
    assert read(file).devices == 2 and "compiled" in run.stdout


def clean_environment():
    """Without what the tests of this process have set for jax."""
    return {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
