"""The report on data, against counts by hand of a set that has every defect."""

import json

import pytest

from palign.cli import app
from palign.cli import inspect as command
from palign.data.tokenizers import ByteTokenizer
from palign.recipes.inspect import inspect
from palign.train.prepare_once import prepare_once
from tests.recipes.tiny_runs import config


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def several(prompt, responses, scores):
    return {"prompt": prompt, "responses": responses, "scores": scores}


TRAIN = [
    pair("Ask: ", "a fine answer", "bad"),
    pair("Ask: ", "a fine answer", "bad"),  # the same record again
    pair("Ask: ", "short", "much longer"),  # its prompt again
    pair("Tell me ", "the very same but one!", "the very same but one?", source="x"),  # nearly the same
    several("List ", ["aa", "b", "cc"], [2, 2, 1]),  # two tie
    several("List more ", ["aa", "b"], [1, 1]),  # all tie
    pair("Same: ", "equal", "equal"),  # dropped: identical
    pair("Long " * 12, "x", "y"),  # dropped: prompt too long
    pair("Cut: ", "y" * 60, "no"),  # a response is cut
]
EVAL = [
    pair("Ask: ", "new", "old"),  # the prompt is trained on
    pair("tell  ME!", "new", "old"),  # but for case and marks
    pair("Other ", "new", "old"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    for name, rows in (("train", TRAIN), ("eval", EVAL)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ByteTokenizer().save(folder / "bytes")
    return folder


def of_bytes(place, **data):
    data = {"eval_fraction": 0.0, "max_length": 40, "row_length": 96, "trees_per_row": 2} | data
    return config(place / "train.jsonl", tokenizer={"path": str(place / "bytes")}, data=data)


@pytest.fixture(scope="module")
def report(place):
    return inspect(of_bytes(place, eval_paths={"test": str(place / "eval.jsonl")}), place / "page.html")


def figures(table):
    return {row.label: [cell.value for cell in row.cells] for row in table.rows}


def test_what_is_odd_is_counted(report):
    found = {label: (*cells[:2], cells[3]) for label, cells in figures(report.tables["Look at"]).items()}
    assert found == {
        "records that were there before": (1, 8, "train.jsonl:2"),
        "prompts that were there before": (2, 8, "train.jsonl:2"),
        "best and worst nearly the same": (1, 6, "train.jsonl:4"),
        "two responses of one score": (2, 7, "train.jsonl:5"),
        "all responses of one score": (1, 7, "train.jsonl:6"),
        "records dropped": (1, 8, "train.jsonl:8"),
        "responses cut": (1, 15, None),
        "prompts cut": (0, 7, None),
        "test: prompt is trained on": (1, 3, "eval.jsonl:1"),
        "test: prompt is, but for case and marks": (2, 3, "eval.jsonl:1"),
    }


def test_lengths_and_sharing_are_those_of_the_trees(report):
    """BOS and EOS are tokens; an example is the prompt once and all its responses."""
    kept = [row for row in TRAIN if row["prompt"] not in ("Same: ", "Long " * 12)]
    prompts = [len(row["prompt"]) + 1 for row in kept]
    responses = [
        [min(len(text) + 1, 40 - prompt) for text in row.get("responses") or (row["chosen"], row["rejected"])]
        for row, prompt in zip(kept, prompts, strict=True)
    ]
    # The seam: two responses that begin alike have their prompt end where the text of the prompt ends all the same.
    packed = sum(prompts) + sum(map(sum, responses))
    unshared = packed + sum(p * (len(r) - 1) for p, r in zip(prompts, responses, strict=True))
    sets = figures(report.tables["Sets"])["train"]
    assert sets[:4] == [7, 15, packed, sum(map(sum, responses))] and sets[4] == pytest.approx(unshared / packed)
    lengths = figures(report.tables["Lengths"])
    assert lengths["train: prompt"][0] == pytest.approx(sum(prompts) / 7)
    pairs = [r for r, row in zip(responses, kept, strict=True) if "chosen" in row]
    differences = [best - worst for best, worst in pairs] + [responses[4][0] - responses[4][2]]
    assert lengths["train: best minus worst"][0] == pytest.approx(sum(differences) / 6)
    halves = [(d > 0) + (d == 0) / 2 for d in differences]
    assert lengths["train: best is longer"][0] == pytest.approx(sum(halves) / 6)


def test_columns_and_counts_are_named(report):
    assert figures(report.tables["Columns"]) == {
        "prompt": ["text", 12], "chosen": ["text", 10], "rejected": ["text", 10], "source": ["text", 1],
        "responses": ["list of text", 2], "scores": ["list of number", 2],
    }  # fmt: skip
    read = figures(report.tables["Read"])
    assert read["identical"] == [1] and read["ignored column/source"] == [1] and read["rows"] == [12]
    assert report.facts["format"] == "preference, scored list"


def test_samples_are_the_tokens_and_what_is_learned_of_them(report):
    shown = {sample.title: sample.parts for sample in report.token_samples}
    assert len(shown) == 4
    for title, parts in shown.items():
        row = TRAIN[int(title.removeprefix("Example "))]
        prompt, *responses = parts.values()
        assert "".join(token.text for token in prompt) == f"<s>{row['prompt']}" and prompt[0].special
        assert not any(token.target for token in prompt)
        for text, tokens in zip(row.get("responses") or (row["chosen"], row["rejected"]), responses, strict=True):
            assert f"{text}</s>".startswith("".join(token.text for token in tokens))
            assert all(token.target for token in tokens)


def test_the_page_is_whole_and_escaped(place, report):
    page = (place / "page.html").read_text()
    assert "As the model sees them" in page and '<span class="target special">&lt;/s&gt;</span>' in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_bytes_of_a_character_are_shown_with_the_last_of_them(place, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(pair("é ", "ü", "€")))
    made = inspect(of_bytes(place, path=str(tmp_path / "d.jsonl")))
    (sample,) = made.token_samples
    assert ["".join(token.text for token in tokens) for tokens in sample.parts.values()] == [
        "<s>·é ", "·ü</s>", "··€</s>",
    ]  # fmt: skip


def test_data_that_do_not_fit_rows_are_shown_before_they_are_refused(place, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"config.data.row_length, .* 1 of 7 trees do not fit a row of 48 tokens"):
        inspect(of_bytes(place, row_length=48, block=16), tmp_path / "page.html")
    assert "two responses of one score" in capsys.readouterr().out and (tmp_path / "page.html").is_file()


def test_the_command_needs_no_config_and_says_what_to_inspect_of_prepared_data(place, tmp_path, capsys):
    settings = [f"--config.tokenizer.path={place / 'bytes'}", "--config.data.eval_fraction=0.0"]
    given = [f"--config.data.path={place / 'train.jsonl'}", f"--output={tmp_path / 'p.html'}"]
    assert app.run(command.main, [*settings, *given]) == 0
    assert "records that were there before" in capsys.readouterr().out and (tmp_path / "p.html").is_file()
    prepare_once(of_bytes(place), tmp_path / "prepared")
    assert app.run(command.main, [f"--config.data.path={tmp_path / 'prepared'}"]) == 2
    assert f"inspect what it was made from: {place / 'train.jsonl'}" in capsys.readouterr().err
