"""Show a training: summary, progress bar, loggers (TensorBoard, W&B, CSV), ending and curves."""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from olvae import config as cfg
from olvae.config import Config, ConfigError
from olvae.data.pixels.size_and_range import Sides
from olvae.data.source import MIN_VAL_IMAGES, Source
from olvae.devices import cores, peak_tflops, precision_name, sharing_cores
from olvae.figures import plot_curves
from olvae.files import reason
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.modules.base import count_macs, count_parameters
from olvae.runs import Run, Settings

log = logging.getLogger("olvae.training")

FIRST_LINE_S = 3.0  # after which the time left is known well enough to be shown
USUAL_SHARE = 0.4  # of a GPU's peak that a training step reaches: an estimate, until docs/gpu.md has a measurement
HOST_S = 0.05  # that Python takes to launch a step of both players: an estimate, too
LARGE_WAIT_SHARE = 0.1  # the share of training time spent waiting for data is shown above this


def notify(line: str, style: str | None = None) -> None:
    """Print a line on standard error as it is: never cut, so that it can be copied."""
    Console(stderr=True).print(line, style=style, highlight=False, soft_wrap=True, markup=False)


class Status:
    """Measure speed and waits, without validation and without the first step, which warms up; print them and the loss.

    ``step``: steps before this training.
    """

    def __init__(self, step: int = 0) -> None:
        self.loss = math.nan
        self._first = self._last = (step, 0)  # steps and images in total
        self._is_warm = False
        self._training_s = self._waiting_s = 0.0
        self._since = time.monotonic()

    def batch_arrived(self) -> None:
        if self._is_warm:
            self._waiting_s += time.monotonic() - self._since

    def step_ended(self, step: int, images: int) -> None:
        """Count a step; both numbers are totals."""
        now = time.monotonic()
        self._last = step, images
        if self._is_warm:
            self._training_s += now - self._since
        else:
            self._first, self._is_warm = self._last, True
        self._since = now

    def validation_ended(self) -> None:
        self._since = time.monotonic()

    def images_per_s(self) -> float:
        return (self._last[1] - self._first[1]) / self._training_s if self._training_s else 0.0

    def waiting_share(self) -> float:
        """The share of training time in which no batch was there."""
        return self._waiting_s / self._training_s if self._training_s else 0.0

    def seconds_left(self, last_step: int) -> float:
        done = self._last[0] - self._first[0]
        return (last_step - self._last[0]) * self._training_s / done if done else 0.0

    def __str__(self) -> str:
        """Loss, speed and the share of waiting."""
        texts = [] if math.isnan(self.loss) else [f"loss {self.loss:.4f}"]
        if self._training_s:
            texts.append(f"{self.images_per_s():.1f} images/s")
        if (share := self.waiting_share()) > LARGE_WAIT_SHARE:
            texts.append(f"waiting for data {share:.0%} (raise data.params.num_workers)")
        return "  ".join(texts)


class StepProgress(ProgressBar):
    """Show a progress bar over the autoencoder's updates on a terminal; elsewhere print a line every few seconds.

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
        self._peak: float | None = None  # of a known GPU, in TFLOP/s

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        self._status = Status(trainer.global_step)
        self._shown_at = time.monotonic() - max(0.0, self.line_every_s - FIRST_LINE_S)
        if pl_module.flop and self._enabled:
            precision = precision_name(str(trainer.precision).partition("-")[0])
            self._peak = peak_tflops(
                torch.cuda.get_device_name(trainer.strategy.root_device), precision
            )
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
        if pl_module.reports:  # at other steps, nothing waits for the device
            self._status.loss = float(trainer.callback_metrics.get("train/loss", math.nan))
        step, now = trainer.global_step, time.monotonic()
        self._status.step_ended(step, pl_module.images_seen)
        if pl_module.reports:
            speed = {
                "images_per_s": self._status.images_per_s(),
                "waiting_for_data": self._status.waiting_share(),
            }
            speed |= {"memory_gib": _memory_gib()}
            if torch.cuda.is_available():
                speed["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
                speed |= tflops(
                    pl_module.flop * speed["images_per_s"] / trainer.world_size, self._peak
                )
            pl_module.log_dict({f"speed/{name}": value for name, value in speed.items()})
        if step != trainer.max_steps and now - self._shown_at < (
            self.line_every_s if self._bar is None else 0.5
        ):
            return
        self._shown_at = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
        else:
            left = timedelta(seconds=round(self._status.seconds_left(trainer.max_steps)))
            texts = [
                f"step {step}/{trainer.max_steps}",
                str(self._status),
                f"{left} left" if left else "",
            ]
            self.console.print("  ".join(filter(None, texts)), soft_wrap=True)

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        self._status.validation_ended()
        values = {
            name: v for name, v in pl_module.validation_values.items() if name.startswith("val/")
        }
        if values and self._enabled and not trainer.sanity_checking:
            text = "  ".join(
                f"{name.removeprefix('val/')} {value:.3f}" for name, value in values.items()
            )
            self.console.print(
                f"step {trainer.global_step}: validation  {text}", highlight=False, soft_wrap=True
            )


def _memory_gib() -> float:
    """The most memory that this process has taken: of its GPU, or without one of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 2**10)
        / 2**30
    )


def tflops(flop_per_s: float, peak: float | None) -> dict[str, float]:
    """Name TFLOP/s, and their share of a GPU's peak, to be logged; without those that are unknown."""
    found = {"tflops": flop_per_s / 1e12} if flop_per_s else {}
    return found if peak is None or not found else {**found, "of_peak": found["tflops"] / peak}


def describe_rate(model: LiteAutoencoderKL, end: str = "") -> str:
    """Describe the learning rate and its schedule, with where that ends, if it is given."""
    warm_up = f", warm-up {model.warmup_steps} steps" if model.warmup_steps else ""
    muon = " with Muon" if model.optimizer == "muon" else ""
    return f"{model.learning_rate:g}{muon}, {model.scheduler}{end}{warm_up}"


def describe_step(
    flop: int,
    images: int,
    peak: float | None,
    compiled: bool,
    host_s: float = HOST_S,
    gpu: str = "this GPU",
) -> str:
    """Describe the operations of a step of some images, and whether they keep a GPU busy while Python launches them."""
    step = flop * images / 1e12
    text = f"step: {flop / 1e12:.3g} TFLOP an image, {step:.3g} TFLOP for {images} a process"
    if peak is None:
        return text
    seconds = step / (USUAL_SHARE * peak)
    text += f": about {1e3 * seconds:.0f} ms on {gpu}"
    if seconds >= host_s or compiled:
        return text
    enough = math.ceil(images * host_s / seconds)
    return f"{text}, less than Python needs for it: with {enough} images, or model.params.compile=true, it is busy"


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


def print_summary(
    settings: Settings,
    run: Run,
    trainer: pl.Trainer,
    model: LiteAutoencoderKL,
    source: Source,
    done: int,
    seen: int,
) -> None:
    """Print networks, data and settings, and warnings; a resumed run has ``done`` steps, and ``seen`` images."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _rows(settings, trainer, model, source, done, seen).items():
        table.add_row(f"[bold]{name}", escape(value))
    if done:
        table.add_row("[bold]continued", f"after {done} steps")
    Console(stderr=True).print(
        Panel(table, title=f"olvae train: {escape(settings.name)}", expand=False)
    )
    notify(f"run: {run.path}")
    for sentence in _warnings(trainer, model, source):
        notify(f"warning: {sentence}", "yellow")


def _rows(
    settings: Settings,
    trainer: pl.Trainer,
    model: LiteAutoencoderKL,
    source: Source,
    done: int,
    seen: int,
) -> dict[str, str]:
    vae, size, f, processes = (
        model.autoencoder,
        source.size,
        model.autoencoder.downscale,
        trainer.world_size,
    )
    images, batches, steps = source.batch_size, model.accumulate_grad_batches, trainer.max_steps
    batch, epoch = images * batches * processes, source.samples_per_epoch
    in_all = seen + (steps - done) * batch
    each = f", {in_all / epoch:,.1f} times {epoch:,}" if epoch else ""
    end = f" to {model.min_lr_factor * model.learning_rate:g} at step {model.decay_steps or steps}"
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    name = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else f"CPU process of {torch.get_num_threads()} threads"
    )
    rows = {
        "encoder": _network(model.encoder, (1, vae.encoder.in_channels, *size), size),
        "decoder": _network(model.decoder, (1, vae.decoder.z_channels, *size // f), size),
        "latent": f"f{f}, {vae.latent_channels} channels: {size} -> {size // f}",
        "objective": ", ".join(
            f"{weight:g} {name}" for name, weight in model.objective.weights.items()
        ),
        "data": f"{source.describe()}, {size}; {source.num_workers or 'no'} loader processes",
        "batch": f"{batch} = {images} x {batches} accumulated x {processes} processes",
        "learning rate": describe_rate(model, end if model.scheduler == "cosine" else ""),
        "steps": f"{steps}: {in_all:,} images{each}; the time left is shown after {FIRST_LINE_S:.0f} seconds",
        "device": f"{processes} x {name}, precision {settings.precision}",
        "seed": str(settings.seed),
    }
    if (adversary := model.adversary) is not None:
        rows["adversary"] = (
            f"{type(adversary.discriminator).__name__}, {count_parameters(adversary.discriminator) / 1e6:.2f} M "
            f"parameters, {adversary.loss}, {'adaptive ' if adversary.adaptive_weight else ''}weight "
            f"{adversary.weight:g} from step {adversary.start_step}"
        )
    rows |= {
        part.name.replace("_", " "): text for part in model.each_part if (text := part.describe())
    }
    if model.frozen_halves:
        rows["trained"] = f"the {'decoder' if model.freeze_encoder else 'encoder'} alone"
    if settings.weights:
        rows["weights from"] = settings.weights
    return rows


def _network(module: torch.nn.Module, shape: tuple[int, ...], size: Sides) -> str:
    macs = count_macs(module, *shape)
    return f"{count_parameters(module) / 1e6:.2f} M parameters, {macs / 1e9:.2f} GMACs per {size} image"


def _warnings(trainer: pl.Trainer, model: LiteAutoencoderKL, source: Source) -> Iterator[str]:
    """Warn of settings that make a training or its scores worse."""
    images, own = source.val_images, cores()
    workers = source.num_workers * sharing_cores(trainer.world_size // trainer.num_nodes)
    if images is not None and images < MIN_VAL_IMAGES:
        yield f"only {images} held-out images: scores are uncertain, and `olvae evaluate` prints by how much"
    if model.warmup_steps >= trainer.max_steps:
        yield f"the learning rate rises until step {model.warmup_steps}: shorten model.params.warmup_steps for a trial"
    if workers > own:
        yield f"{workers} loader processes on {own} cores: lower data.params.num_workers"


def describe_gain(model: LiteAutoencoderKL) -> str:
    """The last validation's PSNR beside that of the linear code, where training began; empty without one."""
    psnr, start = model.validation_values.get("val/psnr", math.nan), model.linear_psnr
    if math.isnan(psnr):
        return ""
    beside = (
        ""
        if start is None
        else f", {abs(psnr - start):.2f} {'below' if psnr < start else 'above'} the linear code"
    )
    return f": {psnr:.2f} dB in the last validation{beside}"


def print_ending(run: Run, title: str) -> None:
    """Draw every scalar of training and validation over the steps, and print a title and where the results are."""
    places = {"weights": run.last_checkpoint, "config": run.config, "pictures": run.images}
    places["curves"] = run.images / "curves.png"
    if run.images.is_dir() and (curves := read_curves(run)):
        plot_curves(curves, places["curves"])
    notify(title)
    for name, place in places.items():
        if place.exists():
            notify(f"  {name:<9} {place}")


def read_curves(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Read steps and values of every scalar of training and validation; a step that was resumed counts once."""
    if not (folder := run.path / "tensorboard").is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 2000})
    events.Reload()
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for tag in sorted(events.Tags()["scalars"]):
        if tag.startswith(("train/", "val/")):
            written = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
            last_at = dict(sorted({float(e.step): e.value for e in written}.items()))
            curves[tag] = list(last_at), list(last_at.values())
    return curves


def make_loggers(nodes: Mapping[str, Config], run: Run) -> list[Logger]:
    """Make TensorBoard's logger, then those of ``lightning.logger``.

    Unless the node says otherwise, CSVLogger writes into ``csv`` in the run's folder, a file for each start of the run,
    and WandbLogger continues the W&B run of the folder's name. ConfigError if one can't be made.
    """
    loggers: list[Logger] = [
        TensorBoardLogger(run.path, name="", version="", sub_dir="tensorboard")
    ]
    unique = run.path.resolve().name
    defaults: dict[str, Config] = {
        "CSVLogger": {"save_dir": str(run.path), "name": "csv"},
        "WandbLogger": {"save_dir": str(run.path), "name": unique, "id": unique, "resume": "allow"},
    }
    for name, node in nodes.items():
        params = {
            **defaults.get(node["target"].rpartition(".")[2], {}),
            **(node.get("params") or {}),
        }
        try:
            logger = cfg.instantiate({**node, "params": params})
        except (ModuleNotFoundError, ConfigError) as error:
            raise ConfigError(f"lightning.logger.{name}: {error}") from error
        if not isinstance(logger, Logger):
            raise ConfigError(
                f"lightning.logger.{name}: {node['target']} is no logger of Lightning"
            )
        loggers.append(logger)
    _silence_tensorboard()
    for logger in loggers:
        for method in ("log_metrics", "log_hyperparams", "save", "finalize"):
            setattr(logger, method, partial(_attempt, logger, getattr(logger, method)))
    return loggers


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Log a picture to TensorBoard or W&B; Lightning's other loggers have no common way to take one."""
    if isinstance(logger, TensorBoardLogger):
        pixels = np.asarray(picture)
        _attempt(logger, lambda: logger.experiment.add_image(name, pixels, step, dataformats="HWC"))
    elif isinstance(logger, WandbLogger):
        _attempt(logger, lambda: logger.log_image(name, [picture], step))


@cache
def _silence_tensorboard() -> None:
    """Leave out the traceback of TensorBoard's thread, whose error is raised by the next call as well."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (
            type(args.thread).__module__.startswith("tensorboard")
            and isinstance(args.exc_value, OSError)
        ):
            before(args)

    threading.excepthook = hook


_failed: WeakSet[Logger] = WeakSet()


def _attempt(logger: Logger, action: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Let a logger write; a full disk or a missing folder ends its logging, not the training."""
    if logger in _failed:
        return None
    try:
        return action(*args, **settings)
    except (OSError, ValueError) as error:
        cause = error.__cause__ or error  # Lightning puts TensorBoard's into a ValueError
        if not isinstance(cause, OSError):
            raise
        _failed.add(logger)
        log.warning("%s: nothing more is logged there: %s", type(logger).__name__, reason(cause))
        return None
