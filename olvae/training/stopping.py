"""Stop a training early, with a checkpoint: signals, a time limit, requeueing by SLURM."""

import logging
import re
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from olvae.config import ConfigError
from olvae.devices import Agreement
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import Run
from olvae.training.resuming import slurm_job

log = logging.getLogger("olvae.training")

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}


class TrainingStopped(KeyboardInterrupt):
    """Training ended after a step, with a checkpoint.

    Args:
        run: that can be continued.
        preempted: by a scheduler's signal or the time limit, not by Ctrl-C.
    """

    def __init__(self, run: Run, preempted: bool = False) -> None:
        super().__init__()
        self.run = run
        self.preempted = preempted


class GracefulStop(Callback):
    """Stop training after the step, with a checkpoint, at Ctrl-C, SIGTERM or SIGUSR1; at a second signal at once.

    A validation that has begun is finished first.

    Args:
        time_limit: seconds from now on, after which training stops in the same way; None for no limit.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.reason: str | None = None
        """Why this process stops: the name of a signal, or the time limit."""
        self.agreed = False
        """Whether all processes stop; the same in each."""
        self._end = None if time_limit is None else time.monotonic() + time_limit
        self._agreement = Agreement()
        self._before: dict[int, Any] = {}

    @property
    def preempted(self) -> bool:
        """Whether anything but Ctrl-C in this process ended training."""
        return self.agreed and self.reason != SIGNALS[signal.SIGINT]

    def on_train_start(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            # After Lightning's fit has set handlers of its own, which end training without a checkpoint.
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        if not pl_module.update_is_complete:
            return
        if self.reason is None and self._end is not None and time.monotonic() >= self._end:
            self._announce("the time limit")
        if self._agreement.any_asked(self.reason is not None):
            self.agreed = True
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # no validation on the way out

    def on_train_end(self, *_: Any) -> None:
        self.agreed |= self._agreement.any_asked(self.reason is not None, wait=True)

    def teardown(self, *_: Any, **__: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.reason is not None:
            raise KeyboardInterrupt
        self._announce(SIGNALS[signal.Signals(number)])

    def _announce(self, reason: str) -> None:
        self.reason = reason
        Console(stderr=True).print(f"{reason}: stopping after this step, with a checkpoint; a further signal: at once")


def parse_time(text: str) -> float:
    """Convert a time such as 3h50m, 45m, 1d12h or 90s to seconds.

    Raises:
        ConfigError: it is not one.
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not match.group():
        raise ConfigError(f"`time_limit` {text}: give days, hours, minutes or seconds, as in 3h50m, 45m or 1d12h")
    units = (86400, 3600, 60, 1)
    return float(sum(int(number or 0) * unit for number, unit in zip(match.groups(), units, strict=True)))


def requeue() -> None:
    """Let SLURM queue this job again; when it starts for the second time, it continues its run."""
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
