"""Print what a run trains before its first step, and where its results are after the last."""

import math
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from olvae.config import Config
from olvae.data.pixels.size_and_range import Sides
from olvae.data.source import MIN_VAL_IMAGES, Source
from olvae.devices import cores, device_name, sharing_cores
from olvae.figures import plot_curves
from olvae.files import counted
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.optimizers import lr_factor
from olvae.modules.counting import count_macs, count_parameters
from olvae.runs import Run, Settings, entry_of
from olvae.training.loggers import read_curves
from olvae.training.progress import FIRST_LINE_S, notify


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
        table.add_row("[bold]continued", f"after {counted(done, 'step')}")
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
    f = vae.downscale
    size = source.size // vae.enlarge
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
    ranks = counted(processes, "process", "es")
    workers = "no loader processes"
    if source.num_workers:
        workers = counted(source.num_workers, "loader process", "es")
    device = f"CPU process of {counted(torch.get_num_threads(), 'thread')}"
    if trainer.strategy.root_device.type != "cpu":
        device = device_name(trainer.strategy.root_device)
    terms = [f"{weight:g} {name}" for name, weight in model.objective.weights.items()]
    rows = {
        "encoder": _network(model.encoder, (1, vae.encoder.in_channels, *size), size),
        "decoder": _network(model.decoder, (1, vae.decoder.z_channels, *size // f), size),
        "latent": f"f{f}, {counted(vae.latent_channels, 'channel')}: {size} -> {size // f}",
        "objective": ", ".join(terms),
        "data": f"{source.describe()}, {source.size}; {workers}",
        "batch": f"{batch} = {images} x {batches} accumulated x {ranks}",
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
    warm_up = f", warm-up {counted(model.warmup_steps, 'step')}" if model.warmup_steps else ""
    muon = " with Muon" if model.optimizer == "muon" else ""
    return f"{model.learning_rate:g}{muon}, {model.scheduler}{end}{warm_up}"


def _warnings(trainer: pl.Trainer, model: LiteAutoencoderKL, source: Source) -> Iterator[str]:
    """Warn of settings that make a training or its scores worse."""
    images = source.val_images
    own = cores()
    workers = source.num_workers * sharing_cores(trainer.world_size // trainer.num_nodes)
    if images is not None and images < MIN_VAL_IMAGES:
        yield (
            f"only {counted(images, 'held-out image')}: scores are uncertain, and `olvae evaluate` "
            "prints by how much"
        )
    if model.warmup_steps >= trainer.max_steps:
        yield (
            f"the learning rate rises until step {model.warmup_steps}: shorten "
            "model.params.warmup_steps for a trial"
        )
    if workers > own:
        yield f"{workers} loader processes on {own} cores: lower data.params.num_workers"


def describe_new_rate(
    model: LiteAutoencoderKL, max_steps: int, checkpoint: Config, previous: Config
) -> str:
    """Say that a resumed run's learning rate is not as it was; nothing if it is.

    ``previous`` is the config that the run had, ``checkpoint`` has the rate of its next step.
    """
    before = float(checkpoint["optimizer_states"][0]["param_groups"][0]["lr"])
    end = model.decay_steps or max_steps
    factor = lr_factor(
        checkpoint["global_step"], model.scheduler, model.warmup_steps, end, model.min_lr_factor
    )
    now = model.learning_rate * factor * checkpoint["rate_factor"]
    if math.isclose(before, now, rel_tol=1e-3):
        return ""
    line = f"the learning rate is {now:.3g} from this step on, and would have been {before:.3g}"

    # A cosine that ends elsewhere, perhaps only because there are more steps.
    old_end = entry_of(previous, "model.params.decay_steps")
    old_end = old_end or entry_of(previous, "lightning.trainer.max_steps")
    if model.scheduler == "cosine" and old_end != end:
        line += (
            f": its cosine ends at step {end} instead of {old_end}; model.params.decay_steps="
            f"{old_end} leaves it as it was"
        )
    return line


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
        if round(psnr, 2) == round(start, 2):
            beside = ", as the linear code"
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
