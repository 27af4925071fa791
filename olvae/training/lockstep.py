"""Keep the processes of a training in step: collect garbage at the same steps, and name one that hangs."""

import faulthandler
import gc
import os
import socket
import threading
import time
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from olvae.training.progress import notify

KEY = "olvae/progress/"
SEE = "its own output has the place in its program"


class Lockstep(Callback):
    """Collect garbage at the same steps in all processes, and end a training in which one hangs, with its name.

    Left to itself, Python collects in each process at another step, and all wait for each. After the first step a
    thread notes in the process group's store how far its process is. If none has moved for ``patience_s`` and they are
    apart, those furthest behind are named and print where their program is, and all exit with 1. If all are at one
    place it is the network, or a validation: the backend's own time limit ends them. Before the end of a process' first
    batch nothing is watched, nor is a single process.

    Args:
        patience_s: seconds without progress; longer than a checkpoint or the slowest batch takes.
        collect_every: batches between collections.
    """

    def __init__(self, patience_s: float = 600.0, collect_every: int = 100) -> None:
        if patience_s <= 0 or collect_every < 1:
            raise ValueError("patience_s must be above 0, and collect_every at least 1")
        self.patience_s, self.collect_every = patience_s, collect_every
        self._batches = 0
        self._place = 0  # batches begun, backward passes begun, batches ended
        self._moved_at = time.monotonic()
        self._over: threading.Event | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        self._move()

    def on_before_backward(self, *_: Any) -> None:
        self._move()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._move()
        if trainer.world_size == 1:
            return
        if self._over is None:
            gc.disable()
            self._over = threading.Event()
            threading.Thread(target=self._watch, args=(trainer, self._over), name="lockstep", daemon=True).start()
        self._batches += 1  # global_step stands still in a warm-up of the discriminator
        if self._batches % self.collect_every == 0:
            gc.collect()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._move(0)  # their number may differ

    def on_train_end(self, *_: Any) -> None:
        if self._over is not None:
            self._over.set()
            gc.enable()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def _move(self, places: int = 1) -> None:
        self._place, self._moved_at = self._place + places, time.monotonic()

    def _watch(self, trainer: pl.Trainer, over: threading.Event) -> None:
        """Compare the processes until training is over, or the process that holds their notes ended."""
        try:
            self._compare(trainer, over)
        except RuntimeError:  # of the store; the main thread may get an error too, and end in order
            if not over.wait(self.patience_s):
                notify("error: process 0 of this training ended: see its own output")
                os._exit(1)

    def _compare(self, trainer: pl.Trainer, over: threading.Event) -> None:
        """Note where this process is, and look at the others' notes once it has not moved for half of the patience."""
        store, rank, noted, since = dist.distributed_c10d._get_default_store(), trainer.global_rank, [""], 0.0
        keys, host = [f"{KEY}{other}" for other in range(trainer.world_size)], socket.gethostname()
        pause = 0.0  # without one before the first note, which the others wait for
        while not over.wait(pause):
            pause = min(5.0, self.patience_s / 8)
            store.set(keys[rank], f"{self._place} {trainer.global_step} {host}")
            now = time.monotonic()
            if now - self._moved_at < self.patience_s / 2 or not store.check(keys):  # or one is in its first step
                continue
            if (found := [store.get(key).decode() for key in keys]) != noted:
                noted, since = found, now
            elif now - since >= self.patience_s / 2:
                self._end_if_apart(rank, [note.split(maxsplit=2) for note in noted])

    def _end_if_apart(self, rank: int, noted: list[list[str]]) -> None:
        """Exit unless all are at one place; the first process that waits names those that it waits for."""
        places = [int(place) for place, *_ in noted]
        behind = [other for other, place in enumerate(places) if place == min(places)]
        waiting = [other for other in range(len(places)) if other not in behind]
        if not waiting:
            return
        if rank in behind:
            faulthandler.dump_traceback()
        elif rank == waiting[0]:
            names = ", ".join(
                f"process {other} on {noted[other][2]} (after step {noted[other][1]})" for other in behind
            )
            notify(f"error: no progress for {self.patience_s:.0f} s: the others wait for {names}; {SEE}")
        time.sleep(min(10.0, self.patience_s / 2))  # the others read the first process' store
        os._exit(1)
