"""docs/performance.md says what the committed results say, and nothing else."""

import json
import re
import subprocess

import pytest

from benchmarks import driver
from docs import make_performance
from docs.make_performance import BLOCK, BLOCKS, PAGE, QUESTIONS, read_results, with_figures


def contestant(seconds, peak):
    rounds = [{"cpu": each, "wall": 2 * each, "work": {"pairs": 2}} for each in (9.0, *seconds)]
    return {"device": "cpu", "versions": {}, "peak": peak, "device_peak": None, "rounds": rounds}


def race(bound):
    """TRL takes 2, 3 and 4 times as long as palign, and 4 times its memory."""
    sides = {"TRL": contestant((2.0, 3.0, 4.0), 4 * 2**30), "palign": contestant((1.0, 1.0, 1.0), 2**30)}
    goal = {"id": "C1", "measure": "seconds", "over": ("TRL",), "under": "palign", "at_least": bound, "at_most": None}
    judged = driver.judge(driver.Goal(**goal), sides, "pairs")
    shared = {"title": "2 pairs", "unit": "pairs", "rounds": 3, "left_out": ["PyTorch loop"], "contestants": sides}
    return shared | {"goals": [goal | judged]}


def result(bound=2.2, tiny=False):
    machine = {"processor": "a processor", "cores": 2, "memory": 2**34}
    header = {"command": "python -m benchmarks.equal_shapes", "time": "2026-01-02T03:04:05", "commit": "abc"}
    loads = {"load_before": [0.5, 0, 0], "load_after": [1.5, 0, 0]}
    return header | loads | {"machine": machine, "cores": [1], "flags": {"tiny": tiny}, "races": [race(bound)]}


def row(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(f"|{start}|")]
    return found


def test_the_page_shows_the_committed_results():
    page = PAGE.read_text(encoding="utf-8")
    assert with_figures(page, read_results()) == page, "run python docs/make_performance.py"


def test_every_block_of_the_page_is_written_and_every_picture_is_there():
    page = PAGE.read_text(encoding="utf-8")
    assert {match[2] for match in BLOCK.finditer(page)} == BLOCKS.keys()
    pictures = re.findall(r'src="(images/performance/[^"]+)"', page)
    assert all((PAGE.parent / picture).exists() for picture in pictures)


def test_speed_and_memory_stand_beside_whom_they_are_held_against():
    assert (
        row(BLOCKS["answer"]({"equal_shapes": result()}), "2 pairs") == "|2 pairs|TRL|cpu|2.00 - **3.00** - 4.00|0.25|"
    )


def test_a_goal_is_met_or_missed_with_its_reason_or_not_measured(monkeypatch):
    assert row(BLOCKS["goals"]({"equal_shapes": result()}), "C1").endswith("|2.00 - **3.00** - 4.00|at least 2.2|met|")
    missed = {"equal_shapes": result(bound=3.5)}
    assert row(BLOCKS["goals"](missed), "C1").endswith("|at least 3.5|missed: not explained yet|")
    monkeypatch.setitem(make_performance.REASONS, "C1", "because")
    assert row(BLOCKS["goals"](missed), "C1").endswith("|2.00 - **3.00** - 4.00|at least 3.5|missed: because|")
    assert "not measured" in row(BLOCKS["goals"](missed), "C2")


@pytest.mark.parametrize(("target", "folder"), [("bench", ""), ("bench-peers", ""), ("bench-gpu", "gpu/")])
def test_every_question_that_make_asks_has_a_place_on_the_page(target, folder):
    commands = subprocess.run(["make", "-n", target], cwd=PAGE.parents[1], capture_output=True, text=True, check=True)
    listed = re.findall(r"for question in ([\w ]+);", commands.stdout)
    asked = {f"{folder}{name}" for names in listed for name in names.split()}
    assert asked and asked <= set(QUESTIONS)


def test_what_was_left_out_is_said():
    said = BLOCKS["unmeasured"]({"equal_shapes": result()})
    assert "- `equal_shapes`: without PyTorch loop." in said
    assert all(f"- `{name}`: no result." in said for name in QUESTIONS if name != "equal_shapes")


def test_bars_are_drawn_of_races_that_a_goal_is_held_against():
    drawn = make_performance.drawings({"equal_shapes": result()})
    assert list(drawn) == ["seconds_0"] and drawn["seconds_0"].caption == "2 pairs: pairs a second of CPU"
    svg = make_performance.as_file(drawn["seconds_0"].draw())
    assert svg.startswith("<svg") and ">palign<" in svg and ">0.67  [0.50, 1.00]<" in svg  # TRL: 2 pairs in 3 s


@pytest.mark.parametrize(
    ("name", "tiny", "complaint"), [("equal_shapes", True, "--tiny"), ("other", False, "expected one")]
)
def test_results_that_mean_nothing_are_refused(tmp_path, name, tiny, complaint):
    (tmp_path / f"{name}.json").write_text(json.dumps(result(tiny=tiny)))
    with pytest.raises(ValueError, match=complaint):
        read_results(tmp_path)
