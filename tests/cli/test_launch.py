"""The launcher of several processes on one machine, with commands that are no training."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from palign.cli import app, launch
from palign.sharding import loopback

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "palign.cli.launch"]
# Each process answers `sys.argv[-1]`, its --process=I flag.
SHOW = "import os, sys; print(os.environ['JAX_NUM_CPU_DEVICES'], *sys.argv[1:])"
WAIT = "import time; time.sleep(60)"


def launched(*arguments):
    return subprocess.run([*LAUNCH, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_every_process_gets_its_number_and_its_devices_and_its_lines_are_marked():
    done = launched("--processes=3", "--devices=2", "--", sys.executable, "-c", SHOW, "--x=1")
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stderr.splitlines())
    coordinator = lines[0].split()[3]
    assert coordinator.startswith("--coordinator=127.0.0.1:")
    assert lines == [f"[{i}] 2 --x=1 {coordinator} --processes=3 --process={i}" for i in range(3)]


def test_when_one_process_fails_the_others_are_ended_and_its_code_is_the_launchers(monkeypatch):
    monkeypatch.setattr(loopback, "GRACE_SECONDS", 0.5)
    children = [subprocess.Popen([sys.executable, "-c", code]) for code in (WAIT, "import sys; sys.exit(5)")]
    assert loopback._wait(children) == 5
    assert children[0].returncode == -signal.SIGKILL


def test_the_cause_is_passed_on_rather_than_what_followed_from_it(tmp_path):
    code = (
        f"import os, pathlib, sys, time; mark = pathlib.Path({str(tmp_path / 'failing')!r})\n"
        "if sys.argv[-1] == '--process=1':\n"
        "    mark.touch()\n"
        "    os._exit(2)\n"
        "while not mark.exists():\n"
        "    time.sleep(0.001)\n"
        "os.abort()"
    )
    assert launched("--processes=2", "--", sys.executable, "-c", code).returncode == 2


def test_a_signal_reaches_all_processes():
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    command = [*LAUNCH, "--processes=2", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert sorted(process.stderr.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=0", "x"], "--processes=0 --devices=1: expected 1 or more of both"),
        (["--processes=2"], "the following arguments are required: command"),
    ],
)
def test_a_slip_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert app.run(launch.main, arguments) == 2
    assert message in capsys.readouterr().err
