"""The race's rules, with workers of a few lines in place of contestants."""

import argparse
import json
import sys
import textwrap

import pytest

from benchmarks import cases, driver
from benchmarks.driver import Contestant, Goal, Race

STUB = """
    from benchmarks.worker import Done, serve

    def step(i):
        {each_step}
        return Done({{"loss": {loss}, "grad_norm": {norm}}}, {{"pairs": {pairs}}}, {{"ids": {ids}}})

    serve(step, packages=["pip"], same={{"weights": {weights}}})
"""


def stub(name, *, each_step="pass", loss="0.5", norm="40.0", pairs="2", ids="f'batch {i}'", weights="'w'"):
    source = textwrap.dedent(
        STUB.format(each_step=each_step, loss=loss, norm=norm, pairs=pairs, ids=ids, weights=weights)
    )
    return Contestant(name, (sys.executable, "-c", source))


def run(tmp_path, *contestants, rounds=2, **settings):
    flags = argparse.Namespace(cores=1, out=tmp_path, rounds=rounds)
    return driver.run("question", [Race("title", contestants, rounds, **settings)], flags)


def refusal(capsys, tmp_path, *contestants, **settings):
    """The one line that says why, after a check that no figure was printed or written."""
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *contestants, **settings)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == "" and not list(tmp_path.iterdir())
    return printed.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("key", "other", "expected"),
    [
        (
            "loss",
            "0.5002",
            "round 0: loss of one (0.5) and of other (0.5002) are 2.0e-04 apart (absolute); allowed are 1e-04",
        ),
        ("loss", "0.5 + (i == 2)", "round 2: loss"),
        ("norm", "40.1", "round 0: grad_norm of one (40) and of other (40.1) are 2.5e-03 apart (relative)"),
        ("loss", "float('nan')", "round 0: other gave loss = nan, not a number"),
        ("ids", "'other batch'", "round 0: ids of one (batch 0) and of other (other batch) differ"),
        ("weights", "'v'", "before the first step: weights of one (w) and of other (v) differ"),
    ],
)
def test_contestants_that_differ_get_no_ratio(capsys, tmp_path, key, other, expected):
    line = refusal(capsys, tmp_path, stub("one"), stub("other", **{key: other}))
    assert line.startswith("no ratio is printed: ") and expected in line


def test_a_value_that_only_one_side_gives_is_a_difference(capsys, tmp_path):
    silent = Contestant("silent", (sys.executable, "-c", stub("x").command[2].replace('"grad_norm": 40.0', "")))
    assert "silent gave grad_norm = None" in refusal(capsys, tmp_path, stub("one"), silent)


def test_differences_within_the_tolerances_pass(tmp_path):
    run(tmp_path, stub("one"), stub("other", loss="0.50009", norm="40.03"))


def test_rounds_in_which_everybody_batches_for_itself_are_not_compared(capsys, tmp_path):
    free = stub("free", loss="0.5 + (i > 0)")
    assert "round 1: loss" in refusal(capsys, tmp_path, stub("one"), free, compared=2)
    run(tmp_path, stub("one"), free, compared=1)


@pytest.mark.parametrize(
    ("dies", "expected"),
    [
        ({"each_step": "assert i < 1, 'out of memory'"}, "AssertionError: out of memory"),
        ({"each_step": "__import__('os')._exit(3)"}, "it wrote nothing"),
        ({"weights": "1 / 0"}, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_worker_that_dies_is_one_line_with_its_last_words(capsys, tmp_path, dies, expected):
    line = refusal(capsys, tmp_path, stub("one"), stub("weak", **dies))
    assert line.startswith("weak died: ") and line.endswith(expected)


def measured(cpu, pairs=1, device="cpu", **peaks):
    """A contestant that took `cpu` seconds in each round."""
    rounds = [{"cpu": x, "wall": 2 * x, "work": {"pairs": pairs}} for x in cpu]
    return {"rounds": rounds, "device": device, "peak": None, "device_peak": None, **peaks}


def test_seconds_and_memory_are_those_of_where_contestants_compute():
    on_cpu, on_gpu = (
        measured([9.0, 3.0], peak=7, device_peak=5),
        measured([9.0, 3.0], device="H100", peak=7, device_peak=5),
    )
    assert [driver.costs(on_cpu, measure, "pairs") for measure in ("seconds", "memory", "wall")] == [[3.0], [7], [6.0]]
    assert [driver.costs(on_gpu, measure, "pairs") for measure in ("seconds", "memory", "cpu")] == [[6.0], [5], [3.0]]


def test_ratios_are_of_seconds_per_unit_round_by_round_without_the_first():
    taken = {"slow": measured([99.0, 6.0, 8.0, 9.0], pairs=2), "fast": measured([0.1, 1.0, 2.0, 1.0])}
    found = driver.judge(Goal("C", "cpu", ("slow",), "fast", at_least=3.0), taken, "pairs")
    assert found == {"against": "slow", "ratio": {"min": 2.0, "median": 3.0, "max": 4.5}, "met": True}


def test_the_best_of_several_peers_is_the_one_to_beat():
    taken = {"eager": measured([9.0, 2.0]), "compiled": measured([9.0, 1.0]), "own": measured([9.0, 1.0])}
    found = driver.judge(Goal("C", "wall", ("eager", "compiled"), "own", at_least=1.15), taken, "pairs")
    assert found["against"] == "compiled" and found["ratio"]["median"] == 1.0 and found["met"] is False


def test_peaks_are_compared_as_they_are_and_a_missing_one_leaves_the_goal_out():
    taken = {"own": measured([1.0, 1.0], peak=30), "peer": measured([1.0, 1.0], pairs=7, peak=120)}
    found = driver.judge(Goal("C", "peak", ("own",), "peer", at_most=0.2), taken, "pairs")
    assert found["ratio"]["median"] == 0.25 and found["met"] is False
    for goal in (Goal("C", "device_peak", ("own",), "peer"), Goal("C", "cpu", ("absent",), "own", at_least=1.0)):
        assert driver.judge(goal, taken, "pairs") == {"against": None, "ratio": None, "met": None}


def test_the_result_holds_what_the_figures_depend_on(capsys, tmp_path):
    peer = driver.contestant("peer", "none", python=None)
    goals = (Goal("C1", "cpu", ("peer",), "one", at_least=2.0), Goal("C2", "peak", ("other",), "one", at_most=9.0))
    run(tmp_path, stub("one", each_step="sum(range(10**5))"), stub("other"), peer, rounds=3, goals=goals)
    result = json.loads((tmp_path / "question.json").read_text())
    assert {
        "name",
        "command",
        "time",
        "commit",
        "machine",
        "cores",
        "load_before",
        "load_after",
        "flags",
        "races",
    } == set(result)
    (race,) = result["races"]
    assert race["left_out"] == ["peer"] and [goal["met"] for goal in race["goals"]] == [None, True]
    one = race["contestants"]["one"]
    assert len(one["rounds"]) == 4 and one["peak"] > 1e6 and one["device_peak"] is None and one["device"] == "cpu"
    assert one["versions"].keys() == {"pip", "python"} and one["setup_seconds"] > 0
    assert all(each["cpu"] > 0 and each["wall"] > 0 and each["work"] == {"pairs": 2} for each in one["rounds"])
    table = capsys.readouterr().out
    assert (
        "| peer | left out: needs `--peers-python`" in table
        and "| C1 | peer / one | cpu | left out | >= 2 | - |" in table
    )
    assert "| C2 | other / one | peak | " in table and "| <= 9 | yes |" in table


def test_a_race_of_peers_alone_is_left_out_as_a_whole(capsys, tmp_path):
    peer = driver.contestant("peer", "none", python=None)
    (race,) = run(tmp_path, peer, goals=(Goal("C1", "cpu", ("peer",), "peer"),))["races"]
    assert race["contestants"] == {} and "| peer | left out" in capsys.readouterr().out


def test_workers_stand_on_the_cores_that_they_are_given_and_take_turns(tmp_path):
    order = tmp_path / "order"
    order.touch()
    sides = [
        stub(
            name,
            each_step=f"open({str(order)!r}, 'a').write({name!r})",
            pairs="len(__import__('os').sched_getaffinity(0))",
        )
        for name in "ab"
    ]
    (race,) = run(tmp_path, *sides)["races"]
    assert [each["work"]["pairs"] for each in race["contestants"]["a"]["rounds"]] == [1, 1, 1]
    assert order.read_text() == "baabba"


@pytest.mark.parametrize("lengths", cases.LENGTHS)
def test_lengths_follow_the_seed_and_nothing_else(lengths):
    def sizes(seed):
        drawn = cases.realistic(lengths, 16, longest=256, first=(2, 600), vocabulary=300, rounds=4, seed=seed)
        return [[tuple(part.size for part in pair) for pair in pairs] for pairs in drawn]

    assert sizes(3) == sizes(3) and sizes(3) != sizes(4)
    assert [len(pairs) for pairs in sizes(3)[1:]] == [16] * 3 and sum(map(sum, sizes(3)[0])) <= 600
    assert all(1 <= len(sizes(seed)[0]) <= 2 for seed in range(9))
    assert all(p + max(c, r) <= 256 and p <= 128 for pairs in sizes(3) for p, c, r in pairs)


def test_a_case_reads_back_what_was_written():
    rounds = cases.realistic("hh", 3, longest=64, first=(2, 200), vocabulary=300, rounds=3, seed=0)
    with cases.written(cases.TINY, rounds) as case:
        again = cases.read_rounds(case)
    assert [cases.digest(pairs) for pairs in again] == [cases.digest(pairs) for pairs in rounds]
    assert len({cases.digest(pairs) for pairs in rounds}) == 3
