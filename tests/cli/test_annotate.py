"""The annotate command as a user meets it: the record as given, the numbers beside it, the filter, each slip a line."""

import gzip
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from palign.cli import annotate, app
from palign.data.pack import pack_row, row_shape, stack_rows
from palign.data.readers import read_records
from palign.data.tokenize import tokenize_record
from palign.data.tokenizers import train_sentencepiece
from palign.eval.score import as_dataset, sequence_logps
from palign.sharding.mesh import make_mesh
from palign.train import loop
from palign.train.sources import load_run
from tests.oracles import diagnostics as oracle
from tests.recipes.tiny_runs import config, one_device, write_pairs

LONG = "say " + "very " * 40 + ":"
RECORDS = [
    {"prompt": "say a pie :", "chosen": " good soup sings", "rejected": " bad", "note": "é", "weight": 1.50},
    {"prompt": "say a :", "responses": [" bad cat", " good dog runs", " the", " red"], "scores": [0.1, 0.9, 0.5, 0.1]},
    {"prompt": "say blue :", "completion": " good cold soup"},
    {"prompt": LONG, "chosen": " good", "rejected": " bad"},
    {"prompt": "say cat :", "chosen": " the same", "rejected": " the same"},
    {"prompt": "say dog :", "responses": [" good", " bad"], "scores": [0.5, 0.5]},
    {"prompt": "say bread :", "responses": [" bad red", " good but cold"], "rank": [2, 1]},
    {"prompt": "say soup :", "chosen": " good the pie sings", "rejected": " bad dog runs here and there"},
    {"prompt": LONG, "chosen": " good cat", "rejected": " bad cat"},
    {"prompt": "say here :", "chosen": " good cat sings", "rejected": " good cat sleeps"},
]  # fmt: skip
ANNOTATED = [0, 1, 6, 7, 9]
NAMES = "ches ches_normalised chosen_logp difficulty edit_distance lengths margin ranked_right rejected_logp".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with several checkpoints, and data of every kind."""
    place = tmp_path_factory.mktemp("annotate")
    write_pairs(place / "pairs.jsonl", 60, prompts=40)
    with one_device():
        loop.run(config(place / "pairs.jsonl", train={"keep": 3}), place / "run")
    lines = [json.dumps(record, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(RECORDS)]
    lines[6] = "\n" + lines[6].replace("}\n", " } \r\n")  # a blank line, and spaces where JSON allows them
    (place / "data.jsonl").write_bytes("".join(lines).encode())
    (place / "data.jsonl.gz").write_bytes(gzip.compress((place / "data.jsonl").read_bytes()))
    (place / "single.jsonl").write_text(json.dumps(RECORDS[2]) + "\n")
    (place / "old.jsonl").write_text(json.dumps(RECORDS[0] | {"annotations": None}) + "\n")
    return place


def call(capsys, place, *arguments, data="data.jsonl", out="out.jsonl", run="run"):
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    given = [f"--workdir={place}/{run}", f"--data={place}/{data}", f"--out={place}/{out}", *arguments]
    code = app.run(annotate.main, [argument.replace("{place}", str(place)) for argument in given])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(place):
    """The lines that the command writes, with the last checkpoint against an earlier one."""
    given = [f"--workdir={place}/run", f"--reference={place}/run@4", f"--data={place}/data.jsonl"]
    assert app.run(annotate.main, [*given, f"--out={place}/deep/out.jsonl"]) == 0
    return lines_of(place / "deep" / "out.jsonl")


def test_every_record_is_written_as_it_was_given_and_in_its_place(written, place):
    assert [{k: v for k, v in line.items() if k != "annotations"} for line in written] == RECORDS
    given = [line for line in (place / "data.jsonl").read_bytes().splitlines() if line.strip()]
    for old, new in zip(given, (place / "deep" / "out.jsonl").read_bytes().splitlines(), strict=True):
        assert new.startswith(old.rstrip()[:-1].rstrip() + b', "annotations": ')  # the same bytes: 1.5 and \u00e9 too
    assert [i for i, line in enumerate(written) if line["annotations"] is not None] == ANNOTATED
    assert all(sorted(written[i]["annotations"]) == sorted([*NAMES, "reward_margin"]) for i in ANNOTATED)


def expected_numbers(place, name):
    """Log-probabilities, lengths and both scores of best and worst, each response alone in a row, CHES in float64."""
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    run = load_run(f"{place}/{name}", mesh=mesh)
    kept = [r for r in read_records(place / "data.jsonl")[0] if max(r.scores) > min(r.scores) and r.prompt != LONG]
    trees = [tokenize_record(record, run.tokenizer) for record in kept]
    best_worst = [[int(np.argmax(tree.scores)), int(np.argmin(tree.scores))] for tree in trees]
    all_logps = sequence_logps(run.lm, run.params, as_dataset(trees, row_length=64, rows_per_step=2), mesh)
    pairs = [[t._replace(responses=(t.responses[k],), scores=(0.0,)) for k in ks] for t, ks in zip(trees, best_worst)]  # noqa: B905
    shape = row_shape(32, trees=1, responses=1, block=32)
    rows = stack_rows([pack_row([tree], shape, "best_worst", "packed", seed=0) for pair in pairs for tree in pair])
    states = iter(np.asarray(jax.jit(run.lm.hidden)(run.params, rows), np.float64))
    found = []
    for logps, ks, pair in zip(all_logps, best_worst, pairs, strict=True):
        lengths = [tree.responses[0].size for tree in pair]
        sums = [oracle.summed_states(next(states), tree.prompt.size, tree.responses[0].size) for tree in pair]
        distance = oracle.edit_distance(*(tuple(tree.responses[0].tolist()) for tree in pair)) / max(lengths)
        scores = oracle.ches([sums])[0], oracle.length_normalised_ches([sums], [lengths])[0]
        found.append((logps[ks[0]], logps[ks[1]], lengths, *scores, distance))
    return found


def test_the_numbers_are_those_of_each_response_alone(written, place):
    found = [written[i]["annotations"] for i in ANNOTATED]
    ours, theirs = expected_numbers(place, "run"), expected_numbers(place, "run@4")
    assert [f["lengths"] for f in found] == [numbers[2] for numbers in ours]
    assert found[1]["lengths"] == [4, 3]  # of the list: number 2 is best, number 1 the first of the worst
    for line, (chosen, rejected, _, ches, normalised, distance), reference in zip(found, ours, theirs, strict=True):
        assert line["chosen_logp"] == pytest.approx(chosen, rel=1e-5)
        assert line["rejected_logp"] == pytest.approx(rejected, rel=1e-5)
        assert line["margin"] == pytest.approx(chosen - rejected, abs=1e-4)
        assert line["ranked_right"] == (chosen >= rejected)
        assert line["difficulty"] == pytest.approx(reference[1] - reference[0], abs=1e-4)
        assert line["reward_margin"] == pytest.approx((chosen - rejected) - (reference[0] - reference[1]), abs=1e-4)
        assert line["ches"] == pytest.approx(ches, rel=1e-3, abs=1e-3)
        assert line["ches_normalised"] == pytest.approx(normalised, rel=1e-3, abs=1e-4)
        assert line["edit_distance"] == pytest.approx(distance, abs=1e-6)
    assert len({line["ranked_right"] for line in found}) == 2 and all(line["reward_margin"] for line in found)


def test_numbers_of_many_rows_and_steps_come_back_to_their_records(place, capsys):
    code, _, err = call(capsys, place, data="pairs.jsonl", out="many.jsonl")
    assert code == 0, err
    run, mesh = load_run(f"{place}/run"), make_mesh(data=1, devices=jax.devices()[:1])
    trees = [tokenize_record(record, run.tokenizer) for record in read_records(place / "pairs.jsonl")[0]]
    dataset = as_dataset(trees, row_length=64, rows_per_step=2)
    assert dataset.num_steps > 2
    for line, tree, logps in zip(
        lines_of(place / "many.jsonl"), trees, sequence_logps(run.lm, run.params, dataset, mesh), strict=True
    ):
        found = line["annotations"]
        assert [found["chosen_logp"], found["rejected_logp"]] == pytest.approx(logps, rel=1e-5)
        assert found["lengths"] == [response.size for response in tree.responses]


def test_without_a_reference_difficulty_is_the_run_s_own_and_there_is_no_reward(written, place, capsys):
    code, out, err = call(capsys, place, data="data.jsonl.gz")
    assert code == 0, err
    plain = lines_of(place / "out.jsonl")
    assert [line["annotations"] is None for line in plain] == [line["annotations"] is None for line in written]
    for i in ANNOTATED:
        found = plain[i]["annotations"]
        assert sorted(found) == sorted(NAMES)
        assert (
            found["difficulty"]
            == pytest.approx(-found["margin"])
            != pytest.approx(written[i]["annotations"]["difficulty"])
        )
        assert found["ches"] == written[i]["annotations"]["ches"]
    assert all(name in out for name in NAMES if name != "lengths") and "reward_margin" not in out


def test_what_is_left_out_is_counted_and_listed(place, capsys):
    code, _, err = call(capsys, place)
    assert code == 0
    assert f"{place}/out.jsonl: 10 records, 5 annotated, 3 without a preference, 2 dropped (prompt too long 2)" in err
    assert f"{place}/data.jsonl: dropped lines 4, 10\n" in err  # the blank line is a line
    assert "annotate: " in err and "tok/s" in err
    assert "idealised ranking accuracy of DPO (beta 0.01 to 10): " in err


def test_the_filter_keeps_whole_records_between_quantiles_as_they_were_given(written, place, capsys):
    arguments = ("--keep_quantile=ches_normalised:0:0.75", "--filtered={place}/kept.jsonl")
    code, _, err = call(capsys, place, *arguments)
    assert code == 0, err
    values = {i: written[i]["annotations"]["ches_normalised"] for i in ANNOTATED}
    kept = sorted(sorted(values, key=values.__getitem__)[:4])
    assert lines_of(place / "kept.jsonl") == [RECORDS[i] for i in kept]
    given = [line.strip() for line in (place / "data.jsonl").read_bytes().splitlines() if line.strip()]
    assert (place / "kept.jsonl").read_bytes().splitlines() == [given[i] for i in kept]
    assert f"{place}/kept.jsonl: 4 kept (ches_normalised from " in err
    assert "1 dropped, 5 without a value left out" in err
    assert len(read_records(place / "kept.jsonl")[0]) == 4
    assert not list(place.glob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        (["--keep_quantile=ches:0:0.9"], {}, "--filtered where: give both or neither"),
        (["--filtered={place}/k.jsonl"], {}, "--filtered where: give both or neither"),
        (
            ["--keep_quantile=ches:0", "--filtered={place}/k.jsonl"],
            {},
            "--keep_quantile=ches:0: 'ches:0': expected NAME:",
        ),
        (["--keep_quantile=ches:1:0", "--filtered={place}/k.jsonl"], {}, "expected 0 <= low < high <= 1"),
        (["--keep_quantile=chess:0:1", "--filtered={place}/k.jsonl"], {}, "'chess' is none of ches, ches_normalised, "),
        (["--keep_quantile=reward_margin:0:1", "--filtered={place}/k.jsonl"], {}, "'reward_margin' needs --reference"),
        (["--keep_quantile=ches:0:1", "--filtered={place}/new.jsonl"], {"out": "new.jsonl"}, "new.jsonl: is read or"),
        ([], {"out": "data.jsonl"}, "data.jsonl: is read or written already"),
        ([], {"out": "x.csv"}, "x.csv: expected a file named *.jsonl to write to"),
        ([], {"data": "dta.jsonl"}, "dta.jsonl: there is no such file; did you mean 'data.jsonl"),
        (
            [],
            {"data": "data.parquet"},
            "data.parquet: annotations are written into lines; expected a file",
        ),
        ([], {"data": "old.jsonl"}, "old.jsonl: has a column 'annotations' already"),
        ([], {"data": "single.jsonl"}, "single.jsonl: no record has two responses of different scores"),
        ([], {"run": "rn"}, "rn: not the workdir of a run"),
        ([], {"run": "run@99"}, "@99: no such checkpoint"),
        (["--reference={place}/nothing"], {}, "nothing: not the workdir of a run"),
        (["--refrence=x"], {}, "unrecognized arguments: --refrence=x"),
    ],
)
def test_a_slip_is_one_line_and_exit_code_2_and_nothing_is_written(arguments, given, expected, place, capsys):
    before = {path.name for path in place.iterdir()}
    code, out, err = call(capsys, place, *arguments, **({"out": "never.jsonl"} | given))
    errors = [line for line in err.splitlines() if line.startswith("palign: error:")]
    assert (code, out, len(errors)) == (app.USER_ERROR, "", 1), err
    assert expected in errors[0] and "Traceback" not in err
    assert {path.name for path in place.iterdir()} == before


def test_a_filter_that_keeps_nothing_is_refused(place, capsys):
    arguments = ("--keep_quantile=ches:0.4:0.45", "--filtered={place}/none.jsonl")
    code, _, err = call(capsys, place, *arguments)
    assert code == app.USER_ERROR and "keeps no record; widen it" in err
    assert not (place / "none.jsonl").exists()


def test_a_reference_with_another_tokenizer_is_refused(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "other")
    train_sentencepiece(["good bad and other words"] * 9, vocab_size=64, model_type="word").save(tmp_path / "other")
    code, _, err = call(capsys, place, f"--reference={tmp_path}/other", out="never.jsonl")
    assert code == app.USER_ERROR and "was trained with another tokenizer" in err, err


def test_a_pair_longer_than_the_run_s_rows_is_measured_all_the_same(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    settings["data"]["row_length"] = 32
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    long = {"prompt": "say :", "chosen": " good" * 28, "rejected": " bad" * 28}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    code, _, err = call(capsys, tmp_path, data="long.jsonl")
    assert code == 0, err
    assert lines_of(tmp_path / "out.jsonl")[0]["annotations"]["lengths"] == [29, 29]


def test_help_is_shown_without_importing_jax():
    code = (
        "import sys\nfrom palign.cli import annotate, app\n"
        "try:\n    app.run(annotate.main, ['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "loaded = {'jax', 'flax', 'orbax', 'grain', 'numpy'} & set(sys.modules)\nassert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: palign.cli.annotate" in done.stdout and "--keep_quantile NAME:LOW:HIGH" in done.stdout
