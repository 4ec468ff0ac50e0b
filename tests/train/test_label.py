"""Lists from a model: responses given or sampled, scored by a function or a reward model, however often killed."""

import json
import sys

import jax
import numpy as np
import pytest

from palign.cli import app
from palign.cli import label as command
from palign.data.readers import read_records
from palign.data.tokenize import TokenTree
from palign.generate.texts import Generation
from palign.sharding.mesh import make_mesh
from palign.train import convert as convert_module
from palign.train import label as label_module
from palign.train.label import Sampling, label
from palign.train.scorers import rewards
from palign.train.sources import load_run
from tests.models.test_hf import EXPECTED
from tests.train.test_convert import hugging_face

pytestmark = pytest.mark.usefixtures("single")
SAID = {"role": "user", "content": "say a pie"}
GIVEN = [
    {"prompt": "say a :", "responses": [" bad cat", " dog", " bad cat"], "scores": [0, 0, 0]},
    {"prompt": [SAID], "chosen": [{"role": "assistant", "content": "pie"}],
     "rejected": [{"role": "assistant", "content": "no é"}]},
    {"prompt": "say blue :", "completion": " good"},
]  # fmt: skip
SAMPLING = Sampling(samples=3, max_new_tokens=4, seed=2)


@pytest.fixture
def judges(tmp_path, monkeypatch):
    """A module of scorers."""
    (tmp_path / "judges.py").write_text(
        "def length(prompt, response):\n"
        "    return len(response) if isinstance(response, str) else len(response[0]['content']) + 0.5\n"
        "def shouts(prompt, response):\n    raise KeyError('of\\nits own')\n"
        "def vague(prompt, response):\n    return float('nan')\n"
        "ten = 10\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("judges", "broken"):
        sys.modules.pop(name, None)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_given_responses_are_scored_by_a_function_and_conversations_stay_messages(judges, capsys):
    write(judges / "given.jsonl", GIVEN)
    arguments = [f"--input={judges}/given.jsonl", f"--output={judges}/out.jsonl", "--scorer=judges:length"]
    assert app.run(command.main, arguments) == 0
    pie, no = GIVEN[1]["chosen"], GIVEN[1]["rejected"]
    assert lines_of(judges / "out.jsonl") == [
        {"prompt": "say a :", "responses": [" bad cat", " dog"], "scores": [8.0, 4.0]},
        {"prompt": [SAID], "responses": [pie, no], "scores": [3.5, 4.5]},
        {"prompt": "say blue :", "responses": [" good"], "scores": [5.0]},
    ]
    said = capsys.readouterr().err
    assert "out.jsonl: 3 prompts, 5 responses, 1 without a preference, 1 alike" in said and "label: 3/3 in" in said
    records, counts = read_records(judges / "out.jsonl")
    assert [record.scores for record in records] == [(8.0, 4.0), (3.5, 4.5), (5.0,)]
    assert not (judges / "out.jsonl.parts").exists() and counts["responses"] == 5


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_file(judges, sft, capsys, monkeypatch):
    prompts = write(judges / "prompts.jsonl", [{"prompt": f"say {word} :"} for word in "a pie dog red warm".split()])
    settings = dict(scorer="judges:length", responses_from=str(sft), sampling=SAMPLING, batch_size=2)
    counts = label(prompts, judges / "whole.jsonl", **settings)
    batches, batch = [], label_module._label_batch

    def killed_in_the_second(rows, first, *rest):
        batches.append(first)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return batch(rows, first, *rest)

    monkeypatch.setattr(label_module, "_label_batch", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        label(prompts, judges / "again.jsonl", **settings)
    assert not (judges / "again.jsonl").exists()
    refused = r"again.jsonl.parts: was begun with another temperature \(1.0 then, 0.5 now\); take the old one back, or"
    with pytest.raises(ValueError, match=refused):
        label(prompts, judges / "again.jsonl", **settings | {"sampling": SAMPLING._replace(temperature=0.5)})
    judged = (judges / "judges.py").read_text()
    (judges / "judges.py").write_text(judged + "# another\n")
    with pytest.raises(ValueError, match=r"again.jsonl.parts: was begun with another scorer; take the old one back"):
        label(prompts, judges / "again.jsonl", **settings)
    (judges / "judges.py").write_text(judged)
    capsys.readouterr()
    assert label(prompts, judges / "again.jsonl", **settings) == counts
    assert batches == [0, 2, 2, 4] and "goes on, 1 of 3 parts are there" in capsys.readouterr().err
    assert (judges / "again.jsonl").read_bytes() == (judges / "whole.jsonl").read_bytes()
    rows = lines_of(judges / "whole.jsonl")
    assert counts["prompts"] == len(rows) == 5 - counts["unanswered"]
    assert counts["responses"] == sum(len(row["responses"]) for row in rows) > 5
    assert counts["responses"] + counts["alike"] + counts["blank"] == 5 * SAMPLING.samples
    assert all(row["scores"] == [len(text) for text in row["responses"]] for row in rows)
    assert len({json.dumps(row["responses"]) for row in rows}) == 5  # every batch has draws of its own


def test_a_scorer_that_failed_at_once_can_be_mended(judges, capsys, monkeypatch):
    monkeypatch.chdir(judges)
    given = write(judges / "given.jsonl", GIVEN)
    with pytest.raises(ValueError, match="the score of response 1"):
        label(given, judges / "out.jsonl", scorer="judges:vague")
    assert label(given, judges / "out.jsonl", scorer="judges:length")["prompts"] == 3


def test_samples_that_no_data_file_may_hold_are_left_out_and_counted(judges, sft, monkeypatch):
    drawn = {"one": ["", " \n", "a\0b"], "two": ["yes", "yes", "no"]}

    def generate(lm, params, tokenizer, prompts, **settings):
        return [[Generation(text, np.zeros(1), 0.0, text != "no") for text in drawn[prompt]] for prompt in prompts]

    monkeypatch.setattr(label_module, "generate", generate)
    write(judges / "prompts.jsonl", [{"prompt": name} for name in drawn])
    counts = label(judges / "prompts.jsonl", judges / "out.jsonl", scorer="judges:length", responses_from=str(sft))
    assert lines_of(judges / "out.jsonl") == [{"prompt": "two", "responses": ["yes", "no"], "scores": [3.0, 2.0]}]
    assert counts == {
        "prompts": 1,
        "responses": 2,
        "alike": 1,
        "unanswered": 1,
        "blank": 2,
        "unusable": 1,
        "unfinished": 1,
    }


@pytest.mark.parametrize("name", ["llama_reward", "qwen3_reward"])
def test_a_reward_model_s_scores_are_those_of_transformers_at_the_last_token(name, tmp_path):
    """`expected.npz` has what the head of `*ForSequenceClassification` says at every position."""
    place, mesh = hugging_face(name, tmp_path / name), make_mesh(data=1, devices=jax.devices()[:1])
    token, values = EXPECTED["token"].astype(np.int32), EXPECTED[name][..., 0]
    ends = [(5, (9, 16)), (2, (3, 4, 11)), (7, (8,))]
    trees = [
        TokenTree(token[i % 2, :start], tuple(token[i % 2, start:end] for end in last), (0.0,) * len(last), i)
        for i, (start, last) in enumerate(ends)
    ]
    found = rewards(load_run(str(place), mesh=mesh), trees, mesh)
    expected = [[values[i % 2, end - 1] for end in last] for i, (_, last) in enumerate(ends)]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_reward_model_scores_texts_by_its_own_tokenizer_from_either_kind_of_directory(tmp_path, monkeypatch):
    place, mesh = hugging_face("llama_reward", tmp_path / "reward"), make_mesh(data=1, devices=jax.devices()[:1])
    monkeypatch.setattr(convert_module, "make_mesh", lambda **_: mesh)
    convert_module.convert(str(place), str(tmp_path / "run"))
    write(tmp_path / "given.jsonl", [GIVEN[0], GIVEN[2]])
    for name, model in (("out", place), ("of_the_run", tmp_path / "run")):
        label(tmp_path / "given.jsonl", tmp_path / f"{name}.jsonl", reward_model=str(model))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "of_the_run.jsonl").read_bytes()
    loaded = load_run(str(place), mesh=mesh)
    ids = [[*loaded.tokenizer.encode("say a :" + text), 2] for text in (" bad cat", " dog")]  # no BOS: it has none
    start, *responses = (np.asarray(one, np.int32) for one in (ids[0][:3], ids[0][3:], ids[1][3:]))
    expected = rewards(loaded, [TokenTree(start, tuple(responses), (0.0, 0.0), 0)], mesh)[0]
    assert lines_of(tmp_path / "out.jsonl")[0]["scores"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give --scorer=module:function or --reward_model=DIR: one of them scores"),
        (["--scorer=judges"], "--scorer=judges: expected module:function, such as judges:length"),
        (["--scorer=judges:ten"], "--scorer=judges:ten: the module judges has no function 'ten'"),
        (["--scorer=broken:x"], "--scorer=broken:x: broken cannot be imported: ModuleNotFoundError: No module named"),
        (["--scorer=judges:shouts"], "given.jsonl:1: response 1, by --scorer=judges:shouts: KeyError: 'of\\nits own'"),
        (["--scorer=judges:vague"], "given.jsonl:1: the score of response 1, by --scorer=judges:vague, is float nan"),
        (["--scorer=judges:length", "--top_k=3"], "--top_k has no effect without --responses_from, the model to"),
        (["--scorer=judges:length", "--batch_size=0"], "--batch_size=0: expected 1 or more"),
        (["--scorer=judges:length", "--input=alone.jsonl"], "alone.jsonl: has prompts alone; name the model that"),
        (["--scorer=judges:length", "--input=text.jsonl"], "text.jsonl:1: a text without a prompt; lists are of"),
        (["--scorer=judges:length", "--output=given.jsonl"], "--output=given.jsonl: is what is read; name another"),
        (["--scorer=judges:length", "--output=text.jsonl"], "--output=text.jsonl: is there already; remove it, or"),
        (["--scorer=judges:length", "--output=o.json"], "--output=o.json: expected a file named *.jsonl"),
        (["--reward_model={sft}"], "its model has no values; expected one, a reward: a run with config.model.value"),
    ],
)  # fmt: skip
def test_each_slip_is_one_line_and_exit_code_2(arguments, expected, judges, sft, capsys, monkeypatch):
    monkeypatch.chdir(judges)
    write(judges / "given.jsonl", GIVEN)
    write(judges / "alone.jsonl", [{"prompt": "say"}])
    write(judges / "text.jsonl", [{"text": "a text"}])
    given = ["--input=given.jsonl", "--output=out.jsonl", *(a.replace("{sft}", str(sft)) for a in arguments)]
    assert app.run(command.main, given) == 2
    said = capsys.readouterr().err
    assert expected in said.splitlines()[-1] and "Traceback" not in said
    assert not (judges / "out.jsonl").exists()
