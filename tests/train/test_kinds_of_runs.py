"""Whole runs of what is not a plain preference loss: thumbs, prompt matching, value heads, diagnostics."""

import json

import numpy as np
import pytest

from palign.train.evaluate import evaluate_run
from palign.train.loop import run
from palign.train.matching import CLASSIFIER
from tests.recipes.tiny_runs import config, one_device, sentence, write_pairs

SHORT = {"max_steps": 3, "eval_every": 3}


@pytest.fixture(scope="module")
def thumbs(tmp_path_factory):
    """Sixty judged responses; what is liked answers other prompts than what is not. And an SFT run on them."""
    root, rng = tmp_path_factory.mktemp("thumbs"), np.random.default_rng(0)
    lines = []
    for i in range(60):
        prompt = f"{'say' if i % 2 else 'do the'} {sentence(rng, 5)} :"
        lines.append({"prompt": prompt, "completion": f" good {sentence(rng, 4)}", "label": bool(i % 2)})
    file = root / "thumbs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with one_device():
        run(config(file, train=SHORT), root / "sft")
    return file, root


@pytest.mark.parametrize("name", [pytest.param("kto", marks=pytest.mark.slow), "bco"])
def test_thumbs_train_and_evaluate_again_to_the_same_numbers(name, thumbs):
    file, root = thumbs
    sources = {"init_from": str(root / "sft"), "reference_from": str(root / "sft")}
    made = config(file, train=SHORT, objective={"loss_type": [name], "reference": "cached"}, **sources)
    with one_device():
        metrics = run(made, root / name)
        again = evaluate_run(str(root / name))
    assert (root / name / CLASSIFIER).is_file() == (name == "bco")
    for key, value in metrics.items():
        np.testing.assert_allclose(again[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_a_language_model_becomes_a_reward_model_and_diagnostics_are_logged(tmp_path):
    file, source = write_pairs(tmp_path / "pairs.jsonl", 40), tmp_path / "sft"
    reward = {"loss_type": ["bradley_terry"], "reference": "none"}
    watched = {"loss_type": ["dpo"], "diagnostics": ["diagnostics/ches", "diagnostics/difficulty"]}
    with one_device():
        run(config(file, train=SHORT), source)
        judged = config(file, train=SHORT, model={"value_head": 1}, objective=reward, init_from=str(source))
        assert "eval_heldout_rewards/accuracies" in run(judged, tmp_path / "reward")
        both = {"init_from": str(source), "reference_from": str(source)}
        metrics = run(config(file, train=SHORT, objective=watched, **both), tmp_path / "dpo")
    assert {"eval_heldout_diagnostics/ches", "eval_heldout_diagnostics/difficulty"} <= metrics.keys()
