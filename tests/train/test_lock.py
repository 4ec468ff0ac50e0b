"""One run at a time in a workdir."""

import json
import os
import socket
import subprocess
import sys

import pytest
from etils import epath

from palign.train import lock
from palign.train.lock import FILE, run_lock


@pytest.fixture
def living():
    """Another process, which lives."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def write(workdir, **owner):
    (workdir / FILE).write_text(json.dumps(owner | {"beat": 0}))


def test_a_workdir_is_held_by_one_process_and_free_afterwards(tmp_path):
    with run_lock(epath.Path(tmp_path / "new")):
        owner = json.loads((tmp_path / "new" / FILE).read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
    assert not (tmp_path / "new" / FILE).exists()
    with pytest.raises(KeyError), run_lock(epath.Path(tmp_path)):
        raise KeyError
    assert not (tmp_path / FILE).exists()


def test_a_second_run_in_a_workdir_is_refused_in_one_line(tmp_path, living):
    write(tmp_path, host=socket.gethostname(), pid=living)
    with pytest.raises(ValueError, match=f"process {living} on .* is at work in it; wait for it, stop it") as refused:
        run_lock(epath.Path(tmp_path)).__enter__()
    assert "\n" not in str(refused.value)
    assert json.loads((tmp_path / FILE).read_text())["pid"] == living


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, capsys):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    write(tmp_path, host=socket.gethostname(), pid=int(dead.stdout))
    with run_lock(epath.Path(tmp_path)):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert "takes over from process" in capsys.readouterr().err


def test_a_lock_that_was_never_written_to_its_end_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    (tmp_path / FILE).write_text('{"host": ')
    with run_lock(epath.Path(tmp_path)):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("beats", [True, False])
def test_another_hosts_lock_is_watched_whether_it_changes(beats, tmp_path, monkeypatch):
    write(tmp_path, host="elsewhere", pid=1)
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if beats:
            (tmp_path / FILE).write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": 1}))

    monkeypatch.setattr(lock.time, "sleep", sleep)
    if beats:
        with pytest.raises(ValueError, match="process 1 on elsewhere is at work in it"):
            run_lock(epath.Path(tmp_path)).__enter__()
    else:
        with run_lock(epath.Path(tmp_path)):
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert waited == [lock.PATIENCE_SECONDS]


def test_a_lock_that_is_waited_for_is_taken_when_its_run_has_ended(tmp_path, monkeypatch, capsys, living):
    write(tmp_path, host=socket.gethostname(), pid=living)
    waits = iter([lambda: None, lambda: (tmp_path / FILE).unlink()])
    monkeypatch.setattr(lock.time, "sleep", lambda _: next(waits)())
    with run_lock(epath.Path(tmp_path), wait=True):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert capsys.readouterr().err.count("which is at work in it") == 1 and next(waits, None) is None


def test_a_lock_says_again_and_again_that_its_run_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with run_lock(epath.Path(tmp_path)):
        first = lock._read(tmp_path / FILE)
        for _ in range(500):
            if lock._read(tmp_path / FILE).get("beat", 0) > first["beat"]:
                break
            lock.time.sleep(0.01)
        else:
            pytest.fail("the lock was not written again")
