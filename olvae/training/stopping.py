"""Ends a training before its last step: signals, a limit on time, a job that SLURM queues again."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from olvae.config import ConfigError, load
from olvae.devices import Agreement
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import Run

__all__ = ["GracefulStop", "TrainingStopped", "parse_time", "requeue", "requeued_run", "slurm_job"]

log = logging.getLogger("olvae.training")

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}


class TrainingStopped(KeyboardInterrupt):
    """Training ended after a step, with a checkpoint; how to continue has been printed.

    Args:
        preempted: it was a scheduler's signal or the limit on time, not Ctrl-C.
    """

    def __init__(self, preempted: bool = False) -> None:
        super().__init__()
        self.preempted = preempted


class GracefulStop(Callback):
    """Ends training after the step, with a checkpoint, at the first Ctrl-C, SIGTERM or SIGUSR1; at once at the second.

    A validation that has begun is finished first.

    Args:
        time_limit: seconds from now on after which training ends in the same way; None for no limit.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.reason: str | None = None
        """What asked this process to stop: the name of a signal, or the limit on time."""
        self.agreed = False
        """Whether all processes stop because of one; the same in each."""
        self._end = None if time_limit is None else time.monotonic() + time_limit
        self._agreement = Agreement()
        self._before: dict[int, Any] = {}

    @property
    def preempted(self) -> bool:
        """Whether something else than Ctrl-C in this process ended training."""
        return self.agreed and self.reason != SIGNALS[signal.SIGINT]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            # Not earlier: Lightning's fit sets handlers of its own before, which end training without a checkpoint.
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        if not pl_module.update_is_complete:
            return
        if self.reason is None and self._end is not None and time.monotonic() >= self._end:
            self._say("the limit on time")
        if self._agreement.any_asked(self.reason is not None):
            self.agreed = True
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # no validation on the way out

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.agreed |= self._agreement.any_asked(self.reason is not None, wait=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            raise KeyboardInterrupt
        self._say(SIGNALS[signal.Signals(number)])

    def _say(self, reason: str) -> None:
        self.reason = reason
        Console(stderr=True).print(f"{reason}: stopping after this step, with a checkpoint; a further signal: at once")


def parse_time(text: str) -> float:
    """Seconds of a time such as 3h50m, 45m, 1d12h or 90s.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not match.group():
        raise ConfigError(f"--time-limit {text}: give days, hours, minutes or seconds, as in 3h50m, 45m or 1d12h")
    units = (86400, 3600, 60, 1)
    return float(sum(int(number or 0) * unit for number, unit in zip(match.groups(), units, strict=True)))


def slurm_job() -> str | None:
    """The job that SLURM runs this process in, by the name that scontrol takes."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue() -> None:
    """Let SLURM queue this job again: started for the second time, it continues its run."""
    job = slurm_job()
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error.strerror
        log.warning("SLURM does not queue job %s again: scontrol requeue: %s", job, said)
    else:
        Console(stderr=True).print(f"SLURM queues job {job} again", highlight=False)


def requeued_run(logdir: Path, name: str) -> Run | None:
    """The run of this name that this job made before SLURM started it for another time; None if it did not."""
    job = slurm_job()
    if job is None or not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return None
    for path in sorted(logdir.glob(f"*_{name}_*"), reverse=True):
        run = Run(path)
        if run.last_checkpoint.is_file() and run.config.is_file():
            with contextlib.suppress(ConfigError):  # of another run, perhaps
                settings = load([run.config]).get("run") or {}
                if (settings.get("slurm_job"), settings.get("name")) == (job, name):
                    return run
    return None
