"""Show a training: progress bar, summary, ending with curves, loggers (TensorBoard, W&B, CSV)."""

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

FIRST_LINE_S = 3.0  # after so many seconds the time left is known well enough to be shown
LARGE_WAIT_SHARE = 0.1  # of training time spent waiting for data; shown above this

# Estimates, until docs/gpu.md has measurements: the share of a GPU's peak that a training step
# reaches, and the seconds that Python takes to launch a step of both players.
USUAL_SHARE = 0.4
HOST_S = 0.05


def notify(line: str, style: str | None = None) -> None:
    """Print a line on standard error as it is: never cut, so that it can be copied."""
    Console(stderr=True).print(line, style=style, highlight=False, soft_wrap=True, markup=False)


# Progress bar


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
                "memory_gib": _memory_gib(),
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


def _memory_gib() -> float:
    """The most memory that this process has taken: of its GPU, or without one of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
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


# Summary before the first step, and results after the last


def print_summary(
    settings: Settings,
    run: Run,
    trainer: pl.Trainer,
    model: LiteAutoencoderKL,
    source: Source,
    done: int,
    seen: int,
) -> None:
    """Print networks, data and settings, and warnings.

    A resumed run has ``done`` steps, and ``seen`` images.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _rows(settings, trainer, model, source, done, seen).items():
        table.add_row(f"[bold]{name}", escape(value))
    if done:
        table.add_row("[bold]continued", f"after {done} steps")
    title = f"olvae train: {escape(settings.name)}"
    Console(stderr=True).print(Panel(table, title=title, expand=False))
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
    """Write the rows of the summary: title -> text."""
    # Sizes of images and latents, and of a batch over all processes.
    vae = model.autoencoder
    size = source.size
    f = vae.downscale
    steps = trainer.max_steps
    images = source.batch_size
    batches = model.accumulate_grad_batches
    processes = trainer.world_size
    batch = images * batches * processes

    # Images of the whole run, and how often they are an epoch, which a stream may not have.
    in_all = seen + (steps - done) * batch
    epoch = source.samples_per_epoch
    each = ""
    if epoch:
        each = f", {in_all / epoch:,.1f} times {epoch:,}"
    end = ""
    if model.scheduler == "cosine":
        lowest = model.min_lr_factor * model.learning_rate
        end = f" to {lowest:g} at step {model.decay_steps or steps}"
    device = f"CPU process of {torch.get_num_threads()} threads"
    if trainer.strategy.root_device.type == "cuda":
        device = torch.cuda.get_device_name(trainer.strategy.root_device)
    terms = [f"{weight:g} {name}" for name, weight in model.objective.weights.items()]
    rows = {
        "encoder": _network(model.encoder, (1, vae.encoder.in_channels, *size), size),
        "decoder": _network(model.decoder, (1, vae.decoder.z_channels, *size // f), size),
        "latent": f"f{f}, {vae.latent_channels} channels: {size} -> {size // f}",
        "objective": ", ".join(terms),
        "data": f"{source.describe()}, {size}; {source.num_workers or 'no'} loader processes",
        "batch": f"{batch} = {images} x {batches} accumulated x {processes} processes",
        "learning rate": describe_rate(model, end),
        "steps": f"{steps}: {in_all:,} images{each}; the time left is shown after "
        f"{FIRST_LINE_S:.0f} seconds",
        "device": f"{processes} x {device}, precision {settings.precision}",
        "seed": str(settings.seed),
    }

    # Rows that not every training has.
    adversary = model.adversary
    if adversary is not None:
        millions = count_parameters(adversary.discriminator) / 1e6
        adaptive = "adaptive " if adversary.adaptive_weight else ""
        rows["adversary"] = (
            f"{type(adversary.discriminator).__name__}, {millions:.2f} M parameters, "
            f"{adversary.loss}, {adaptive}weight {adversary.weight:g} from step "
            f"{adversary.start_step}"
        )
    for part in model.each_part:
        text = part.describe()
        if text:
            rows[part.name.replace("_", " ")] = text
    if model.frozen_halves:
        rows["trained"] = f"the {'decoder' if model.freeze_encoder else 'encoder'} alone"
    if settings.weights:
        rows["weights from"] = settings.weights
    return rows


def _network(module: torch.nn.Module, shape: tuple[int, ...], size: Sides) -> str:
    macs = count_macs(module, *shape)
    parameters = count_parameters(module)
    return f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.2f} GMACs per {size} image"


def describe_rate(model: LiteAutoencoderKL, end: str = "") -> str:
    """Describe the learning rate, its schedule, the schedule's ``end`` if given, and warm-up."""
    warm_up = f", warm-up {model.warmup_steps} steps" if model.warmup_steps else ""
    muon = " with Muon" if model.optimizer == "muon" else ""
    return f"{model.learning_rate:g}{muon}, {model.scheduler}{end}{warm_up}"


def _warnings(trainer: pl.Trainer, model: LiteAutoencoderKL, source: Source) -> Iterator[str]:
    """Warn of settings that make a training or its scores worse."""
    images = source.val_images
    own = cores()
    workers = source.num_workers * sharing_cores(trainer.world_size // trainer.num_nodes)
    if images is not None and images < MIN_VAL_IMAGES:
        yield (
            f"only {images} held-out images: scores are uncertain, and `olvae evaluate` prints by "
            "how much"
        )
    if model.warmup_steps >= trainer.max_steps:
        yield (
            f"the learning rate rises until step {model.warmup_steps}: shorten "
            "model.params.warmup_steps for a trial"
        )
    if workers > own:
        yield f"{workers} loader processes on {own} cores: lower data.params.num_workers"


def describe_gain(model: LiteAutoencoderKL) -> str:
    """Compare the last validation's PSNR with the linear code's, where training began, if known."""
    psnr = model.validation_values.get("val/psnr", math.nan)
    if math.isnan(psnr):
        return ""
    beside = ""
    start = model.linear_psnr
    if start is not None:
        side = "below" if psnr < start else "above"
        beside = f", {abs(psnr - start):.2f} {side} the linear code"
    return f": {psnr:.2f} dB in the last validation{beside}"


def print_ending(run: Run, title: str) -> None:
    """Plot the curves of training and validation; print a title and where the results are."""
    places = {
        "weights": run.last_checkpoint,
        "config": run.config,
        "pictures": run.images,
        "curves": run.images / "curves.png",
    }
    if run.images.is_dir():
        curves = read_curves(run)
        if curves:
            plot_curves(curves, places["curves"])
    notify(title)
    for name, place in places.items():
        if place.exists():
            notify(f"  {name:<9} {place}")


def read_curves(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Read steps and values of every scalar of training and validation from TensorBoard's files."""
    folder = run.path / "tensorboard"
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 2000})
    events.Reload()
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for tag in sorted(events.Tags()["scalars"]):
        if tag.startswith(("train/", "val/")):
            # A step may be there twice, before and after a resume: the later one counts.
            written = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
            value_at = {float(event.step): event.value for event in written}
            steps = sorted(value_at)
            curves[tag] = (steps, [value_at[step] for step in steps])
    return curves


# Loggers


def make_loggers(nodes: Mapping[str, Config], run: Run) -> list[Logger]:
    """Make TensorBoard's logger, then the loggers of ``lightning.logger``.

    By default CSVLogger writes into ``csv`` in the run's folder, a file for each start of the run,
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
        class_name = node["target"].rpartition(".")[2]
        params = {**defaults.get(class_name, {}), **(node.get("params") or {})}
        try:
            logger = cfg.instantiate({**node, "params": params})
        except (ModuleNotFoundError, ConfigError) as error:
            raise ConfigError(f"lightning.logger.{name}: {error}") from error
        if not isinstance(logger, Logger):
            target = node["target"]
            raise ConfigError(f"lightning.logger.{name}: {target} is no logger of Lightning")
        loggers.append(logger)

    # A logger whose disk is full must not end the training: wrap what writes.
    _silence_tensorboard()
    for logger in loggers:
        for method in ("log_metrics", "log_hyperparams", "save", "finalize"):
            setattr(logger, method, partial(_attempt, logger, getattr(logger, method)))
    return loggers


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Log a picture to TensorBoard or W&B; Lightning's other loggers have no common method."""
    if isinstance(logger, TensorBoardLogger):
        pixels = np.asarray(picture)
        _attempt(logger, lambda: logger.experiment.add_image(name, pixels, step, dataformats="HWC"))
    elif isinstance(logger, WandbLogger):
        _attempt(logger, lambda: logger.log_image(name, [picture], step))


@cache
def _silence_tensorboard() -> None:
    """Print no traceback of TensorBoard's thread: the next call raises its error as well."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        writes = type(args.thread).__module__.startswith("tensorboard")
        if not (writes and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook


_failed: WeakSet[Logger] = WeakSet()  # loggers that can't write any more


def _attempt(logger: Logger, action: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Call a logger; a full disk or a missing folder ends its logging, not the training."""
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
