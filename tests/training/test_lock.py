"""One training a run: who has it, what a killed process left, and what can't be known."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from olvae.config import ConfigError
from olvae.runs import Run, create
from olvae.training import lock as locking
from olvae.training.lock import RunLock


@pytest.fixture
def run(tmp_path) -> Run:
    return create(tmp_path, "a", "32")


@pytest.fixture
def other():
    """Another process of this machine, which does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def left_by(run: Run, **changes) -> None:
    """A lock as a process left it, by default this one."""
    with RunLock() as lock:
        lock.take(run)
        content = json.loads(run.lock.read_text())
    run.lock.write_text(json.dumps({**content, **changes}))


def refused(run: Run) -> str:
    with pytest.raises(ConfigError) as caught, RunLock() as lock:
        lock.take(run)
    (line,) = str(caught.value).splitlines()
    return line


def test_it_says_who_has_the_run_and_is_gone_at_the_end(run):
    with RunLock() as lock:
        lock.take(run)
        held = json.loads(run.lock.read_text())
        assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
        me = f"process {os.getpid()} on {socket.gethostname()}, since {held['since']}"
        assert refused(run) == f"{run.path}: is being trained by {me}: wait for its end, or stop it"
        assert json.loads(run.lock.read_text()) == held
    assert not run.lock.exists()


def test_it_is_gone_after_an_interrupt(run):
    def interrupted() -> None:
        with RunLock() as lock:
            lock.take(run)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not run.lock.exists()


def test_a_lock_of_a_process_that_is_gone_is_taken_over(run, other, caplog):
    left_by(run, pid=other.pid, started=locking._start_of(other.pid))
    assert f"process {other.pid}" in refused(run)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie, as in a container without init
    for _ in ("zombie", "gone"):
        with RunLock() as lock:
            lock.take(run)
            assert json.loads(run.lock.read_text())["pid"] == os.getpid()
        assert "was left when that process was killed, and is taken over" in caplog.messages[-1]
        other.wait()
        left_by(run, pid=other.pid)
    assert sorted(path.name for path in run.path.glob(".lock*")) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell when processes began")
def test_another_process_with_the_same_number_is_no_holder(run, other):
    left_by(run, pid=other.pid)  # which began at another time than this one, whose lock it was
    with RunLock() as lock:
        lock.take(run)


def test_where_the_system_tells_no_times_the_number_counts(run, other, monkeypatch):
    monkeypatch.setattr(locking, "_start_of", lambda _: None)
    left_by(run, pid=other.pid)
    assert "is being trained by" in refused(run)


def test_of_another_machine_nobody_knows(run):
    left_by(run, host="node7", pid=1)
    assert refused(run).startswith(f"{run.path}: locked by process 1 on node7, since ")
    assert refused(run).endswith(f"if it does not, remove {run.lock}")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": "a"}'])
def test_a_lock_that_cannot_be_read_is_nobodys_to_take(run, content, monkeypatch):
    monkeypatch.setattr(locking, "PATIENCE_S", 0.1)
    run.lock.write_text(content)
    assert refused(run).endswith(f"if nobody trains this run, remove {run.lock}")


def test_a_lock_that_somebody_else_took_over_is_left(run, other, monkeypatch):
    """Two find a lock that was left; the slower one moves away the faster one's, and gives it back."""
    other.kill()
    other.wait()
    left_by(run, pid=other.pid)
    faster, lives = RunLock(), locking._lives

    def in_between(holder: locking.Holder) -> bool:
        if holder.pid == other.pid:
            monkeypatch.setattr(locking, "_lives", lives)
            faster.take(run)
            return False
        return lives(holder)

    monkeypatch.setattr(locking, "_lives", in_between)
    assert f"is being trained by process {os.getpid()}" in refused(run)
    assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    faster.__exit__()
    assert not run.lock.exists()


def test_a_lock_that_is_no_longer_ours_is_left(run):
    with RunLock() as lock:
        lock.take(run)
        run.lock.unlink()
        left_by(run, host="node7")
    assert run.lock.exists()
