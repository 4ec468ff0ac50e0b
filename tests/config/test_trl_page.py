"""The page for users of TRL: its config is one, and its table names every setting of its YAML."""

import pathlib
import re

import yaml

from palign.config.load import load_recipe
from palign.config.renamed import RENAMED

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "trl.md").read_text()
THEIRS = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])


def test_the_config_says_what_the_yaml_says(tmp_path):
    (tmp_path / "dpo_config.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    (run,) = load_recipe(str(tmp_path / "dpo_config.py")).stages.values()
    split, test = THEIRS["dataset_train_split"], THEIRS["dataset_test_split"]
    assert run.data.path == f"hf:{THEIRS['dataset_name']}/{split}"
    assert dict(run.data.eval_paths) == {test: f"hf:{THEIRS['dataset_name']}/{test}"}
    steps = THEIRS["gradient_accumulation_steps"]
    assert run.data.rows_per_step == THEIRS["per_device_train_batch_size"] * steps * run.mesh.fsdp
    assert (run.data.micro_batches, run.data.max_length) == (steps, THEIRS["max_length"])
    assert (list(run.objective.loss_type), list(run.objective.loss_weights)) == (
        THEIRS["loss_type"], THEIRS["loss_weights"],
    )  # fmt: skip
    assert run.objective.hyper["beta"] == THEIRS["beta"] and run.objective.reference == "cached"
    names = ("learning_rate", "weight_decay", "max_grad_norm")
    assert [getattr(run.optimizer, name) for name in names] == [THEIRS[name] for name in names]
    assert run.optimizer.schedule == THEIRS["lr_scheduler_type"]
    names = ("epochs", "eval_every", "checkpoint_every", "keep", "log_every", "seed")
    theirs = ("num_train_epochs", "eval_steps", "save_steps", "save_total_limit", "logging_steps", "seed")
    assert [getattr(run.train, name) for name in names] == [THEIRS[name] for name in theirs]


def test_every_setting_of_the_yaml_has_its_row_and_is_ours_or_is_answered():
    table = PAGE.partition("| there | here |")[2]
    ours = {"loss_type", "loss_weights", "beta", "max_length", "learning_rate", "weight_decay", "max_grad_norm", "seed"}
    for name in THEIRS:
        assert f"`{name}`" in table, name
        assert name in RENAMED or name in ours, name
