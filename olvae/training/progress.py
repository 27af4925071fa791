"""Show the progress of a training: the bar, speed and time left."""

import importlib
import logging
import math
import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from olvae.devices import peak_tflops, precision_name
from olvae.files import ON_WINDOWS
from olvae.models.liteautoencoder import LiteAutoencoderKL

log = logging.getLogger("olvae.training")

FIRST_LINE_S = 3.0  # after so many seconds the time left is known well enough to be shown
LARGE_WAIT_SHARE = 0.1  # of training time spent waiting for data; shown above this

# Estimates, until docs/gpu.md has measurements: the share of a GPU's peak that a training step
# reaches, and the seconds that Python takes to launch a step of both players.
USUAL_SHARE = 0.4
HOST_S = 0.05


def notify(line: str, style: str | None = None) -> None:
    """Print a line on standard error as it is: never cut, so that it can be copied."""
    Console(stderr=True).print(line, style=style, highlight=False, soft_wrap=True, markup=False)


class Status:
    """Measure speed and waits; print them and the loss.

    Validation does not count, nor does the first step, which warms up.

    ``step``: steps before this training.
    """

    def __init__(self, step: int = 0) -> None:
        self.loss = math.nan
        # Steps and images in total: after the first step, and after the last one so far.
        self._first = self._last = (step, 0)
        self._is_warm = False  # whether the first step is over
        self._training_s = self._waiting_s = 0.0
        self._since = time.monotonic()  # the end of the last step or validation

    def batch_arrived(self) -> None:
        if self._is_warm:
            self._waiting_s += time.monotonic() - self._since

    def step_ended(self, step: int, images: int) -> None:
        """Count a step; both numbers are totals."""
        now = time.monotonic()
        self._last = (step, images)
        if self._is_warm:
            self._training_s += now - self._since
        else:
            self._first = self._last
            self._is_warm = True
        self._since = now

    def validation_ended(self) -> None:
        self._since = time.monotonic()

    def images_per_s(self) -> float:
        if not self._training_s:
            return 0.0
        return (self._last[1] - self._first[1]) / self._training_s

    def waiting_share(self) -> float:
        """The share of training time in which no batch was there."""
        if not self._training_s:
            return 0.0
        return self._waiting_s / self._training_s

    def seconds_left(self, last_step: int) -> float:
        done = self._last[0] - self._first[0]
        if not done:
            return 0.0
        return (last_step - self._last[0]) * self._training_s / done

    def __str__(self) -> str:
        """Loss, speed and the share of waiting."""
        texts = []
        if not math.isnan(self.loss):
            texts.append(f"loss {self.loss:.4f}")
        if self._training_s:
            texts.append(f"{self.images_per_s():.1f} images/s")
        share = self.waiting_share()
        if share > LARGE_WAIT_SHARE:
            texts.append(f"waiting for data {share:.0%} (raise data.params.num_workers)")
        return "  ".join(texts)


class StepProgress(ProgressBar):
    """Show a progress bar of the autoencoder's updates; without a terminal print lines instead.

    ``line_every_s``: seconds between lines without a terminal.
    """

    def __init__(self, line_every_s: float = 15.0) -> None:
        super().__init__()
        self.line_every_s = line_every_s
        self.console = Console(stderr=True)
        self._enabled = True
        self._bar: Progress | None = None
        self._status = Status()
        self._shown_at = 0.0
        self._peak: float | None = None  # TFLOP/s of a known GPU

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        self._status = Status(trainer.global_step)
        self._shown_at = time.monotonic() - max(0.0, self.line_every_s - FIRST_LINE_S)
        if pl_module.flop and self._enabled:
            precision = precision_name(str(trainer.precision).partition("-")[0])
            gpu = torch.cuda.get_device_name(trainer.strategy.root_device)
            self._peak = peak_tflops(gpu, precision)
            images = getattr(trainer.train_dataloader, "batch_size", 1)
            notify(describe_step(pl_module.flop, images, self._peak, pl_module.compiled))
        if self._enabled and self.console.is_terminal:
            self._bar = step_bar(self.console, self._status, trainer.global_step, trainer.max_steps)
            self._bar.start()

    def on_train_batch_start(self, *_: Any) -> None:
        self._status.batch_arrived()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL, *_: Any
    ) -> None:
        if not self._enabled:
            return
        # Reading a loss waits for the device: only at steps whose values are logged.
        if pl_module.reports:
            self._status.loss = float(trainer.callback_metrics.get("train/loss", math.nan))
        step = trainer.global_step
        now = time.monotonic()
        self._status.step_ended(step, pl_module.images_seen)
        if pl_module.reports:
            speed = {
                "images_per_s": self._status.images_per_s(),
                "waiting_for_data": self._status.waiting_share(),
                "memory_gib": _memory_gib(trainer.strategy.root_device),
            }
            if torch.cuda.is_available():
                speed["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
                flop_per_s = pl_module.flop * speed["images_per_s"] / trainer.world_size
                speed |= tflops(flop_per_s, self._peak)
            pl_module.log_dict({f"speed/{name}": value for name, value in speed.items()})

        # The bar twice a second, lines more rarely, both at the last step.
        every_s = self.line_every_s if self._bar is None else 0.5
        if step != trainer.max_steps and now - self._shown_at < every_s:
            return
        self._shown_at = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
            return
        texts = [f"step {step}/{trainer.max_steps}", str(self._status)]
        left = timedelta(seconds=round(self._status.seconds_left(trainer.max_steps)))
        if left:
            texts.append(f"{left} left")
        self.console.print("  ".join(filter(None, texts)), soft_wrap=True)

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        self._status.validation_ended()
        texts = []
        for name, value in pl_module.validation_values.items():
            if name.startswith("val/"):
                texts.append(f"{name.removeprefix('val/')} {value:.3f}")
        if texts and self._enabled and not trainer.sanity_checking:
            line = f"step {trainer.global_step}: validation  {'  '.join(texts)}"
            self.console.print(line, highlight=False, soft_wrap=True)


def _memory_gib(device: torch.device) -> float:
    """The most memory that this process has taken: of its GPU, or without one of the machine.

    mps counts no peak: what it has now.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if ON_WINDOWS:
        psutil: Any = importlib.import_module("psutil")
        return float(psutil.Process().memory_info().peak_wset / 2**30)
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def tflops(flop_per_s: float, peak: float | None) -> dict[str, float]:
    """Convert to TFLOP/s, and to a share of a GPU's peak, for the log; leave out unknown ones."""
    if not flop_per_s:
        return {}
    found = {"tflops": flop_per_s / 1e12}
    if peak is not None:
        found["of_peak"] = found["tflops"] / peak
    return found


def describe_step(
    flop: int,
    images: int,
    peak: float | None,
    compiled: bool,
    host_s: float = HOST_S,
    gpu: str = "this GPU",
) -> str:
    """Describe a step's operations, and whether they keep a GPU busy while Python launches them."""
    step = flop * images / 1e12
    text = f"step: {flop / 1e12:.3g} TFLOP an image, {step:.3g} TFLOP for {images} a process"
    if peak is None:
        return text
    seconds = step / (USUAL_SHARE * peak)
    text += f": about {1e3 * seconds:.0f} ms on {gpu}"
    if seconds >= host_s or compiled:
        return text
    enough = math.ceil(images * host_s / seconds)
    return (
        f"{text}, less than Python needs for it: with {enough} images, or "
        "model.params.compile=true, it is busy"
    )


def step_bar(console: Console, status: Status, done: int, total: int) -> Progress:
    """Make the bar of a terminal, on one line; it asks for the status whenever it is drawn."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True)),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    bar.add_task("train", total=total, completed=done, status=status)
    return bar
