"""Processes of a training: launchers, the process group, hangs, deaths, and requeueing."""

import faulthandler
import gc
import logging
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import subprocess_script
from torch.distributed.constants import default_pg_timeout

from olvae.config import Config, ConfigError
from olvae.config.nodes import arguments_of
from olvae.data.read_errors import worker_death
from olvae.data.source import Source
from olvae.devices import MPS, cores, sharing_cores
from olvae.launcher import (
    WHERE_TO_LOOK,
    allow_open_files,
    end_with_children,
    join,
    local_rank,
    of_each,
    srun_environment,
)
from olvae.library_internals import default_store, observe_processes
from olvae.runs import Run
from olvae.training.progress import notify
from olvae.training.settings import slurm_job

log = logging.getLogger("olvae.training")

MOST_WORKERS = 8  # loader processes of a rank, unless the config gives their number


def find_launcher() -> ClusterEnvironment | None:
    """Detect torchrun or srun, whose plugin knows the ranks; None if Lightning starts processes."""
    if TorchElasticEnvironment.detect():  # also where srun starts one torchrun on each node
        return TorchElasticEnvironment()
    return srun_environment()


def is_first() -> bool:
    """Whether this is the first process of a training, known before they meet."""
    launcher = find_launcher()
    if launcher is None:
        return local_rank() == 0
    return launcher.global_rank() == 0


def cluster() -> list[ClusterEnvironment]:
    """Lightning's plugins for the launcher that was found."""
    launcher = find_launcher()
    if launcher is not None:
        return [launcher]
    # A batch script without srun has one process: keep Lightning from asking SLURM for ranks.
    return [LightningEnvironment()] if SLURMEnvironment.detect() else []


def process_count(trainer_args: Mapping[str, Any]) -> int:
    """The number of processes of a run, over all nodes.

    ConfigError if torchrun or srun started another number: Lightning would let each process train
    a model of its own, or wait for processes that never come.
    """
    devices = trainer_args["devices"]
    nodes = int(trainer_args.get("num_nodes", 1))
    per_node = devices if isinstance(devices, int) else len(devices)
    count = per_node * nodes
    if count > 1 and trainer_args.get("accelerator") == MPS:
        raise ConfigError(f"{count} processes can't share a Mac's GPU: `gpus` 0 is the CPU")
    if count > 1:
        allow_open_files(count)
    launcher = find_launcher()
    if launcher is not None:
        try:
            launcher.validate_settings(per_node, nodes)
            started = launcher.world_size()
            if started != count:  # by srun without ntasks-per-node
                raise ValueError(
                    f"srun started {started} process(es), but these name {count} devices"
                )
        except ValueError as error:
            given = "`gpus`, or lightning.trainer.devices and num_nodes"
            raise ConfigError(f"{given}: {error}") from error
    elif nodes > 1:
        raise ConfigError(
            f"lightning.trainer.num_nodes: {nodes}: start the command on each node with torchrun "
            "or srun: https://open-litevae.github.io/open-litevae/many_machines/ shows how"
        )
    return count


DUMP_FILE = "TORCH_FR_DUMP_TEMP_FILE"
OLDER_NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    DUMP_FILE: "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}
"""Older names of variables for NCCL's dump at a timeout; torch warns of them, 2.8 of the first."""


def meet() -> tuple[int, int]:
    """Join the processes that torchrun or srun started; return rank and number of processes.

    Returns (0, 1) if Lightning starts the others, which join when training begins.
    """
    # At its time limit NCCL writes where each rank is. torch adds the rank to the file's name.
    dump = f"{tempfile.gettempdir()}/olvae_nccl_{slurm_job() or os.getppid()}_rank_"
    is_older = torch.__version__.startswith("2.8.")
    recorder = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        OLDER_NAMES[DUMP_FILE] if is_older else DUMP_FILE: dump,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in recorder.items():
        if OLDER_NAMES.get(name, name) not in os.environ:
            os.environ.setdefault(name, value)

    if find_launcher() is None:
        return 0, 1
    return join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", default_pg_timeout)


def check_same(run: str) -> None:
    """Raise ConfigError unless all processes resume the same run; "" for a new one."""
    first = of_each(run)[0]
    if run != first:
        raise ConfigError(
            f"this process would continue {run or 'no run'}, the first one {first or 'none'}: "
            "a shared file system shows them different folders: try again, or name the run with "
            "`resume`"
        )


def choose_workers(source: Source, data: Config, processes: int, nodes: int) -> None:
    """Choose the number of a source's loader processes, unless its node ``data`` gives it.

    As many as cores a rank; fewer if the data can't be shared among so many; none for images in
    memory. The number is set in the source and in the node.
    """
    takes = arguments_of(data["target"]).parameters
    params = data.setdefault("params", {})
    if "num_workers" in params or source.in_memory or "num_workers" not in takes:
        return
    own = cores() // sharing_cores(processes // nodes)
    for workers in range(min(MOST_WORKERS, *of_each(own)), -1, -1):
        source.num_workers = workers
        with suppress(ValueError):
            source.check_processes(processes)
            break
    params["num_workers"] = source.num_workers


# Begins the keys in the process group's store under which each rank notes how far it is.
PROGRESS_KEY = "olvae/progress/"


class Lockstep(Callback):
    """Collect garbage at the same steps in all processes, and end a training if one process hangs.

    Left to itself, Python collects in each process at another step, and all wait for each.

    After the first batch a thread notes in the process group's store how far its process is. If no
    process has moved for ``patience_s`` and some are behind, these print their tracebacks, another
    one prints which they are, and all exit with 1. If all are at one place, the network or a
    validation is slow: the backend's own time limit ends them. A single process is not watched.

    Args:
        patience_s: seconds without progress; longer than a checkpoint or the slowest batch takes.
        collect_every: batches between collections.
    """

    def __init__(self, patience_s: float = 600.0, collect_every: int = 100) -> None:
        if patience_s <= 0 or collect_every < 1:
            raise ValueError("patience_s must be above 0, and collect_every at least 1")
        self.patience_s = patience_s
        self.collect_every = collect_every
        self._batches = 0
        self._place = 0  # batches begun + backward passes begun + batches ended
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
            watched = (trainer, self._over)
            threading.Thread(target=self._watch, args=watched, name="lockstep", daemon=True).start()
        self._batches += 1  # global_step stands still in a warm-up of the discriminator
        if self._batches % self.collect_every == 0:
            gc.collect()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._move(0)  # processes may have different numbers of these batches

    def on_train_end(self, *_: Any) -> None:
        if self._over is not None:
            self._over.set()
            gc.enable()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def _move(self, places: int = 1) -> None:
        self._place += places
        self._moved_at = time.monotonic()

    def _watch(self, trainer: pl.Trainer, over: threading.Event) -> None:
        """Compare the processes until training is over, or process 0, which has the store, ends."""
        try:
            self._compare(trainer, over)
        except RuntimeError:
            # The store is gone. Wait: the main thread may get an error too, and end in order.
            if not over.wait(self.patience_s):
                notify("error: process 0 of this training ended: see its own output")
                os._exit(1)

    def _compare(self, trainer: pl.Trainer, over: threading.Event) -> None:
        """Note this process' progress every few seconds; act once all notes stand still."""
        store = default_store()
        rank = trainer.global_rank
        host = socket.gethostname()
        keys = [f"{PROGRESS_KEY}{other}" for other in range(trainer.world_size)]
        notes: list[str] = []  # "place step host" of each rank, as last seen
        changed_at = 0.0  # when these notes were first seen
        pause = 0.0  # none before the first note, which the others wait for
        while not over.wait(pause):
            pause = min(5.0, self.patience_s / 8)
            store.set(keys[rank], f"{self._place} {trainer.global_step} {host}")

            # Look at the others only while this process stands still, and all have a first note.
            now = time.monotonic()
            if now - self._moved_at < self.patience_s / 2 or not store.check(keys):
                continue

            # All must stand still for the other half of the patience.
            found = [store.get(key).decode() for key in keys]
            if found != notes:
                notes = found
                changed_at = now
            elif now - changed_at >= self.patience_s / 2:
                self._end_if_apart(rank, [note.split(maxsplit=2) for note in notes])

    def _end_if_apart(self, rank: int, notes: list[list[str]]) -> None:
        """Exit if some ranks are behind; print which (the first waiting rank does).

        ``notes``: place, step and host of each rank.
        """
        places = [int(note[0]) for note in notes]
        furthest_behind = min(places)
        behind = [other for other, place in enumerate(places) if place == furthest_behind]
        waiting = [other for other, place in enumerate(places) if place > furthest_behind]
        if not waiting:
            return
        if rank in behind:
            faulthandler.dump_traceback()
        elif rank == waiting[0]:
            named = []
            for other in behind:
                _, step, host = notes[other]
                named.append(f"process {other} on {host} (after step {step})")
            why = (
                f"the others wait for {', '.join(named)}; "
                "its own output has the place in its program"
            )
            notify(f"error: no progress for {self.patience_s:.0f} s: {why}")
        # Process 0 has the store, which the others still read.
        time.sleep(min(10.0, self.patience_s / 2))
        os._exit(1)


# Words of gloo and NCCL (first line), and of NCCL and c10d, when a peer is gone.
PEER_DIED = (
    r"closed by (remote )?peer|reset by peer|Broken pipe|remote process exit|"
    r"NET/IB : Got completion from peer|Connection was likely closed|Did the remote server shutdown"
)

# Words of NCCL, and of gloo, at their time limits.
PEER_LATE = r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for"


def process_death(error: Exception) -> str | None:
    """Explain an error if it comes from the death of a loader or another process; else None."""
    text = str(error)
    if dist.is_initialized() and re.search(PEER_DIED, text):
        return f"another process of this training died: {WHERE_TO_LOOK}"
    if dist.is_initialized() and re.search(PEER_LATE, text):
        return f"another process of this training hangs or died: {WHERE_TO_LOOK}"
    return worker_death(error)


def watch_processes(run: Run) -> None:
    """Exit with a message when a process that Lightning started from this one ends in an error.

    Replaces Lightning's own observer, which kills this process without a word.
    """
    observe_processes(subprocess_script, partial(_watch, run))


def _watch(run: Run, children: Sequence[subprocess.Popen[Any]], grace: float = 5.0) -> None:
    """End this process if one of the others fails, with a word about the run."""

    def saved() -> str:
        return f"; {run.path} can be continued" if run.newest_checkpoint.is_file() else ""

    end_with_children("training", saved, children, grace)


def requeue() -> None:
    """Requeue this SLURM job; when it starts again, it continues its run."""
    job = slurm_job()
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.strerror if isinstance(error, OSError) else error.stderr.strip()
        log.warning("SLURM does not queue job %s again: scontrol requeue: %s", job, why)
    else:
        notify(f"SLURM queues job {job} again")
