"""From files and overrides to frozen configs, and what a slip is answered with."""

import json
import pathlib

import pytest

from palign.config.load import load_recipe, resolve_recipe, resolve_run, to_plain
from palign.config.schema import RopeScaling, RunConfig
from palign.objectives.methods import pairwise
from palign.objectives.registry import METHODS, resolve_methods

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
NOT_RUNS = ("study.py",)  # a config of its own kind

SOURCE = """
from ml_collections import ConfigDict
from palign.config.load import ordered

def get_config():
    return ConfigDict({
        "model": {"dim": 64, "rope_bases": (1e4, 1e6)},
        "optimizer": {"learning_rate": 1e-3},
        "stages": ordered(
            sft={"objective": {"loss_type": ("sft",)}},
            dpo={
                "init_from": "sft", "reference_from": "sft",
                "objective": {"loss_type": ("dpo",), "beta": 0.1}, "optimizer": {"learning_rate": 1e-4},
            },
        ),
    })
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "two.py").write_text(SOURCE)
    return lambda *overrides: load_recipe(str(tmp_path / "two.py"), overrides).stages


def test_stages_are_differences_from_the_top_level(recipe):
    stages = recipe()
    assert list(stages) == ["sft", "dpo"]
    assert {run.model.dim for run in stages.values()} == {64}
    assert [run.optimizer.learning_rate for run in stages.values()] == [1e-3, 1e-4]
    assert [run.objective.loss_type for run in stages.values()] == [("sft",), ("dpo",)]
    assert [run.init_from for run in stages.values()] == ["", "sft"]
    assert stages["dpo"].objective.hyper == {"beta": 0.1} and stages["sft"].objective.hyper == {}


def test_overrides_hold_for_all_stages_or_for_one(recipe):
    stages = recipe("model.dim=32", "stages.dpo.objective.beta=0.5", "optimizer.weight_decay=1")
    assert {run.model.dim for run in stages.values()} == {32}
    assert stages["dpo"].objective.hyper == {"beta": 0.5} and stages["sft"].objective.hyper == {}
    weight_decay = stages["sft"].optimizer.weight_decay
    assert weight_decay == 1.0 and isinstance(weight_decay, float)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("data.path=some/file.jsonl", lambda run: run.data.path, "some/file.jsonl"),
        ("data.path=a=b", lambda run: run.data.path, "a=b"),
        ("model.tie_embedding=False", lambda run: run.model.tie_embedding, False),
        ("model.final_softcap=30", lambda run: run.model.final_softcap, 30.0),
        ("model.final_softcap=None", lambda run: run.model.final_softcap, None),
        ("model.windows=(128, 0)", lambda run: run.model.windows, (128, 0)),
        ("model.windows=128", lambda run: run.model.windows, (128,)),
        ("objective.loss_type=ipo", lambda run: run.objective.loss_type, ("ipo",)),
        ("objective.loss_type=['dpo', 'sft']", lambda run: run.objective.loss_type, ("dpo", "sft")),
        ("data.eval_paths.held=x.jsonl", lambda run: run.data.eval_paths, {"held": "x.jsonl"}),
        ("model.rope_scalings=({'factor': 8},)", lambda run: run.model.rope_scalings, (RopeScaling(factor=8.0),)),
        ("objective.gamma=2", lambda run: run.objective.hyper, {"gamma": 2.0}),
    ],
)
def test_an_override_is_a_literal_or_else_a_string(tmp_path, override, read, value):
    (tmp_path / "one.py").write_text(
        "import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict()\n"
    )
    stages = load_recipe(str(tmp_path / "one.py"), [override]).stages
    assert list(stages) == ["one"]
    assert read(stages["one"]) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.dim=3", r"config.modle: no such setting \(did you mean 'model'\?\)"),
        ("model.dims=3", r"config.model.dims: no such setting \(did you mean 'dim'\?\)"),
        ("optimizer.lr=3", r"config.optimizer.lr: no such setting"),
        ("train.zzz=3", r"config.train.zzz: no such setting; there are epochs, max_steps"),
        ("model.dim=abc", r"config.model.dim = 'abc': expected int"),
        ("model.dim=1.5", r"config.model.dim = 1.5: expected int"),
        ("model.dim=True", r"config.model.dim = True: expected int"),
        ("model.scan_layers=1", r"config.model.scan_layers = 1: expected bool"),
        ("model.remat=True", r"config.model.remat = True: expected a name, full \(which True was\), none \(False\)"),
        ("data.path=3", r"config.data.path = 3: expected str"),
        ("optimizer.learning_rate=fast", r"config.optimizer.learning_rate = 'fast': expected a number"),
        ("optimizer.learning_rate=nan", r"config.optimizer.learning_rate = nan: expected a number above 0"),
        ("optimizer.warmup_ratio=-inf", r"config.optimizer.warmup_ratio = -inf"),
        ("objective.beta=nan", r"config.objective.beta = nan: expected a finite number"),
        ("objective.beta=0", r"config.objective.beta = 0.0: expected a number above 0"),
        ("objective.beta=x", r"config.objective.beta = 'x': expected a number"),
        ("objective.hyper={'beta': 1}", r"config.objective.hyper"),
        ("model.windows=('a',)", r"config.model.windows\[0\] = 'a': expected int"),
        ("model.rope_scalings=({'facter': 8},)", r"rope_scalings\[0\].facter: no such setting \(did you mean 'factor'"),
        ("model=3", r"config.model = 3: expected a group of keys \(vocab_size, "),
        ("model.dim.x=3", r"--config.model.dim.x: config.model.dim is a value, it has no keys"),
        ("model.dim", r"--config.model.dim: expected --config.key=value"),
        ("stages.dpo.optimizer.flor=1", r"^stage dpo: config.optimizer.flor: no such setting \(did you mean 'floor'"),
        ("stages.dop.objective.beta=0.1", r"--config.stages.dop.objective.beta: no stage 'dop' \(did you mean 'dpo'"),
        ("stages.x={}", r"--config.stages.x: no stage 'x'; there are sft, dpo"),
    ],
)  # fmt: skip
def test_a_slip_is_answered_with_the_key_and_what_is_near(recipe, override, message):
    with pytest.raises(ValueError, match=message) as error:
        recipe(override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "hyper", "message"),
    [
        (["dppo"], {}, r"config.objective.loss_type: 'dppo' is not a method \(did you mean 'dpo'\?\)"),
        (["dpo"], {"betas": 0.1}, r"config.objective.betas has no effect on dpo \(did you mean 'beta'\?\); remove it"),
        (["sft"], {"beta": 0.1}, r"config.objective.beta has no effect on sft \(there are: none\)"),
        (["ipo"], {"tau": 0.1}, r"config.objective.tau has no effect on ipo \(there are: beta\); remove it"),
    ],
)
def test_methods_and_their_hyper_parameters_are_checked_too(names, hyper, message):
    with pytest.raises(ValueError, match=message):
        resolve_methods(names, hyper)


def test_a_hyper_parameter_without_a_default_must_be_set(monkeypatch):
    def loss(policy_logps, ref_logps, *, strength):
        return policy_logps * strength

    monkeypatch.setitem(METHODS, "new", pairwise(loss))
    with pytest.raises(ValueError, match=r"config.objective.strength: new has no default for it; set a number"):
        resolve_methods(["new"], {})
    assert resolve_methods(["new"], {"strength": 2.0})[0][2] == {"strength": 2.0}


def test_a_file_that_is_not_there_or_is_no_config_is_an_error(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"expected a function get_config\(\) -> ml_collections.ConfigDict"):
        load_recipe(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match=r"emtpy.py: no such file \(did you mean 'empty.py'\?\)"):
        load_recipe(str(tmp_path / "emtpy.py"))


def test_a_stage_name_must_be_fit_for_a_directory():
    with pytest.raises(ValueError, match=r"config.stages.a/b: a stage's name is made of"):
        resolve_recipe({"stages": {"a/b": {}}})


def test_plain_values_go_through_json_and_back(recipe):
    for run in (*recipe("model.rope_scalings=({'factor': 8},)", "data.eval_paths.a=b").values(), RunConfig()):
        assert resolve_run(json.loads(json.dumps(to_plain(run)))) == run


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.name not in NOT_RUNS], ids=lambda path: path.name)
def test_every_config_of_the_repository_resolves(path):
    for run in load_recipe(str(path)).stages.values():
        resolve_methods(run.objective.loss_type, run.objective.hyper)
        assert resolve_run(json.loads(json.dumps(to_plain(run)))) == run
