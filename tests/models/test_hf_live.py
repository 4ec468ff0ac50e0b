"""Against transformers itself, where an interpreter has it: PALIGN_TRANSFORMERS_PYTHON names one, or it is this one."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from palign.models.hf import describe
from palign.models.hf_export import export_model
from tests.models import test_hf
from tests.models.test_hf import HF, MODELS, load, outputs, tensors

PYTHON = os.environ.get("PALIGN_TRANSFORMERS_PYTHON") or sys.executable
SCRIPT = HF.parent / "make_hf_fixtures.py"
HERE = PYTHON != sys.executable or all(map(importlib.util.find_spec, ("torch", "transformers")))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HERE, reason="no transformers: set PALIGN_TRANSFORMERS_PYTHON")]


def transformers(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([PYTHON, SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("seed", [1, 2])
def test_new_random_models_compute_alike_and_go_there_and_back(seed, tmp_path, monkeypatch):
    made, back = epath.Path(tmp_path / "made"), epath.Path(tmp_path / "back")
    transformers(f"--out={made}", f"--seed={seed}")
    expected = np.load(made / "expected.npz")
    monkeypatch.setattr(test_hf, "EXPECTED", expected)
    test_hf.rows.cache_clear()
    for name in MODELS:
        model, params = describe(made / name).model, load(made / name)
        np.testing.assert_allclose(outputs(model, params), expected[name], rtol=0, atol=1e-5, err_msg=name)
        (back / name).mkdir(parents=True)
        export_model(back / name, model, params, {"pad_token_id": 0})
        there, again = tensors(made / name), tensors(back / name)
        assert {k: v.tobytes() for k, v in there.items()} == {k: v.tobytes() for k, v in again.items()}
    test_hf.rows.cache_clear()
    monkeypatch.undo()
    transformers(f"--read={back}")
    found = np.load(back / "found.npz")
    for name in MODELS:  # read() takes the committed token ids
        ours = outputs(describe(back / name).model, load(back / name))
        np.testing.assert_allclose(found[name], ours, rtol=0, atol=1e-5, err_msg=name)
