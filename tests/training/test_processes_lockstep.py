"""Two processes, one of which hangs; garbage at fixed steps."""

import gc
import os
import socket
import sys
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
    lockstep.on_train_end()


def test_lockstep_leaves_processes_at_one_place_to_the_backend(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended"))
    Lockstep()._end_if_apart(0, [["7", "3", "a"], ["7", "3", "b"]])


@pytest.mark.parametrize("arguments", [{"patience_s": 0}, {"collect_every": 0}])
def test_lockstep_refuses_settings_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"patience_s must be .* collect_every"):
        Lockstep(**arguments)


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
