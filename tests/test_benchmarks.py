"""Every benchmark runs, at sizes at which its figures mean nothing."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHARED = {"driver.py", "worker.py", "cases.py"}
SMALL_STEP = (
    "--steps=1 --passes=1 --tokens=512 --max-length=256 --vocabulary=512 --dim=64 --layers=2 --heads=4 --hidden-dim=128"
)
RUNS = {
    "packed_step.py": [SMALL_STEP, f"--cached {SMALL_STEP}"],
    "distill_head.py": ["--vocab=300 --targets=64 --plan-targets=128 --width=16 --chunk=32 --rounds=1"],
    "memory.py": ["--rows=4 --tokens=128"],
}
FIGURES = {"packed_step.py": "padded / packed, wall", "distill_head.py": "| dense |", "memory.py": "| `lora.rank=16` |"}


def test_every_benchmark_is_run_here():
    assert RUNS.keys() == FIGURES.keys() == {file.name for file in (ROOT / "benchmarks").glob("*.py")} - SHARED


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), [(name, flags) for name, runs in RUNS.items() for flags in runs])
def test_a_benchmark_checks_its_sides_and_prints_a_table(name, flags):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *flags.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert run.returncode == 0, run.stderr
    assert FIGURES[name] in run.stdout
