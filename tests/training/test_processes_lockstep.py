"""Two processes, one of which hangs; garbage at fixed steps."""

import gc
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from olvae.launcher import join
from olvae.training.processes import PROGRESS_KEY, Lockstep
from tests.forks import fork_each
from tests.training.conftest import torchrun


def hang(folder, first_dies: bool, rank: int) -> None:
    """In step 2 process 1 hangs before its backward pass, and process 0 waits for its gradient,
    or dies."""
    os.environ.update({**torchrun(rank, per_node=2), "MASTER_ADDR": "localhost"})
    sys.stderr = (folder / f"{rank}.txt").open("w", buffering=1)
    assert join() == (rank, 2)
    trainer = SimpleNamespace(world_size=2, global_rank=rank, global_step=0)
    lockstep = Lockstep(patience_s=0.6)
    for _ in range(2):
        lockstep.on_train_batch_start()
        if rank == 1 and trainer.global_step == 1:
            time.sleep(60)
        if first_dies and trainer.global_step == 1:
            os._exit(0)
        lockstep.on_before_backward()
        dist.all_reduce(torch.ones(2))
        trainer.global_step += 1
        lockstep.on_train_batch_end(trainer)


@pytest.mark.parametrize("first_dies", [False, True])
def test_a_process_that_hangs_is_named_and_all_end(tmp_path, first_dies):
    fork_each(partial(hang, tmp_path, first_dies), [0 if first_dies else 1, 1])
    waiting, hanging = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    if first_dies:  # and the store with it
        assert hanging == "error: process 0 of this training ended: see its own output\n"
        return
    assert f"for process 1 on {socket.gethostname()} (after step 1)" in waiting
    assert "in hang" in hanging  # where its program is
    assert "test_processes_lockstep.py" in hanging


def test_lockstep_notes_its_first_step_at_once(monkeypatch):
    store, lockstep = dist.HashStore(), Lockstep()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    lockstep.on_train_batch_end(SimpleNamespace(world_size=2, global_rank=0, global_step=0))
    store.wait([f"{PROGRESS_KEY}0"], timedelta(seconds=3))
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "lockstep"] == [
        True
    ]
    lockstep.on_exception()
    assert lockstep._over.is_set()
    assert gc.isenabled()


def test_lockstep_leaves_processes_at_one_place_to_the_backend(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended"))
    Lockstep()._end_if_apart(0, [["7", "3", "a"], ["7", "3", "b"]])


@pytest.mark.parametrize("arguments", [{"patience_s": 0}, {"collect_every": 0}])
def test_lockstep_refuses_settings_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"patience_s must be .* collect_every"):
        Lockstep(**arguments)
    assert Lockstep(collect_every=1).collect_every == 1


def test_garbage_is_collected_at_fixed_steps(monkeypatch):
    collected, lockstep = [], Lockstep(collect_every=3)
    trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0)
    monkeypatch.setattr(gc, "collect", lambda: collected.append(trainer.global_step))
    monkeypatch.setattr(lockstep, "_watch", lambda *_: None)
    lockstep.on_train_batch_end(trainer)
    assert gc.isenabled()  # in a single process
    trainer.world_size = 2
    try:
        for batch in range(1, 15):  # two of each step
            trainer.global_step = batch // 2
            lockstep.on_train_batch_end(trainer)
        assert (collected, gc.isenabled()) == ([1, 3, 4, 6], False)
    finally:
        lockstep.on_train_end()
    assert gc.isenabled()


NOTES = [["7", "3", "a"], ["5", "2", "b c"], ["7", "3", "d"], ["5", "2", "e"]]
"""Place, step and host of four ranks, of which 1 and 3 are behind."""


@pytest.mark.parametrize("rank", range(4))
def test_ranks_that_wait_name_those_behind_and_all_exit(monkeypatch, capsys, rank):
    """The first of them; those behind print where they are."""
    exits, traced, slept = [], [], []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr("faulthandler.dump_traceback", lambda: traced.append(rank))
    monkeypatch.setattr(time, "sleep", slept.append)
    Lockstep(patience_s=12.0)._end_if_apart(rank, NOTES)
    Lockstep(patience_s=100.0)._end_if_apart(rank, NOTES)
    assert exits == [1, 1]
    assert slept == [6.0, 10.0]
    assert traced == [rank] * (2 if rank in (1, 3) else 0)
    printed = " ".join(capsys.readouterr().err.split())
    behind = "process 1 on b c (after step 2), process 3 on e (after step 2)"
    assert (f"error: no progress for 12 s: the others wait for {behind}" in printed) == (rank == 0)
    assert bool(printed) == (rank == 0)


class Over:
    """Ends a watch after some pauses; notes them, and lets the time pass."""

    def __init__(self, now: list[float], times: int) -> None:
        self.now, self.times = now, times
        self.pauses: list[float] = []

    def wait(self, pause: float) -> bool:
        self.pauses.append(pause)
        self.now[0] += pause
        return len(self.pauses) > self.times


@pytest.mark.parametrize("moves", [True, False])
def test_a_process_is_compared_while_nothing_moves_for_the_patience(monkeypatch, moves):
    """Half of it here, and half in all notes; the time to look again is an eighth of it."""
    now, found = [90.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = dist.HashStore()
    monkeypatch.setattr("olvae.training.processes.default_store", lambda: store)
    lockstep = Lockstep(patience_s=16.0)
    monkeypatch.setattr(
        lockstep, "_end_if_apart", lambda rank, notes: found.append((now[0], rank, notes))
    )
    lockstep.on_train_batch_start()
    lockstep.on_before_backward()
    lockstep.on_train_batch_end(SimpleNamespace(world_size=1))
    now[0] = 100.0
    lockstep.on_validation_batch_end()
    store.set(f"{PROGRESS_KEY}1", "2 6 other host")
    over = Over(now, 9)
    if moves:
        monkeypatch.setattr(over, "wait", lambda pause: lockstep._move() or Over.wait(over, pause))
    trainer = SimpleNamespace(world_size=2, global_rank=0, global_step=7)
    lockstep._compare(trainer, over)
    assert over.pauses == [0.0] + [2.0] * 9
    notes = [["3", "7", socket.gethostname()], ["2", "6", "other host"]]
    assert found == ([] if moves else [(116.0, 0, notes)])
    rarely = Over(now, 1)
    Lockstep(patience_s=600.0)._compare(trainer, rarely)
    assert rarely.pauses == [0.0, 5.0]
