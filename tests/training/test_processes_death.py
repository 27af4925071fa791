"""Another process of a training that died: told by the backend's words,
or by the one that started it."""

import multiprocessing
import subprocess
import sys
import time

import pytest

from olvae.runs import Run
from olvae.training import processes
from olvae.training.processes import process_death


def test_process_death_is_told_for_a_connection_that_gloo_lost(monkeypatch):
    gloo = RuntimeError(
        "[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:59575: Connection reset by peer"
    )
    assert process_death(gloo) is None  # of a server perhaps
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    assert process_death(gloo).startswith("another process of this training died")
    assert process_death(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        (
            "ncclRemoteError: A call failed possibly due to a network error "
            "or a remote process exiting prematurely.",
            "died",
        ),
        ("Last error:\nsocketProgress: Connection closed by remote peer node03<41234>", "died"),
        ("Last error:\nNET/IB : Got completion from peer 10.0.0.2<50452> with error 12", "died"),
        (
            "[c10d] recvValue failed on SocketImpl(fd=3): "
            "Connection was likely closed. Did the remote server",
            "died",
        ),
        (
            "[Rank 3] Watchdog caught collective operation timeout: "
            "WorkNCCL(SeqNum=1234, OpType=ALLREDUCE",
            "hangs or died",
        ),
        (
            "[gloo/transport/tcp/unbound_buffer.cc:78] "
            "Timed out waiting 1800000ms for recv operation",
            "hangs or died",
        ),
    ],
)
def test_process_death_is_told_from_words_of_nccl_c10d_and_gloo(monkeypatch, words, verb):
    """As public issues quote them."""
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    assert process_death(RuntimeError(words)).startswith(
        f"another process of this training {verb}: see its own output"
    )


def test_started_processes_are_watched_with_a_word_about_the_run(tmp_path, monkeypatch):
    """Lightning's own observer is replaced."""
    observed, ended = [], []
    monkeypatch.setattr(processes, "observe_processes", lambda *given: observed.append(given))
    monkeypatch.setattr(processes, "end_with_children", lambda *given: ended.append(given))
    run, children = Run(tmp_path), [object()]
    processes.watch_processes(run)
    ((module, watch),) = observed
    assert module is processes.subprocess_script
    watch(children)
    ((what, saved, ended_children, grace),) = ended
    assert (what, ended_children, grace) == ("training", children, 5.0)
    assert saved() == ""
    run.checkpoints.mkdir()
    run.last_checkpoint.touch()
    assert saved() == f"; {tmp_path} can be continued"


def test_a_started_process_that_was_killed_is_named_with_its_signal(tmp_path, capfd):
    """It hangs in a collective, as on GPUs."""

    def start() -> None:
        child = subprocess.Popen(
            [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
        )
        processes._watch(Run(tmp_path), [child], grace=0.1)
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert capfd.readouterr().err.startswith(
        "error: process 1 of this training was killed by SIGKILL: see its own"
    )
