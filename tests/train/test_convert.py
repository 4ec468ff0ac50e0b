"""Runs that start from Hugging Face models, and go back to them."""

import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import tokenizers
from etils import epath

from palign.cli import app
from palign.cli import convert as convert_command
from palign.models.hf import describe, load_weights
from palign.models.hf_config import computed
from palign.sharding.mesh import make_mesh
from palign.train import convert as convert_module
from palign.train.build import build
from palign.train.convert import convert
from palign.train.evaluate import evaluate_run
from palign.train.loop import run
from palign.train.sources import load_run
from tests.models.test_hf import HF, check_adapter, load, same, tensors
from tests.recipes.tiny_runs import PLAIN, WORDS, config

pytestmark = pytest.mark.usefixtures("single")
KEPT = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module", autouse=True)
def one_device_here():
    with mock.patch.object(convert_module, "make_mesh", lambda **_: make_mesh(data=1, devices=jax.devices()[:1])):
        yield


def hugging_face(name, place):
    """A fixture's model with a tokenizer of 20 ids, of which its embedding has one more."""
    place = epath.Path(shutil.copytree(HF / name, place))
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS[:16]])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (place / "tokenizer.json").write_text(tokenizer.to_str())
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (place / "tokenizer_config.json").write_text(json.dumps(special | {"model_max_length": 64}))
    (place / "generation_config.json").write_text('{"eos_token_id": [2], "temperature": 0.6}')
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return place


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return hugging_face("llama3", tmp_path_factory.mktemp("hf") / "llama")


def from_hf(pairs, source, **sections):
    """A run of three steps whose sizes are the source's."""
    train = {"max_steps": 3, "eval_every": 0, "checkpoint_every": 3}
    model = {"remat": "none", "dtype": "float32"} | sections.pop("model", {})
    with mock.patch.dict(PLAIN, model=model):
        return config(pairs, init_from=str(source), train=train, **sections)


@pytest.fixture(scope="module")
def dpo(pairs, llama, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dpo") / "run"
    settings = from_hf(pairs, llama, reference_from=str(llama), objective={"loss_type": ["dpo"], "beta": 0.2})
    return settings, workdir, run(settings, workdir)


def test_the_directory_of_a_model_is_no_workdir(pairs, llama):
    before = sorted(file.name for file in llama.iterdir())
    with pytest.raises(ValueError, match="holds a Hugging Face model, not a run; take another --workdir"):
        run(from_hf(pairs, llama), llama)
    assert sorted(file.name for file in llama.iterdir()) == before


def test_a_run_takes_sizes_tokenizer_and_weights_from_the_model(dpo, llama, tmp_path):
    settings, workdir, metrics = dpo
    loaded = load_run(str(workdir))
    assert computed(loaded.config.model) == computed(describe(llama).model)
    assert loaded.tokenizer.vocab_size == 20 and loaded.config.model.vocab_size == 21
    assert not np.array_equal(loaded.params["embedding"], load(llama)["embedding"])
    _, state = build(settings, tmp_path / "again")
    same(jax.device_get(state.params), jax.device_get(load(llama)))
    assert run(settings, workdir) == metrics  # the finished run is found to be of this config


def test_a_run_goes_back_with_all_that_came_with_its_model(dpo, llama, tmp_path, capsys):
    _, workdir, _ = dpo
    written, seconds = convert(str(workdir), tmp_path / "out")
    place = epath.Path(tmp_path / "out")
    same(jax.device_get(load(place)), jax.device_get(load_run(str(workdir)).params))
    assert written[:2] == ("LlamaForCausalLM", len(tensors(llama))) and seconds > 0
    assert all((place / name).read_bytes() == (llama / name).read_bytes() for name in KEPT)
    assert json.loads((place / "config.json").read_text()) == json.loads((llama / "config.json").read_text())
    assert not list(tmp_path.glob(".*"))
    for name in (workdir, llama):
        with pytest.raises(ValueError, match=r"--to=.*/out: is there already"):
            convert(str(name), place)


def test_a_converted_model_reads_as_a_run_and_returns_to_the_same_bytes(llama, pairs, dpo, tmp_path):
    workdir = tmp_path / "base"
    assert convert(str(llama), workdir).written[:3] == ("LlamaForCausalLM", 21, 1336)
    same(jax.device_get(load_run(str(workdir)).params), jax.device_get(load(llama)))
    assert 1 < evaluate_run(str(workdir), str(pairs))["eval_data_loss"] < 6
    convert(str(workdir), tmp_path / "back")
    found, wanted = tensors(epath.Path(tmp_path / "back")), tensors(llama)
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in wanted.items()}
    settings = from_hf(pairs, workdir, reference_from=str(llama), objective={"loss_type": ["dpo"]})
    _, state = build(settings, tmp_path / "run")
    same(jax.device_get(state.params), jax.device_get(load(llama)))
    kept = {file.name for file in (tmp_path / "run" / "hf").iterdir()}
    assert kept == {*KEPT, "config.json"}


@pytest.mark.slow
def test_a_run_of_factors_is_exported_as_an_adapter_or_merged(pairs, llama, tmp_path):
    lora = {"rank": 2, "alpha": 6.0, "targets": ["query", "output", "down"]}
    objective = {"loss_type": ["dpo"]}
    run(from_hf(pairs, llama, lora=lora, objective=objective, optimizer={"learning_rate": 0.1}), tmp_path / "run")
    convert(str(tmp_path / "run"), tmp_path / "adapter", adapter=True)
    convert(str(tmp_path / "run"), tmp_path / "merged")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(llama)
    check_adapter(tmp_path / "adapter", tensors(llama), tensors(epath.Path(tmp_path / "merged")))
    with pytest.raises(ValueError, match="--dtype=bfloat16 has no effect on an adapter"):
        convert(str(tmp_path / "run"), tmp_path / "x", adapter=True, dtype="bfloat16")


@pytest.mark.slow
def test_a_reward_model_starts_from_a_language_model_and_goes_back_as_a_classifier(pairs, llama, tmp_path, capsys):
    objective = {"loss_type": ["bradley_terry"], "reference": "none"}
    run(from_hf(pairs, llama, model={"value_head": 1}, objective=objective), tmp_path / "run")
    assert convert(str(tmp_path / "run"), tmp_path / "out").written.architecture == "LlamaForSequenceClassification"
    assert "the map to the vocabulary is left out" in capsys.readouterr().err
    trained, stored = load_run(str(tmp_path / "run")).params, load_run(str(tmp_path / "out"))
    same(jax.device_get(stored.params), {k: v for k, v in jax.device_get(trained).items() if k != "unembedding"})
    assert stored.lm.values is not None and stored.config.objective.loss_type == ("bradley_terry",)
    reward = from_hf(pairs, tmp_path / "out", model={"value_head": 1}, objective=objective)
    _, state = build(reward, tmp_path / "more")
    same(jax.device_get(state.params), jax.device_get(stored.params))


def test_a_run_of_no_model_of_hugging_faces_is_exported_with_what_it_knows(dpo, tmp_path):
    workdir = shutil.copytree(dpo[1], tmp_path / "run")
    shutil.rmtree(workdir / "hf")
    assert convert(str(workdir), tmp_path / "out", dtype="bfloat16").written.architecture == "LlamaForCausalLM"
    place = epath.Path(tmp_path / "out")
    wanted = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), load_run(str(workdir)).params)
    same(jax.device_get(load(place)), jax.device_get(wanted))
    content = json.loads((place / "config.json").read_text())
    assert content["eos_token_id"] == 2 and content["max_position_embeddings"] == 32
    assert content["torch_dtype"] == "bfloat16" and (place / "tokenizer.json").is_file()
    assert json.loads((place / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"num_layers": 3}},
            r"config.model.num_layers = 3: the model in .* \(config.init_from\) has 2; leave",
        ),
        (
            {"reference_from": "gemma"},
            r"config.reference_from: the model in .* has rope_bases = .*; all models of a run",
        ),
        (
            {"init_from": "larger", "reference_from": "larger"},
            r"config.model.vocab_size = 21: the tokenizer has 22 ids, and each needs",
        ),
        ({"init_from": "llama@best"}, "a Hugging Face model has no checkpoints; leave @best out"),
        ({"init_from": "org/name"}, "neither a stage nor .* nor the directory of a Hugging Face model .* `hf download"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(sections, message, pairs, llama, tmp_path):
    place = tmp_path / "hf"
    shutil.copytree(llama, place / "llama")
    shutil.copytree(llama, place / "gemma")
    changed = json.loads((llama / "config.json").read_text()) | {"rope_parameters": {"rope_theta": 5.0}}
    (place / "gemma" / "config.json").write_text(json.dumps(changed))
    shutil.copytree(llama, place / "larger")
    larger = json.loads((llama / "tokenizer.json").read_text())
    larger["model"]["vocab"] |= {"x": 20, "y": 21}
    (place / "larger" / "tokenizer.json").write_text(json.dumps(larger))
    named = {"init_from": "llama", "reference_from": "llama"} | sections
    init, reference = (str(place / named.pop(role)) for role in ("init_from", "reference_from"))
    settings = from_hf(pairs, init, reference_from=reference, objective={"loss_type": ["dpo"]}, **named)
    with pytest.raises(ValueError, match=message):
        build(settings, tmp_path / "run")


def test_what_cannot_be_converted_is_refused(dpo, llama, tmp_path):
    _, workdir, _ = dpo
    to = tmp_path / "out"
    for arguments, message in (
        ((f"{llama}@best", {}), "a Hugging Face model has neither checkpoints nor an adapter"),
        ((str(llama), {"adapter": True}), "a Hugging Face model has neither checkpoints nor an adapter"),
        ((str(workdir), {"adapter": True}), "trained all weights"),
        ((str(workdir), {"dtype": "float64"}), "--dtype=float64: expected one of float32, bfloat16"),
        ((f"{workdir}@9", {}), "no such checkpoint"),
        ((str(tmp_path), {}), "not the workdir of a run"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(arguments[0], to, **arguments[1])
    assert not list(tmp_path.iterdir())  # a conversion that fails leaves nothing
    with pytest.raises(ValueError, match=r"not the workdir of a run; make it one with palign.cli.convert"):
        evaluate_run(str(llama))


def test_weights_can_be_loaded_for_one_device_by_name(llama):
    loaded = load_run(str(llama))
    assert loaded.config.objective.loss_type == ("sft",) and loaded.tokenizer.eos_id == 2
    targets = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), loaded.params)
    same(loaded.params, load_weights(llama, targets))


@pytest.mark.slow
def test_two_processes_convert_there_and_back(llama, tmp_path):
    python = [sys.executable, "-m"]
    command = [*python, "palign.cli.launch", "--processes=2", "--devices=2", "--", *python, "palign.cli.convert"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    for source, to in ((llama, tmp_path / "base"), (tmp_path / "base", tmp_path / "back")):
        told = [*command, f"--from={source}", f"--to={to}"]
        done = subprocess.run(told, cwd=HF.parents[2], env=environment, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
    found, wanted = tensors(epath.Path(tmp_path / "back")), tensors(llama)
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in wanted.items()}


def test_the_command_prints_a_table_or_one_line(llama, tmp_path, capsys):
    assert app.run(convert_command.main, [f"--from={llama}", f"--to={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out.split()
    assert out[:8] == "architecture tensors parameters MB seconds LlamaForCausalLM 21 1,336".split()
    assert app.run(convert_command.main, [f"--from={llama}", f"--to={tmp_path / 'out'}"]) == app.USER_ERROR
    assert capsys.readouterr().err.startswith(f"palign: error: --to={tmp_path / 'out'}: is there already")
