"""What training prints: the summary before, the progress bar, and where the results are; and the curves."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from olvae.config import Config
from olvae.data.source import FEW, Source
from olvae.figures import plot_curves
from olvae.models.adversary import Adversary
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.modules.base import count_macs, count_parameters
from olvae.runs import Run

__all__ = [
    "Clock",
    "StatusColumn",
    "StepProgress",
    "draw_curves",
    "is_finished",
    "print_ending",
    "print_finished",
    "print_summary",
]


LONG_WAIT_S = 2.0
"""Waiting for a batch is shown from here on."""

MUCH_WAITING = 0.1
"""The share of training time spent waiting for data is shown from here on."""


class Clock:
    """Rates over training alone, without the time of validation."""

    def __init__(self, step: int = 0) -> None:
        self._first_step = self._step = step
        self._first_images: int | None = None
        self._images = 0
        self._spent = 0.0
        self._waited = 0.0
        self._since = self._shown = time.monotonic()
        self._is_waiting = True

    def count(self, step: int, images: int) -> None:
        """A step has ended.

        Args:
            step, images: totals so far.
        """
        now = time.monotonic()
        if self._first_images is None:  # the first step warms up: rates start after it
            self._first_step, self._first_images = step, images
        else:
            self._spent += now - self._since
        self._is_waiting = True
        self._since, self._step, self._images = now, step, images

    def came(self) -> None:
        """A batch has come."""
        if self._first_images is not None:
            self._waited += time.monotonic() - self._since
        self._is_waiting = False

    def pause(self) -> None:
        """Validation begins."""
        self._is_waiting = False

    def restart(self) -> None:
        """Training goes on."""
        self._since = time.monotonic()
        self._is_waiting = True

    def seconds_waiting(self) -> float:
        """Seconds since the last batch, if they are many; else 0."""
        seconds = time.monotonic() - self._since
        return seconds if self._is_waiting and seconds > LONG_WAIT_S else 0.0

    def waiting(self) -> str:
        """A note if training waits for data: the seconds by now, or the share of its time; else empty."""
        if seconds := self.seconds_waiting():
            return f"waiting for data for {seconds:.0f} s"
        share = self._waited / self._spent if self._spent else 0.0
        return f"waiting for data {share:.0%}" if share > MUCH_WAITING else ""

    def due(self, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._shown < seconds:
            return False
        self._shown = now
        return True

    def images_per_s(self) -> float:
        return (self._images - (self._first_images or 0)) / self._spent if self._spent else 0.0

    def seconds_left(self, last_step: int) -> float:
        done = self._step - self._first_step
        return (last_step - self._step) * self._spent / done if done else 0.0


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class StatusColumn(ProgressColumn):
    """Loss and speed, or waiting for data; drawn at every refresh, also while no step ends."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.clock = clock

    def render(self, task: Task) -> Text:
        waiting = self.clock.waiting()
        status = "" if self.clock.seconds_waiting() else str(task.fields["status"])  # no room for both
        return Text.assemble(status, "  " if status and waiting else "", (waiting, "yellow"))


class StepProgress(ProgressBar):
    """A progress bar over the autoencoder's updates on a terminal; elsewhere a line every few seconds.

    Args:
        line_every_s: seconds between lines without a terminal.
    """

    def __init__(self, line_every_s: float = 15.0) -> None:
        super().__init__()
        self.line_every_s = line_every_s
        self.console = Console(stderr=True)
        self._enabled = True
        self._bar: Progress | None = None
        self._clock = Clock()
        self._loss = math.nan

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._enabled:
            return
        self._clock = Clock(trainer.global_step)
        if self.console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                StatusColumn(self._clock),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, status="")
            self._bar.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.came()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        assert isinstance(pl_module, LiteAutoencoderKL)
        if pl_module.reports:  # between two of these nothing waits for the device
            self._loss = float(trainer.callback_metrics.get("train/loss", math.nan))
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        self._clock.count(step, pl_module.images_seen)
        if self._bar is not None:
            if self._clock.due(0.5) or last:
                self._bar.update(self._bar.task_ids[0], completed=step, status=self._status())
        elif self._clock.due(self.line_every_s) or last:
            left = _hours(self._clock.seconds_left(trainer.max_steps))
            waiting = self._clock.waiting()
            status = f"{self._status()}{'  ' if waiting else ''}{waiting}"
            self.console.print(f"step {step}/{trainer.max_steps}  {status}  {left} left")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.restart()
        assert isinstance(pl_module, LiteAutoencoderKL)
        values = {name: v for name, v in pl_module.validation_values.items() if name.startswith("val/")}
        if values and self._enabled and not trainer.sanity_checking:
            text = "  ".join(f"{name.removeprefix('val/')} {value:.3f}" for name, value in values.items())
            self.console.print(f"step {trainer.global_step}: validation  {text}", highlight=False)

    def _status(self) -> str:
        loss = "" if math.isnan(self._loss) else f"loss {self._loss:.4f}  "
        return f"{loss}{self._clock.images_per_s():.1f} images/s"

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def print_summary(
    settings: Config,
    run: Run,
    trainer: pl.Trainer,
    model: LiteAutoencoderKL,
    source: Source,
    done: int,
) -> None:
    """Print what is trained, on what, how, and what speaks against it; to standard error, from the first process.

    Args:
        done: steps of a run that continues.
    """
    if not trainer.is_global_zero:
        return
    size, vae = source.size, model.autoencoder
    nominal, f = vae.encoder.image_size, vae.downscale  # the crops of training may be smaller
    latent = (1, vae.decoder.z_channels, nominal // f, nominal // f)
    crop, position = f"{size}x{size}", f"{size // f}x{size // f}"
    rows = {
        "encoder": _network(model.encoder, (1, vae.encoder.in_channels, nominal, nominal), nominal),
        "decoder": _network(model.decoder, latent, nominal),
        "latent": f"f{vae.downscale}, {vae.latent_channels} channels: {crop} -> {position}",
        "objective": ", ".join(f"{weight:g} {name}" for name, weight in model.objective.weights.items()),
        "data": f"{source.describe()}, {crop}",
        "batch": _batch(trainer, model, source),
        "learning rate": _rate(trainer, model),
        "steps": f"{trainer.max_steps}" + (f", continued after {done} steps" if done else ""),
        "device": _device(trainer, settings["precision"]),
        "seed": str(settings["seed"]),
    }
    if model.adversary is not None:
        rows["adversary"] = _adversary(model.adversary)
    rows |= {part.name.replace("_", " "): text for part in model.each_part if (text := part.describe())}
    if model.freeze_encoder or model.freeze_decoder:
        rows["trained"] = f"the {'decoder' if model.freeze_encoder else 'encoder'} alone"
    if settings["weights"]:
        rows["weights from"] = settings["weights"]
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", escape(value))
    console = Console(stderr=True)
    console.print(Panel(table, title=f"olvae train: {escape(settings['name'])}", expand=False))
    console.print(f"run: {run.path}", highlight=False, soft_wrap=True, markup=False)  # to be copied: never cut
    for sentence in _warnings(trainer, model, source):
        console.print(f"[yellow]warning:[/] {sentence}", highlight=False, soft_wrap=True)


def _warnings(trainer: pl.Trainer, model: LiteAutoencoderKL, source: Source) -> Iterator[str]:
    """What makes a training or its numbers worse than they look."""
    images, workers, cores = source.val_images, source.num_workers * trainer.world_size, os.cpu_count() or 1
    if images is not None and images < FEW:
        yield (
            f"only {images} held-out image{'s' if images > 1 else ''}: scores are uncertain, and `olvae evaluate` "
            "prints by how much"
        )
    if model.warmup_steps >= trainer.max_steps:
        yield (
            f"the learning rate rises for {model.warmup_steps} steps, and training ends after {trainer.max_steps}: "
            "shorten model.params.warmup_steps for a short trial"
        )
    if workers > cores and trainer.num_nodes == 1:
        yield f"{workers} loader processes on {cores} cores: data.params.num_workers"


def print_ending(run: Run, trainer: pl.Trainer) -> None:
    """Draw the curves, and print where the results are and what to run next."""
    stopped = trainer.global_step < trainer.max_steps
    _print_places(run, f"{'stopped' if stopped else 'done'} after {trainer.global_step} steps", stopped)


def is_finished(run: Run, steps: int) -> bool:
    """Whether training has done everything after this many steps: validation, curves, the best weights."""
    try:
        note = json.loads(run.finished.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(note, dict) and note.get("steps") == steps


def print_finished(run: Run, steps: int) -> None:
    """As :func:`print_ending`, for a run that was finished before."""
    more = f"lightning.trainer.max_steps={2 * steps} trains on"
    _print_places(run, f"all {steps} steps of this run are done, and nothing is left to do: {more}", False)


def _print_places(run: Run, title: str, stopped: bool) -> None:
    curves = draw_curves(run)
    console = Console(stderr=True)
    console.print(title, highlight=False, soft_wrap=True)
    places = {"weights": run.last_checkpoint, "config": run.config, "pictures": run.images, "curves": curves}
    for name, place in places.items():
        if place is not None and place.exists():
            console.print(f"  {name:<9} {place}", highlight=False, soft_wrap=True, markup=False)
    hint = f"continue with: olvae train --resume {run.path}" if stopped else f"evaluate with: olvae evaluate {run.path}"
    console.print(hint, highlight=False, soft_wrap=True, markup=False)


def _network(module: torch.nn.Module, shape: tuple[int, ...], size: int) -> str:
    macs = count_macs(module, *shape)
    return f"{count_parameters(module) / 1e6:.2f} M parameters, {macs / 1e9:.2f} GMACs per {size}x{size} image"


def _adversary(adversary: Adversary) -> str:
    name = type(adversary.discriminator).__name__
    begins = f" from step {adversary.start_step}" if adversary.start_step else ""
    weight = f"{'adaptive ' if adversary.adaptive_weight else ''}weight {adversary.weight:g}"
    parameters = f"{count_parameters(adversary.discriminator) / 1e6:.2f} M parameters"
    return f"{name}, {parameters}, {adversary.loss}, {weight}{begins}"


def _batch(trainer: pl.Trainer, model: LiteAutoencoderKL, source: Source) -> str:
    total = source.batch_size * model.accumulate_grad_batches * trainer.world_size
    devices = f"{trainer.world_size} device{'' if trainer.world_size == 1 else 's'}"
    return f"{total} = {source.batch_size} x {model.accumulate_grad_batches} accumulated x {devices}"


def _rate(trainer: pl.Trainer, model: LiteAutoencoderKL) -> str:
    end = f"{model.min_lr_factor * model.learning_rate:g} at step {model.decay_steps or trainer.max_steps}"
    warmup = f", warm-up {model.warmup_steps} steps" if model.warmup_steps else ""
    return f"{model.learning_rate:g}, {model.scheduler}{f' to {end}' if model.scheduler == 'cosine' else ''}{warmup}"


def _device(trainer: pl.Trainer, precision: str) -> str:
    if trainer.strategy.root_device.type == "cuda":
        names = f"{trainer.world_size} x {torch.cuda.get_device_name(trainer.strategy.root_device)}"
    else:
        threads, processes = torch.get_num_threads(), trainer.world_size
        names = (
            f"CPU, {threads} thread{'' if threads == 1 else 's'}, {processes} process{'' if processes == 1 else 'es'}"
        )
    return f"{names}, precision {precision}"


def draw_curves(run: Run) -> Path | None:
    """Draw every scalar of training and validation over the steps into ``images/curves.png``.

    Returns:
        The picture, or None if nothing was logged yet, or a folder of the run is gone.
    """
    folder = run.path / "tensorboard"
    if not (folder.is_dir() and run.images.is_dir()):
        return None
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 2000})
    events.Reload()
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for tag in sorted(events.Tags()["scalars"]):
        if tag.startswith(("train/", "val/")):
            last_at = {event.step: event.value for event in events.Scalars(tag)}  # a resumed step counts once
            steps = sorted(last_at)
            curves[tag] = ([float(step) for step in steps], [last_at[step] for step in steps])
    if not curves:
        return None
    path = run.images / "curves.png"
    plot_curves(curves, path)
    return path
