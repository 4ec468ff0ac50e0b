"""The study's table, page, pictures and numbers, from made-up results."""

import json

import pytest

from palign.recipes.study_config import list_jobs
from palign.recipes.study_measures import Rewards
from palign.recipes.study_report import write
from palign.recipes.study_summary import Entry
from tests.recipes.study_runs import result, study
from tests.recipes.test_quickstart import FETCHES


def make(job):
    gold = {"sft": 0.25, "dpo": 1.5, "reverse": -1.0}.get(job.method, 1.25) + 0.125 * job.seed
    more = {"rewards": None, "curve": result(gold).curve[:1]} if job.method == "sft" else {}
    more |= {"contrastive": Rewards(0.75, 0.875, 0.5)} if job.method == "reverse" else {}
    return result(gold, **more)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that a report was written into."""
    place = tmp_path_factory.mktemp("report")
    config = study(seeds=(0, 1))
    write(config, place, [Entry(job, make(job), 2.0, 1.0) for job in list_jobs(config)], "the command")
    return place


def test_the_numbers_name_command_seeds_versions_and_every_method(written):
    found = json.loads((written / "study.json").read_text())
    assert found["facts"]["command"] == "the command" and found["facts"]["seeds"] == [0, 1]
    assert "jax " in found["facts"]["versions"] and found["facts"]["jobs"] == "14 of 14"
    assert [line["label"] for line in found["lines"]] == ["SFT", "IPO", "DPO", "SIMPO"]
    dpo = found["lines"][2]
    assert dpo["gold"]["mean"] == 1.5625 and dpo["gold"]["n"] == 2 and dpo["settings"] == 3
    assert len(found["claims"]) == 8


def test_the_page_holds_table_claims_and_pictures_and_fetches_nothing(written):
    page = (written / "study.html").read_text()
    assert FETCHES.findall(page) == []
    for text in ("SFT", "DPO", "IPO", "true token credit", "steps to 90%", "not measured", "Gold reward against KL"):
        assert text in page
    assert page.count("<svg") == 1 + 1 + 4  # frontier, a panel of curves, four of bars


def test_every_picture_is_a_file_of_its_own_that_the_markdown_shows(written):
    text = (written / "study.md").read_text()
    pictures = sorted(path.name for path in written.glob("*.svg"))
    assert pictures and all(f"]({name})" in text for name in pictures)
    assert all((written / name).read_text().startswith("<svg width=") for name in pictures)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 6


def test_a_study_of_one_seed_is_written_without_intervals(tmp_path, capsys):
    config = study(seeds=(0,))
    write(config, tmp_path, [Entry(job, make(job), 2.0, 1.0) for job in list_jobs(config)], "")
    assert "[" not in (tmp_path / "study.md").read_text().partition("| method |")[2].partition("Means over")[0]
    assert json.loads((tmp_path / "study.json").read_text())["lines"][0]["gold"]["low"] is None
    assert "undecided" in capsys.readouterr().out


def test_a_study_that_has_only_begun_is_written_too(tmp_path):
    config = study()
    first, *_ = list_jobs(config)
    assert write(config, tmp_path, [Entry(first, make(first), 2.0, 1.0)], "").is_file()
