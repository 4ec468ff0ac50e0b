"""Metrics on their way out: means, the log and how it is taken up again, progress where there is no terminal."""

import io
import json
import math
import re

import jax.numpy as jnp
import pytest
from rich.console import Console

from palign.train import metrics
from palign.train.metrics import FILE, MetricWriter, Reporter, add, counted, read_metrics, to_floats
from palign.types import Mean


def mean(total, count):
    return Mean(jnp.float32(total), jnp.float32(count))


def test_means_are_divided_once_and_one_over_nothing_is_left_out():
    means = {"a": mean(3, 4), "b": mean(-1, 2), "nothing": mean(0, 0)}
    assert to_floats(means) == {"a": 0.75, "b": -0.5}
    assert to_floats(means, prefix="eval_x_") == {"eval_x_a": 0.75, "eval_x_b": -0.5}


def test_the_mean_of_sums_is_not_the_mean_of_means():
    total = add(add(None, {"a": mean(1, 1)}), {"a": mean(0, 3)})
    assert to_floats(total) == {"a": 0.25}


def test_adding_does_not_change_what_is_added():
    first = {"a": mean(1, 2)}
    add(add(None, first), {"a": mean(5, 5)})
    assert to_floats(first) == {"a": 0.5}


def written(workdir):
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


def write(workdir, steps, start_step=0, **values):
    writer = MetricWriter(workdir, start_step=start_step)
    for step in steps:
        writer.write(step, {"loss": float(step)} | values)
    writer.close()


def test_a_resumed_run_keeps_the_lines_up_to_its_step_and_writes_the_rest_anew(tmp_path):
    write(tmp_path, [1, 2, 2, 3, 4])
    write(tmp_path, [3, 4], start_step=2, again=1.0)
    assert [(line["step"], "again" in line) for line in written(tmp_path)] == [
        (1, False), (2, False), (2, False), (3, True), (4, True)
    ]  # fmt: skip
    assert read_metrics(tmp_path) == written(tmp_path)


def test_a_run_from_the_start_begins_a_new_log(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1], again=1.0)
    assert written(tmp_path) == [{"step": 1, "loss": 1.0, "again": 1.0}]


def test_a_value_that_is_not_finite_becomes_null(tmp_path):
    write(tmp_path, [1], worst=math.nan, largest=math.inf, least=-math.inf)
    line = (tmp_path / FILE).read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "loss": 1.0, "worst": None, "largest": None, "least": None
    }  # fmt: skip


def test_every_line_is_on_disk_before_the_next_is_written(tmp_path):
    writer = MetricWriter(tmp_path, start_step=0)
    writer.write(1, {"loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()


def test_a_last_line_that_was_cut_off_is_left_out_and_removed_on_resume(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [3], start_step=2)
    assert [line["step"] for line in written(tmp_path)] == [1, 2, 3]


def test_a_workdir_without_a_log_has_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_the_same_values(tmp_path):
    write(tmp_path, [1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


class Clock:
    """Time as the test says."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def reporter(total, **settings):
    out = io.StringIO()
    return Reporter("sft", total, console=Console(file=out, force_terminal=False, width=200), **settings), out


def test_where_there_is_no_terminal_a_line_every_few_seconds_says_what_is_left_and_how_fast_it_goes(clock):
    progress, out = reporter(10)
    with progress:
        for done in (1, 2, 3, 4):
            clock.now += 6.0
            progress.advance(done, 60.0, loss=0.123456)
        assert out.getvalue().splitlines() == [
            "sft: 2/10, 48 s left, 10 tok/s  loss 0.1235",
            "sft: 4/10, 36 s left, 10 tok/s  loss 0.1235",
        ]
    assert out.getvalue().splitlines()[-1] == "sft: 4/10 in 24.0 s, 10 tok/s"


def test_what_is_left_of_a_resumed_run_follows_from_the_steps_taken_since(clock):
    progress, out = reporter(10, start=6, unit="rows/s")
    with progress:
        clock.now += 20.0
        progress.advance(8, 4000.0)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("sft: 8/10, 20 s left, 200 rows/s")
    assert lines[1] == "sft: 8/10 in 20.0 s, 200 rows/s"


def test_a_title_is_shown_as_it_is_written(clock):
    out = io.StringIO()
    with Reporter("[red]x[/red]", 1, console=Console(file=out, force_terminal=False, width=200)):
        pass
    assert out.getvalue().startswith("[red]x[/red]: 0/1 in")


def test_on_a_terminal_there_is_a_bar_with_what_is_left_and_the_rate():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, legacy_windows=False)
    with Reporter("sft", 4, console=console) as progress:
        progress.advance(2, 1000.0, loss=0.5)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "2/4" in plain and "tok/s" in plain and "loss 0.5" in plain
    assert re.search(r"\d+:\d\d:\d\d|-:--:--", plain)


def test_counters_are_printed_as_words_and_what_files_and_columns_are_called_as_it_stands():
    counts = {"blank_lines": 1200, "ignored_column/my_col": 2, "ignored_file/a_b.txt": 1, "skipped/not_json": 3}
    assert counted(counts) == "1,200 blank lines, 2 ignored column/my_col, 1 ignored file/a_b.txt, 3 skipped/not json"
