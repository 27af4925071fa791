"""Processes of a training: torchrun and srun, joining the process group, lockstep, hangs and deaths, requeueing."""

import faulthandler
import gc
import logging
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

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
from olvae.devices import cores, join, local_rank, sharing_cores, srun_environment
from olvae.runs import Run
from olvae.training.progress import notify
from olvae.training.settings import slurm_job

log = logging.getLogger("olvae.training")
T = TypeVar("T")

MOST_WORKERS = 8  # loader processes of a rank, unless the config gives their number


def find_launcher() -> ClusterEnvironment | None:
    """Detect torchrun or srun, for Lightning to ask for ranks; None if Lightning starts the processes itself."""
    if TorchElasticEnvironment.detect():  # also where srun starts one torchrun on each node
        return TorchElasticEnvironment()
    return srun_environment()


def is_first() -> bool:
    """Whether this is the first process of a training, known before they meet."""
    launcher = find_launcher()
    return launcher.global_rank() == 0 if launcher is not None else local_rank() == 0


def cluster() -> list[ClusterEnvironment]:
    """Lightning's plugins for the launcher that was found."""
    launcher = find_launcher()
    if (
        launcher is None and SLURMEnvironment.detect()
    ):  # a batch script without srun has one process
        launcher = LightningEnvironment()
    return [] if launcher is None else [launcher]


def process_count(trainer_args: Mapping[str, Any]) -> int:
    """The number of processes of a run, over all nodes; ConfigError if torchrun or srun started another number.

    Then Lightning would let each process train a model of its own, or wait for processes that never come.
    """
    devices, nodes = trainer_args["devices"], int(trainer_args.get("num_nodes", 1))
    per_node = devices if isinstance(devices, int) else len(devices)
    if (launcher := find_launcher()) is not None:
        try:
            launcher.validate_settings(per_node, nodes)
            if (
                started := launcher.world_size()
            ) != per_node * nodes:  # srun without ntasks-per-node
                raise ValueError(
                    f"srun started {started} process(es), but these name {per_node * nodes} devices"
                )
        except ValueError as error:
            raise ConfigError(
                f"`gpus`, or lightning.trainer.devices and num_nodes: {error}"
            ) from error
    elif nodes > 1:
        raise ConfigError(
            f"lightning.trainer.num_nodes: {nodes}: start the command on each node with torchrun or srun: "
            "https://open-litevae.github.io/open-litevae/training/ shows how"
        )
    return per_node * nodes


OLDER_NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}
"""Names in torch 2.8 of settings by which NCCL writes down at its time limit where each rank is; later they warn."""


def meet() -> tuple[int, int]:
    """Join the processes that torchrun or srun started; return rank and number of processes.

    It is (0, 1) where Lightning starts the others, which join when training begins.
    """
    dump = f"{tempfile.gettempdir()}/olvae_nccl_{slurm_job() or os.getppid()}_rank_"  # and torch adds the rank
    recorder = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": dump,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in recorder.items():
        older = OLDER_NAMES.get(name, name)
        if older not in os.environ:
            os.environ.setdefault(older if torch.__version__.startswith("2.8.") else name, value)
    if find_launcher() is None:
        return 0, 1
    return join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", default_pg_timeout)


def of_each(value: T) -> list[T]:
    """Return the values of all processes that have met, by rank; before they have met, this one's alone."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def check_same(run: str) -> None:
    """Raise ConfigError unless all processes that have met continue the run that the first one does: "" for none."""
    if run != (first := of_each(run)[0]):
        raise ConfigError(
            f"this process would continue {run or 'no run'}, the first one {first or 'none'}: a shared "
            "file system shows them different folders: try again, or name the run with `resume`"
        )


def choose_workers(source: Source, data: Config, processes: int, nodes: int) -> None:
    """Set a source's loader processes, in its node ``data`` too, where that leaves them out: as many as cores a rank.

    They are fewer if the data can't be shared among so many, and none for pictures in memory.
    """
    takes, params = arguments_of(data["target"]).parameters, data.setdefault("params", {})
    if "num_workers" in params or source.in_memory or "num_workers" not in takes:
        return
    own = cores() // sharing_cores(processes // nodes)
    for source.num_workers in range(min(MOST_WORKERS, *of_each(own)), -1, -1):
        with suppress(ValueError):
            source.check_processes(processes)
            break
    params["num_workers"] = source.num_workers


PROGRESS_KEY = "olvae/progress/"  # and the rank: in the process group's store


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
            threading.Thread(
                target=self._watch, args=(trainer, self._over), name="lockstep", daemon=True
            ).start()
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
        store, rank, noted, since = (
            dist.distributed_c10d._get_default_store(),
            trainer.global_rank,
            [""],
            0.0,
        )
        keys, host = (
            [f"{PROGRESS_KEY}{other}" for other in range(trainer.world_size)],
            socket.gethostname(),
        )
        pause = 0.0  # without one before the first note, which the others wait for
        while not over.wait(pause):
            pause = min(5.0, self.patience_s / 8)
            store.set(keys[rank], f"{self._place} {trainer.global_step} {host}")
            now = time.monotonic()
            if now - self._moved_at < self.patience_s / 2 or not store.check(
                keys
            ):  # or one is in its first step
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
                f"process {n} on {noted[n][2]} (after step {noted[n][1]})" for n in behind
            )
            why = f"the others wait for {names}; its own output has the place in its program"
            notify(f"error: no progress for {self.patience_s:.0f} s: {why}")
        time.sleep(min(10.0, self.patience_s / 2))  # the others read the first process' store
        os._exit(1)


WHERE_TO_LOOK = "see its own output, or the system's log of killed processes"
PEER_DIED = (
    r"closed by (remote )?peer|reset by peer|Broken pipe|remote process exit|"  # gloo, NCCL
    r"NET/IB : Got completion from peer|Connection was likely closed|Did the remote server shutdown"  # NCCL, c10d
)
PEER_LATE = (
    r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for"  # NCCL, gloo
)


def process_death(error: Exception) -> str | None:
    """Explain an error that comes from the death of a loader process or another process of this run; else None."""
    text = str(error)
    if dist.is_initialized() and re.search(PEER_DIED, text):
        return f"another process of this training died: {WHERE_TO_LOOK}"
    if dist.is_initialized() and re.search(PEER_LATE, text):
        return f"another process of this training hangs or died: {WHERE_TO_LOOK}"
    return worker_death(error)


def watch_processes(run: Run) -> None:
    """Exit with a line, in the process in which Lightning starts the others, when one of them ends in an error.

    Lightning's own observer kills it without a word.
    """
    setattr(subprocess_script, "_launch_process_observer", partial(_watch, run))  # noqa: B010  (mypy does not see it)


def _watch(run: Run, children: Sequence[subprocess.Popen[Any]], grace: float = 5.0) -> None:
    """End this process after another one: on GPUs its collectives do not return; elsewhere they raise, in ``grace``."""

    def watch() -> None:
        while not (
            failed := [
                (rank, code) for rank, child in enumerate(children, 1) if (code := child.poll())
            ]
        ):
            if all(child.returncode == 0 for child in children):
                return
            time.sleep(0.5)
        time.sleep(grace)
        rank, code = failed[0]
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        saved = f"; {run.path} can be continued" if run.last_checkpoint.is_file() else ""
        notify(f"error: process {rank} of this training {how}: {WHERE_TO_LOOK}{saved}")
        for child in children:
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, name="watch processes", daemon=True).start()


def requeue() -> None:
    """Requeue this SLURM job; when it starts for the second time, it continues its run."""
    job = slurm_job()
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (
            error.stderr.strip()
            if isinstance(error, subprocess.CalledProcessError)
            else error.strerror
        )
        log.warning("SLURM does not queue job %s again: scontrol requeue: %s", job, why)
    else:
        notify(f"SLURM queues job {job} again")
