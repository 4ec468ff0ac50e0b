"""The study's jobs: order and configs, what a stopped study goes on with, and (slowly) all of it at its smallest."""

import json
import pathlib

import numpy as np
import pytest

from palign.config.load import load_plain, resolve_as, resolve_run, to_plain
from palign.recipes import study as recipe
from palign.recipes.study import RESULT, Bench, run_study
from palign.recipes.study_config import MethodConfig, StudyConfig, job_config, list_jobs, sft_config
from palign.recipes.study_data import data_path, write_data
from palign.recipes.study_measures import Result
from palign.recipes.study_report import write
from palign.train.build import check_config
from palign.train.loop import TrainingDivergedError
from tests.recipes.study_runs import PROMPTS, method, result, study
from tests.recipes.test_quickstart import FETCHES
from tests.recipes.tiny_runs import one_device

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "study.py")


def load(size, **more):
    """A size of the repository's study."""
    return resolve_as(StudyConfig, load_plain(f"{CONFIG}:{size}") | more)


def test_the_middle_of_a_grid_comes_first_and_then_one_setting_is_varied_at_a_time():
    given = method(grid={"learning_rate": (0.1, 0.2, 0.4), "beta": (1.0, 2.0, 3.0)})
    middle = {"learning_rate": 0.2, "beta": 2.0}
    changes = [{"learning_rate": 0.1}, {"learning_rate": 0.4}, {"beta": 1.0}, {"beta": 3.0}]
    assert list(given.settings()) == [middle, *(middle | change for change in changes)]


def test_early_methods_come_before_late_ones_and_middles_before_the_rest_of_the_grids():
    names = [job.name for job in list_jobs(study(first=("ipo",), seeds=(0, 1)))]
    early = ["01-sft", "03-dpo", "03-reverse", "04-ipo"]
    assert names == [
        *(f"seed-{seed}/{folder}" for seed in (0, 1) for folder in early),
        "seed-0/04-simpo", "seed-1/04-simpo",
        *(f"seed-{seed}/05-dpo-beta-{beta}" for beta in (0.25, 1) for seed in (0, 1)),
    ]  # fmt: skip


def test_a_run_comes_after_all_that_it_reads_and_has_a_folder_of_its_own():
    jobs = list_jobs(load("full"))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for job in jobs:
        read = [f"seed-{job.seed}/{folder}" for folder in ("01-sft", "03-dpo", "03-reverse")]
        if not job.name.startswith(tuple(read)):
            assert all(names.index(name) < names.index(job.name) for name in read)


def test_the_small_studys_jobs_are_the_first_of_the_full_one():
    small, full = (list_jobs(load(size)) for size in ("small", "full"))
    assert full[: len(small)] == small


@pytest.mark.parametrize("size", ["small", "full", "smoke"])
def test_every_job_of_every_size_is_a_config_that_training_takes(size, tmp_path):
    config = load(size)
    for job in list_jobs(config):
        plain = sft_config(config, job, "x.jsonl") if job.method == "sft" else job_config(config, job, "x.jsonl")
        run = resolve_run(plain)
        check_config(run)
        assert resolve_run(json.loads(json.dumps(to_plain(run)))) == run
        assert run.train.seed == run.data.seed == job.seed
        assert run.optimizer.learning_rate == job.setting["learning_rate"]


def test_the_full_study_has_every_method_that_it_is_asked_for():
    losses = {m.loss for m in load("full").methods.values() if not m.rollout_every}
    assert losses == {
        "sft", "dpo", "cdpo", "ipo", "simpo", "ln_dpo", "hinge", "plackett_luce", "lipo_lambda", "kto", "bco_pair",
        "bco", "rpo", "aligndistil", "aligndistil_theorem1", "aligndistil_contrastive", "aligndistil_constant",
    }  # fmt: skip
    assert {m.loss for m in load("full").methods.values() if m.rollout_every} == {
        "aligndistil", "aligndistil_theorem1", "aligndistil_contrastive"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"ipo": method("ipo")}}, "config.methods: has no 'dpo'"),
        ({"methods": {"dpo": method(), "a": method("aligndistil")}}, "config.methods.a: reads reverse"),
        ({"first": ("kto",)}, "config.first: kto not in config.methods"),
        ({"seeds": (1, 1)}, r"config.seeds = \(1, 1\): expected one seed or more, all different"),
        ({"steps": 0}, "config.steps = 0: expected 1 or more"),
        ({"checkpoints": 3}, "config.checkpoints = 3: expected a divisor of steps = 20"),
        ({"ches_keep": 1.0}, "config.ches_keep = 1.0: expected a share between 0 and 1"),
    ],
)
def test_a_slip_in_a_study_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        study(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dop"}, "'dop' is not a method"),
        ({"data": "pears"}, "data = 'pears' of x: expected one of pairs"),
        ({"grid": {"beta": (0.1,)}}, "x has no learning_rate in its grid"),
        ({"grid": {"learning_rate": (0.1, 0.2)}}, "expected an odd number of different values"),
        ({"grid": {"learning_rate": (0.1, 0.1, 0.2)}}, "expected an odd number of different values"),
    ],
)
def test_a_slip_in_a_method_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**{"label": "x", "loss": "dpo", "grid": {"learning_rate": (1.0,)}} | change)


def test_an_unknown_size_or_setting_is_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match="expected small, full or smoke"):
        load("medium")
    with pytest.raises(ValueError, match=r"config.step: no such setting \(did you mean 'steps'\?\)"):
        load("small", step=3)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A study whose runs are only noted: the noted jobs, and a function that runs it."""
    ran, clock = [], [0.0]

    def train(config, place):
        clock[0] += 60.0
        ran.append(str(place.relative_to(tmp_path)))
        (place / "checkpoints" / "10").mkdir(parents=True)
        (place / "checkpoints" / "20").mkdir()
        (place / "config.json").write_text(json.dumps(to_plain(config)))
        if "diverges" in place.name:
            raise TrainingDivergedError("not finite at step 3")
        (place / "finished.json").write_text("{}")

    monkeypatch.setattr(recipe, "run", train)
    monkeypatch.setattr(recipe, "_write_data", lambda bench, job: None)
    monkeypatch.setattr(recipe, "_measure", lambda bench, job: result(float(job.seed)))
    monkeypatch.setattr(recipe.time, "monotonic", lambda: clock[0])
    return ran, lambda config, **more: run_study(config, tmp_path, **more)


def test_a_study_that_was_stopped_goes_on_and_leaves_finished_jobs_untouched(bench, tmp_path, capsys):
    ran, run = bench
    config = study(first=("ipo",), seeds=(0,))
    names = [job.name for job in list_jobs(config)]
    entries = run(config, minutes=3.5)  # a minute each, and none is begun that would end later
    assert ran == names[:3] == [entry.job.name for entry in entries]
    assert f"{len(names) - 3} jobs are left, the same command goes on" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert [entry.job.name for entry in run(config)] == names
    assert ran == names
    assert {path: path.stat().st_mtime_ns for path in before} == before
    run(config)
    assert ran == names


def test_a_larger_study_takes_over_the_jobs_of_a_smaller_one(bench):
    ran, run = bench
    small = study({name: study().methods[name] for name in ("dpo", "reverse", "ipo")}, first=("ipo",), seeds=(0,))
    run(small)
    done = list(ran)
    run(study(first=("ipo",), seeds=(0,)))
    assert set(ran[len(done) :]) == {"seed-0/04-simpo"} and len(ran) == len(set(ran))


def test_only_the_last_checkpoint_of_a_measured_run_is_kept(bench, tmp_path):
    _, run = bench
    run(study(seeds=(0,)), minutes=1)
    assert [path.name for path in (tmp_path / "seed-0" / "01-sft" / "checkpoints").iterdir()] == ["20"]


def test_a_run_that_diverges_is_a_result_and_the_study_goes_on(bench, tmp_path):
    _, run = bench
    entries = run(study({"dpo": method(), "diverges": method("ipo"), "simpo": method("simpo")}, seeds=(0,)))
    assert [entry.result is None for entry in entries] == [False, False, True, False]
    assert json.loads((tmp_path / "seed-0" / "04-diverges" / RESULT).read_text())["result"] is None


def test_results_are_read_back_as_they_were_measured(bench, tmp_path):
    _, run = bench
    (entry, *_) = run(study(seeds=(3,)), minutes=1)
    assert entry.result == result(3.0) and isinstance(entry.result, Result)
    assert entry.train_seconds == 60.0


def test_a_job_of_another_config_or_of_other_prompts_is_refused(bench, tmp_path):
    _, run = bench
    run(study(seeds=(0,)))
    with pytest.raises(ValueError, match=r"03-dpo: began with another config"):
        run(study(seeds=(0,), steps=10, checkpoints=1))
    with pytest.raises(ValueError, match=f"config.test_prompts = 5: seed-0/01-sft was measured on {PROMPTS}"):
        run(study(seeds=(0,), test_prompts=5))


@pytest.mark.slow
def test_the_study_runs_from_end_to_end_and_a_second_time_trains_nothing(tmp_path, capsys):
    config = load("smoke", sft_steps=40)
    with one_device():
        entries = run_study(config, tmp_path)
        page = write(config, tmp_path, entries, "python -m palign.cli.study")
    printed = capsys.readouterr().out
    assert len(entries) == len(list_jobs(config)) and all(entry.result for entry in entries)
    for label in ("SFT", "DPO", "LiPO-λ", "AlignDistil"):
        assert label in printed
    assert FETCHES.findall(page.read_text()) == []
    found = {entry.job.folder: entry.result for entry in entries if entry.job.seed == 0}
    sft, reverse = found["01-sft"], found["03-reverse"]
    assert (sft.rewards, sft.chosen_change, len(sft.curve)) == (None, 0.0, 1)
    np.testing.assert_allclose(sft.kl, 0.0, atol=1e-4)  # a sum over the tokens of a response, each an ulp or two
    assert reverse.contrastive is not None and found["03-dpo"].idealised is not None
    assert [point.step for point in found["03-dpo"].curve] == [0, 2, 4] and found["03-dpo"].kl > 0
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    with one_device():
        assert run_study(config, tmp_path) == entries
    assert {p: p.stat().st_mtime_ns for p in files} == files


@pytest.mark.slow
def test_the_data_of_all_methods_follows_from_one_set_of_samples(tmp_path):
    config = load("smoke", seeds=(0,))
    with one_device():
        run_study(config, tmp_path, minutes=1e-9)
        bench = Bench(config, tmp_path)
        if not bench.is_finished(list_jobs(config)[0]):
            recipe.run_job(bench, list_jobs(config)[0])
        place, sft = bench.data(0), bench.source(0, "sft")
        read = {}
        fours = ((data, 4) for data in ("lists", "pairs", "thumbs", "ches", "random"))
        for data, responses in (("lists", 2), ("lists", 8), *fours):
            wanted = method(data=data, responses=responses)
            write_data(config, wanted, place, sft, 0)
            path = data_path(wanted, place)
            read[data, responses] = [json.loads(line) for line in path.read_text().splitlines()]
    four = read["lists", 4]
    for short, long in ((2, 4), (4, 8)):
        for a, b in zip(read["lists", short], read["lists", long], strict=True):
            assert a["prompt"] == b["prompt"] and a["responses"] == b["responses"][:short]
    for ranked, pair in zip(four, read["pairs", 4], strict=True):
        scores = dict(zip(ranked["responses"], ranked["scores"], strict=True))
        assert (scores[pair["chosen"]], scores[pair["rejected"]]) == (max(scores.values()), min(scores.values()))
    glad = {True: [], False: []}
    for record in read["thumbs", 4]:
        glad[record["label"]].append(record["prompt"].split()[1] in ("happy", "calm"))
    assert np.mean(glad[True]) > np.mean(glad[False])
    assert len(read["ches", 4]) == len(read["random", 4]) < len(four)
    pairs = [json.dumps(pair) for pair in read["pairs", 4]]
    assert {json.dumps(p) for p in (*read["ches", 4], *read["random", 4])} <= set(pairs)
