"""Runs that begin from a Hugging Face directory: TRL's own ten steps from the same one, and the way back.

`tests/fixtures/make_trl_run.py` recorded TRL's side: texts as users have them, its tokenisation, its optimizer.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest

from palign.config.load import resolve_run
from palign.data.plan import plan_padded
from palign.data.readers import read_records
from palign.data.tokenize import tokenize_records
from palign.eval.score import as_dataset, token_logps
from palign.sharding.mesh import make_mesh
from palign.train import convert as convert_module
from palign.train.convert import convert
from palign.train.loop import run
from palign.train.metrics import read_metrics
from palign.train.sources import load_run
from tests.recipes.tiny_runs import one_device

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SCRIPT, RUNS = FIXTURES / "make_trl_run.py", ("llama", "qwen3")
PYTHON = os.environ.get("PALIGN_TRANSFORMERS_PYTHON") or sys.executable
HERE = PYTHON != sys.executable or all(map(importlib.util.find_spec, ("torch", "transformers", "trl")))
live = pytest.mark.skipif(not HERE, reason="no transformers: set PALIGN_TRANSFORMERS_PYTHON")


@functools.cache
def recorded(name):
    return json.loads((FIXTURES / "trl_run" / f"{name}.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def single():
    with one_device(), mock.patch.object(convert_module, "make_mesh", lambda **_: one()):
        yield


def one():
    return make_mesh(data=1, devices=jax.devices()[:1])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(name, path, model, **sections):
    """TRL's settings, as docs/trl.md translates them."""
    there = recorded(name)["settings"]
    optimizer = {
        "learning_rate": there["learning_rate"],
        "schedule": there["lr_scheduler_type"],
        "warmup_steps": there["warmup_steps"],
        "warmup_ratio": None,
        "weight_decay": there["weight_decay"],
        "b1": there["adam_beta1"],
        "b2": there["adam_beta2"],
        "eps": there["adam_epsilon"],
        "max_grad_norm": there["max_grad_norm"],
    }
    data = {
        "path": str(path),
        "eval_fraction": 0.0,
        "max_length": there["max_length"],
        "packing": "one_per_row",
        "row_length": 64,
        "block": 64,
        "rows_per_step": there["per_device_train_batch_size"] * there["gradient_accumulation_steps"],
        "micro_batches": there["gradient_accumulation_steps"],
    }
    given = {
        "init_from": str(model),
        "reference_from": str(model),
        "model": {"dtype": "float32", "remat": "none"},
        "data": data,
        "objective": {"loss_type": there["loss_type"], "beta": there["beta"], "reference": "cached"},
        "optimizer": optimizer,
        "train": {"max_steps": there["max_steps"], "log_every": 1},
    }
    for section, values in sections.items():
        given[section] = given[section] | values
    return resolve_run(given)


def in_the_order_of(pairs, per_step, steps):
    """The pairs in such an order that the plan takes them as they are given."""
    taken = plan_padded(len(pairs), examples_per_step=per_step, seed=0, max_steps=steps).members
    assert sorted(taken) == list(range(len(pairs)))
    placed = [None] * len(pairs)
    for pair, place in zip(pairs, taken, strict=True):
        placed[place] = pair
    return placed


@pytest.fixture(scope="module", params=RUNS)
def trained(request, tmp_path_factory):
    """A run with TRL's settings: (name, its workdir)."""
    name, place = request.param, tmp_path_factory.mktemp(request.param)
    there = recorded(name)["settings"]
    pairs = in_the_order_of(recorded(name)["pairs"], there["per_device_train_batch_size"], there["max_steps"])
    run(settings(name, write(place / "pairs.jsonl", pairs), FIXTURES / "trl_run" / name), place / "run")
    return name, place / "run"


def test_ten_steps_from_the_same_directory_agree_with_trl(trained):
    name, workdir = trained
    ours, theirs = [line for line in read_metrics(workdir) if "loss" in line], recorded(name)["steps"]
    assert len(ours) == len(theirs) == 10
    for metric in theirs[0]:
        found, expected = ([step[metric] for step in side] for side in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=metric)
    assert abs(theirs[-1]["rewards/margins"]) > 0.03  # it went somewhere


def scores(place, rows, tmp_path):
    """The ids of every prompt with a response, and the log-probabilities of its targets by the model in a place."""
    loaded = load_run(str(place))
    records = read_records(write(tmp_path / "scored.jsonl", rows))[0]
    trees, _ = tokenize_records(records, loaded.tokenizer, max_length=128)
    assert len(trees) == len(rows)
    dataset = as_dataset(trees, row_length=128, rows_per_step=4)
    logps = token_logps(loaded.lm, loaded.params, dataset, one())
    ids = [np.concatenate([tree.prompt, response]) for tree in trees for response in tree.responses]
    return ids, [values for tree in logps for values in tree]


def test_an_exported_run_is_the_model_that_was_trained(trained, tmp_path):
    name, workdir = trained
    convert(str(workdir), str(tmp_path / "out"))
    rows = recorded(name)["pairs"][:6]
    after, back = (scores(place, rows, tmp_path) for place in (workdir, tmp_path / "out"))
    for ids, again in zip(after[0], back[0], strict=True):
        np.testing.assert_array_equal(ids, again)
    np.testing.assert_array_equal(np.concatenate(after[1]), np.concatenate(back[1]))


def transformers(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([PYTHON, SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def check_against_transformers(place, rows, tmp_path):
    """Ids and log-probabilities of an exported model, as transformers' own classes find them."""
    file = write(tmp_path / "rows.jsonl", rows)
    transformers(f"--score={place}", f"--pairs={file}", f"--out={tmp_path}/found.json")
    theirs = json.loads((tmp_path / "found.json").read_text())
    for ids, logps, found in zip(*scores(place, rows, tmp_path), theirs, strict=True):
        assert ids.tolist() == found["ids"]
        np.testing.assert_allclose(logps, found["logps"][-logps.size :], rtol=0, atol=1e-5)


@pytest.mark.slow
@live
@pytest.mark.parametrize("name", RUNS)
def test_new_models_are_trained_exported_and_loaded_by_transformers(name, tmp_path):
    """DPO of pairs, and LiPO of lists, from random models; then the log-probabilities of 100 pairs."""
    transformers(f"--out={tmp_path}/made", "--seed=3", "--models-only")
    pairs = [row for n in range(5) for row in recorded(name)["pairs"][n::5]]
    pairs += [row | {"rejected": other["chosen"]} for row, other in zip(pairs, pairs[1:] + pairs[:1], strict=True)]
    pairs += [row | {"prompt": other["prompt"]} for row, other in zip(pairs[:20], pairs[7:27], strict=True)]
    pairs = [row for row in pairs if row["chosen"] != row["rejected"]][:100]
    assert len(pairs) == 100
    lists = [
        {"prompt": a["prompt"], "responses": [a["chosen"], a["rejected"], b["rejected"]], "scores": [1.0, 0.5, 0.0]}
        for a, b in zip(pairs[:40], pairs[40:80], strict=True)
    ]
    for method, rows in (("dpo", pairs), ("lipo_lambda", lists)):
        data = write(tmp_path / f"{method}.jsonl", rows)
        made = settings(
            name, data, tmp_path / "made" / name, objective={"loss_type": [method]}, data={"row_length": 128}
        )
        run(made, tmp_path / method)
        convert(str(tmp_path / method), str(tmp_path / f"{method}_exported"))
        check_against_transformers(tmp_path / f"{method}_exported", pairs, tmp_path)


@pytest.mark.slow
@live
def test_trl_still_trains_as_it_was_recorded(tmp_path):
    transformers(f"--out={tmp_path}")
    for name in RUNS:
        again = json.loads((tmp_path / f"{name}.json").read_text())
        for now, then in zip(again["steps"], recorded(name)["steps"], strict=True):
            assert now == pytest.approx(then, abs=1e-5)
