"""The commands as a user meets them: exit codes, one line for each slip, and train -> generate -> evaluate."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from palign.cli import app, evaluate, generate, train
from palign.cli import demo as demo_command
from palign.cli import study as study_command
from palign.train import loop
from palign.train.metrics import read_metrics
from tests.recipes.tiny_runs import PLAIN, one_device, write_pairs

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = ("train", "generate", "evaluate", "demo", "annotate", "study", "launch", "convert")
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({settings!r})
"""
STAGES = """
from ml_collections import ConfigDict

from palign.config.load import ordered


def get_config():
    stages = ordered(
        sft=dict(objective=dict(loss_type=("sft",))),
        dpo=dict(
            init_from="sft", reference_from="sft", objective=dict(loss_type=("dpo",), beta=0.2, reference="cached")
        ),
    )
    return ConfigDict({settings!r} | dict(stages=stages))
"""


@pytest.fixture(scope="module", autouse=True)
def single():
    with one_device():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with data and config files."""
    place = tmp_path_factory.mktemp("cli")
    write_pairs(place / "pairs.jsonl", 60, prompts=40)
    write_pairs(place / "few.jsonl", 3, seed=8)
    lines = (place / "few.jsonl").read_text().splitlines(keepends=True)
    (place / "bad.jsonl").write_text(lines[0] + lines[1].replace('", "', '", ', 1) + lines[2])
    (place / "bad.parquet").write_text("PAR1")
    settings = {key: value for key, value in PLAIN.items() if key != "objective"}
    settings["train"] = settings["train"] | {"best_metric": "eval_heldout_loss", "eval_every": 2}
    (place / "sft.py").write_text(CONFIG.format(settings=settings | {"objective": PLAIN["objective"]}))
    (place / "two.py").write_text(STAGES.format(settings=settings))
    return place


@pytest.fixture(scope="module")
def trained(place):
    """Both stages, through the command line."""
    flags = [f"--config={place}/two.py", f"--config.data.path={place}/pairs.jsonl", f"--workdir={place}/run"]
    assert app.run(train.main, flags) == 0
    return place / "run"


def call(capsys, command, *arguments):
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    code = app.run(command.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def flags(place, *more):
    return (f"--config={place}/sft.py", f"--config.data.path={place}/pairs.jsonl", f"--workdir={place}/new", *more)


TRAINING_SLIPS = {
    "an unknown key": (
        "--config.optimizer.learning_rat=1",
        "config.optimizer.learning_rat",
        "did you mean 'learning_rate'",
    ),
    "an unknown section": ("--config.optimiser.b1=0.9", "config.optimiser", "did you mean 'optimizer'"),
    "a method's setting that is not one": ("--config.objective.beta=0.1", "config.objective.beta has no effect on sft"),
    "not a number": ("--config.optimizer.learning_rate=nan", "config.optimizer.learning_rate = nan"),
    "a wrong type": ("--config.model.dim=wide", "config.model.dim = 'wide': expected int"),
    "a truth value for a number": ("--config.model.dim=True", "config.model.dim = True: expected int"),
    "out of range": ("--config.data.eval_fraction=1.0", "config.data.eval_fraction = 1.0: expected a fraction below 1"),
    "a key without a value": ("--config.model.dim", "--config.model.dim: expected --config.key=value"),
    "missing data": (
        "--config.data.path={place}/pair.jsonl",
        "{place}/pair.jsonl: there is no such file; did you mean 'pairs",
    ),
    "no data": ("--config.data.path=", "config.data.path: must be set"),
    "a bad line": ("--config.data.path={place}/bad.jsonl", "{place}/bad.jsonl:2: not JSON at column"),
    "no file": ("--config.data.path={place}/*.arrow", "{place}/*.arrow: no file matches"),
    "a file of another kind": ("--config.data.path={place}/sft.py", "{place}/sft.py: expected a file named *.jsonl"),
    "no Parquet": ("--config.data.path={place}/bad.parquet", "{place}/bad.parquet: damaged, or of another kind"),
    "no data set of TFDS": ("--config.data.path=tfds:imdb_reviews/train", "tfds:imdb_reviews/train: has not been prep"),
    "a mixture of nothing": ("--config.data.mixture={'x': 1}", "config.data.path", "has no effect beside"),
    "weights of ratings that nobody gave": (
        "--config.data.score_weights={'helpfulness': 1}",
        "config.data.score_weights has no effect: no data is UltraFeedback or HelpSteer2; remove it",
    ),
    "an unknown method": ("--config.objective.loss_type=stf", "'stf' is not a method (did you mean 'sft'?)"),
    "a missing source": (
        "--config.init_from={place}/nothing",
        "config.init_from = '{place}/nothing': neither a stage nor",
    ),
    "an unknown stage": ("--stage=dpo", "--stage=dpo: no such stage; there are sft"),
    "an override of no stage": ("--config.stages.dpo.init_from=x", "no stage 'dpo'"),
    "a missing config": ("--config={place}/sfd.py", "{place}/sfd.py: no such file (did you mean 'sft.py'?)"),
    "an unknown option": ("--wrkdir=x", "unrecognized arguments: --wrkdir=x"),
    "too small a vocabulary": ("--config.model.vocab_size=5", "config.model.vocab_size = 5: the tokenizer has"),
    "no such metric": (
        "--config.train.best_metric=eval_heldout/loss",
        "config.train.best_metric = 'eval_heldout/loss'",
        "eval_heldout_loss",
    ),
    "nothing to find the best by": (
        "--config.data.eval_fraction=0",
        "config.train.best_metric = 'eval_heldout_loss'",
        "nothing is held out",
    ),
    "too long a warm-up": ("--config.optimizer.warmup_steps=6", "config.optimizer: 6 warm-up steps of a run of 6"),
}


@pytest.mark.parametrize("slip", TRAINING_SLIPS)
def test_a_slip_in_training_is_one_line_that_names_it_and_exit_code_2(slip, place, capsys):
    more, *expected = (text.replace("{place}", str(place)) for text in TRAINING_SLIPS[slip])
    code, out, err = call(capsys, train, *flags(place, more))
    lines = [line for line in err.splitlines() if line.startswith("palign: error:")]
    assert (code, len(lines), err.splitlines()[-1:], out) == (app.USER_ERROR, 1, lines, "")
    assert all(part in lines[0] for part in expected), lines[0]
    assert "Traceback" not in err and "usage:" not in err
    assert not (place / "new" / "config.json").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (train, ["--workdir=x"], "the following arguments are required: --config"),
        (evaluate, ["--workdir=x", "--process=1"], "--coordinator=HOST:PORT, --processes=N and --process=I belong"),
        (generate, ["--workdir=nowhere", "--prompt=p"], "nowhere: not the workdir of a run (no config.json)"),
        (generate, ["--workdir=nowhere"], "no prompt: give --prompt=TEXT, --message=TEXT or --prompts=FILE"),
        (generate, ["--workdir=nowhere", "--prompts=gone.jsonl"], "gone.jsonl: there is no such file"),
        (generate, ["--workdir=x", "--prompt=p", "--samples=two"], "argument --samples: invalid int value: 'two'"),
        (generate, ["--prompt=p"], "the following arguments are required: --workdir"),
        (evaluate, ["--workdir=nowhere"], "nowhere: not the workdir of a run"),
        (demo_command, ["--full", "--smoke"], "not allowed with argument"),
        (study_command, ["--minutes=-1"], "--minutes=-1: expected 0 (no limit) or more"),
        (study_command, ["--config=configs/study.py:medium"], "expected small, full or smoke"),
        (study_command, ["--config.step=3"], "config.step: no such setting (did you mean 'steps'?)"),
    ],
)
def test_a_slip_in_another_command_is_one_line_and_exit_code_2(command, arguments, expected, capsys):
    code, out, err = call(capsys, command, *arguments)
    assert (code, out, err.count("\n")) == (app.USER_ERROR, "", 1)
    assert err.startswith("palign: error: ") and expected in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workdir={run}/02-dpo@99", "--prompt=p"], "@99: no such checkpoint; there are [4, 6], last and best"),
        (["--workdir={run}", "--prompt=p"], "not the workdir of a run (no config.json); its stages are"),
        (["--workdir={run}/02-dpo", "--prompt=p", "--temperature=-1"], "temperature = -1.0: expected 0"),
        (["--workdir={run}/02-dpo", "--prompt=p", "--temperature=nan"], "temperature = nan: expected 0"),
        (["--workdir={run}/02-dpo", "--prompt=p", "--top_p=0"], "top_p = 0.0: expected above 0"),
        (["--workdir={run}/02-dpo", "--prompt=p", "--samples=0"], "samples = 0: expected 1 or more"),
        (["--workdir={run}/02-dpo", "--prompt=p", "--batch_size=0"], "batch_size = 0: expected 1 or more"),
    ],
)
def test_a_slip_about_a_trained_model_is_one_line_and_exit_code_2(arguments, expected, trained, capsys):
    code, out, err = call(capsys, generate, *(a.replace("{run}", str(trained)) for a in arguments))
    errors = [line for line in err.splitlines() if line.startswith("palign: error:")]
    assert (code, out, len(errors)) == (app.USER_ERROR, "", 1)
    assert expected in errors[0] and "Traceback" not in err


def test_debug_shows_the_traceback_before_the_line(place, capsys):
    code, _, err = call(capsys, train, *flags(place, "--config.optimizer.b1=nan", "--debug"))
    assert code == app.USER_ERROR
    assert err.startswith("Traceback (most recent call last)") and "in main" in err
    assert err.splitlines()[-1].startswith("palign: error: config.optimizer.b1 = nan")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("config.x:\n  two lines"), 2, "config.x: two lines"),
        (FileNotFoundError(2, "No such file", "x.model"), 2, "[Errno 2] No such file: 'x.model'"),
        (FileExistsError(17, "File exists", "runs/x"), 2, "[Errno 17] File exists: 'runs/x'"),
        (PermissionError(13, "Permission denied", "/x"), 2, "[Errno 13] Permission denied: '/x'"),
        (loop.TrainingDivergedError("not finite at step 3"), 77, "not finite at step 3"),
        (loop.PreemptedError("saved step 3"), 75, "saved step 3"),
        (OSError(28, "No space left on device", "x"), 74, "[Errno 28] No space left on device: 'x'"),
        (ValueError("writing x: No space left on device"), 74, "writing x: No space left on device"),
        (KeyError("x"), 70, "KeyError: 'x' (a fault of palign's: --debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from the last checkpoint"),
    ],
)
def test_every_kind_of_error_has_its_exit_code_and_one_line(error, code, line, capsys):
    def command(arguments):
        raise error

    assert app.run(command, []) == code
    assert capsys.readouterr().err == f"palign: error: {line}\n"


def test_the_debug_flag_is_not_an_argument_of_the_command():
    seen = []
    assert app.run(lambda arguments: seen.extend(arguments), ["--debug", "--x=1"]) == 0
    assert seen == ["--x=1"]
    seen.clear()
    assert app.run(lambda arguments: seen.extend(arguments), ["--debug", "--", "python", "--debug"]) == 0
    assert seen == ["--", "python", "--debug"]  # what stands behind -- is another command's


def test_a_workdir_that_is_a_file_is_the_users_error(place, capsys):
    code, _, err = call(capsys, train, *flags(place)[:2], f"--workdir={place}/sft.py")
    assert code == app.USER_ERROR and err.splitlines()[-1].startswith("palign: error:")


def test_training_through_the_command_line_runs_the_stages_in_order_and_only_once(trained, place, capsys):
    assert sorted(path.name for path in trained.iterdir()) == ["01-sft", "02-dpo"]
    for stage in ("01-sft", "02-dpo"):
        assert read_metrics(trained / stage)[-1]["step"] == 6
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    two = (f"--config={place}/two.py", f"--config.data.path={place}/pairs.jsonl", f"--workdir={trained}")
    code, _, err = call(capsys, train, *two)
    assert code == 0 and err.count("finished before, left as it is") == 2
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_an_override_reaches_all_stages_or_the_one_it_names(trained, place, capsys):
    two = [f"--config={place}/two.py", f"--config.data.path={place}/pairs.jsonl", f"--workdir={trained}"]
    code, _, err = call(capsys, train, *two, "--config.optimizer.b1=0.5", "--stage=dpo")
    assert code == 2 and "02-dpo: began with another config (config.optimizer.b1 was 0.9, is 0.5)" in err
    code, _, err = call(capsys, train, *two, "--config.stages.dpo.objective.beta=0.3")
    assert code == 2 and "01-sft: finished before" in err and "config.objective.beta was 0.2, is 0.3" in err


def test_generating_prints_the_prompt_and_its_samples(trained, capsys):
    arguments = (f"--workdir={trained}/02-dpo", "--prompt=the pie :", "--prompt=a dog :", "--samples=2")
    code, out, err = call(capsys, generate, *arguments, "--max_new_tokens=4", "--batch_size=2")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 4
    assert [line.startswith("the pie :") for line in lines] == [True, True, False, False]
    assert all(line.startswith("a dog :") for line in lines[2:])
    assert "generate: 2/2 in" in err


def test_generated_records_are_read_by_the_data_readers_again(trained, place, tmp_path, capsys):
    arguments = (f"--workdir={trained}/02-dpo@best", f"--prompts={place}/few.jsonl", "--samples=3", "--json")
    code, out, _ = call(capsys, generate, *arguments, "--max_new_tokens=4", "--batch_size=4", "--seed=3")
    assert code == 0
    asked = [json.loads(line)["prompt"] for line in (place / "few.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == asked
    assert all(len(r["responses"]) == len(r["scores"]) == 3 and max(r["scores"]) < 0 for r in records)
    (tmp_path / "drawn.jsonl").write_text(out)
    code, out, _ = call(capsys, evaluate, f"--workdir={trained}/02-dpo", f"--data={tmp_path}/drawn.jsonl", "--json")
    assert code == 0 and json.loads(out)["eval_data_loss"] > 0


def test_outputs_for_alpaca_eval_are_one_list_of_instructions_with_their_outputs(trained, place, tmp_path, capsys):
    asked = ["the pie :", "a dog :"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    settings = ("--max_new_tokens=4", "--batch_size=2", "--temperature=0", f"--prompts={tmp_path}/asked.jsonl")
    arguments = (f"--workdir={trained}/02-dpo", *settings)
    code, out, _ = call(capsys, generate, *arguments, "--format=alpaca_eval")
    plain = [json.loads(line) for line in call(capsys, generate, *arguments, "--json")[1].splitlines()]
    beside = {"generator": f"{trained}/02-dpo", "dataset": f"{tmp_path}/asked.jsonl"}
    expected = [{"instruction": row["prompt"], "output": row["responses"][0], **beside} for row in plain]
    assert code == 0 and json.loads(out) == expected and [row["instruction"] for row in expected] == asked
    code, _, err = call(capsys, generate, *arguments, "--format=alpaca_eval", "--samples=2")
    assert code == 2 and "--samples=2: --format=alpaca_eval has one output for each instruction" in err


def test_evaluating_gives_the_metrics_that_the_run_ended_with(trained, capsys):
    code, out, _ = call(capsys, evaluate, f"--workdir={trained}/02-dpo", "--json")
    ended = json.loads((trained / "02-dpo" / "finished.json").read_text())["metrics"]
    assert code == 0 and json.loads(out) == pytest.approx(ended, rel=1e-6)
    code, other, _ = call(capsys, evaluate, f"--workdir={trained}/02-dpo@4", "--json")
    assert json.loads(other)["eval_heldout_loss"] != json.loads(out)["eval_heldout_loss"]


def test_evaluating_on_a_file_prints_a_table_of_it_alone(trained, place, capsys):
    code, out, err = call(capsys, evaluate, f"--workdir={trained}/02-dpo", f"--data={place}/few.jsonl")
    assert code == 0, err
    assert "eval_data_rewards/accuracies" in out and "eval_heldout" not in out


def test_evaluation_needs_neither_the_runs_schedule_nor_the_model_that_it_began_with(trained, place, tmp_path, capsys):
    shutil.copytree(trained / "01-sft", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["train"] |= {"max_steps": 0, "epochs": 1}
    config["data"]["eval_fraction"] = 0.0
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"init_from": "gone"}))
    assert config["optimizer"]["warmup_steps"] > 1  # the file makes one step
    code, out, err = call(capsys, evaluate, f"--workdir={tmp_path}/run", f"--data={place}/few.jsonl", "--json")
    assert code == 0 and "eval_data_loss" in json.loads(out), err
    code, _, err = call(capsys, evaluate, f"--workdir={tmp_path}/run")
    assert code == 2 and "the run held nothing out; name a file with --data" in err


def test_help_of_every_command_is_shown_without_importing_jax():
    code = (
        "import sys, importlib, contextlib, io\n"
        "from palign.cli import app\n"
        f"for name in {COMMANDS!r}:\n"
        "    module = importlib.import_module('palign.cli.' + name)\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        try:\n"
        "            app.run(module.main, ['--help'])\n"
        "        except SystemExit as end:\n"
        "            assert end.code == 0\n"
        "    assert 'usage: palign.cli.' + name in out.getvalue(), out.getvalue()\n"
        "loaded = {'jax', 'flax', 'orbax', 'grain', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_a_command_of_its_own_process_ends_with_the_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "palign.cli.train", "--config=configs/sft.py", "--config.train.keep=0", "--workdir=x"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "palign: error: config.train.keep = 0: expected a number above 0\n"
