"""The one screen before training, and the few lines after it."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from olvae.config import Config
from olvae.data.source import Source
from olvae.models.adversary import Adversary
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.modules.counting import count_macs, count_parameters
from olvae.runs import Run
from olvae.training.curves import draw_curves

__all__ = ["print_ending", "print_summary"]


def print_summary(
    settings: Config,
    run: Run,
    trainer: pl.Trainer,
    model: LiteAutoencoderKL,
    source: Source,
    start: int,
) -> None:
    """What will be trained, on what, how; to standard error, from the first process."""
    if not trainer.is_global_zero:
        return
    size, vae = source.size, model.autoencoder
    nominal = vae.encoder.image_size  # what the model is for; the crops of training may be smaller
    latent = (1, vae.decoder.z_channels, nominal // vae.downscale, nominal // vae.downscale)
    crop, position = f"{size}x{size}", f"{size // vae.downscale}x{size // vae.downscale}"
    rows = {
        "run": str(run.path),
        "encoder": _network(model.encoder, (1, vae.encoder.in_channels, nominal, nominal), nominal),
        "decoder": _network(model.decoder, latent, nominal),
        "latent": f"f{vae.downscale}, {vae.latent_channels} channels: {crop} -> {position}",
        "objective": ", ".join(f"{weight:g} {name}" for name, weight in model.objective.weights.items()),
        "data": f"{source.describe()}, {crop}",
        "batch": _batch(trainer, model, source),
        "learning rate": _rate(trainer, model),
        "steps": f"{trainer.max_steps}" + (f", continued after {start} images" if start else ""),
        "device": _device(trainer, settings["precision"]),
        "seed": str(settings["seed"]),
    }
    if model.adversary is not None:
        rows["adversary"] = _adversary(model.adversary)
    if settings["weights"]:
        rows["weights from"] = settings["weights"]
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", escape(value))
    Console(stderr=True).print(Panel(table, title=f"olvae train: {escape(settings['name'])}", expand=False))


def print_ending(run: Run, trainer: pl.Trainer) -> None:
    """Where the results are; draws the curves."""
    curves = draw_curves(run)
    console = Console(stderr=True)
    stopped = trainer.global_step < trainer.max_steps
    console.print(f"{'stopped' if stopped else 'done'} after {trainer.global_step} steps", highlight=False)
    places = {"weights": run.last_checkpoint, "config": run.config, "pictures": run.images, "curves": curves}
    for name, place in places.items():
        if place is not None and place.exists():
            console.print(f"  {name:<9} {place}", highlight=False, soft_wrap=True, markup=False)
    train, evaluate = "olvae train", "olvae evaluate"
    if Path(sys.argv[0]).name == "train.py":
        train, evaluate = "python train.py", "python scripts/compute_metrics.py"
    hint = f"continue with: {train} --resume {run.path}" if stopped else f"evaluate with: {evaluate} {run.path}"
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
    devices = _number(trainer.world_size, "device")
    return f"{total} = {source.batch_size} x {model.accumulate_grad_batches} accumulated x {devices}"


def _number(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _rate(trainer: pl.Trainer, model: LiteAutoencoderKL) -> str:
    end = f"{model.min_lr_factor * model.learning_rate:g} at step {model.decay_steps or trainer.max_steps}"
    warmup = f", warm-up {model.warmup_steps} steps" if model.warmup_steps else ""
    return f"{model.learning_rate:g}, {model.scheduler}{f' to {end}' if model.scheduler == 'cosine' else ''}{warmup}"


def _device(trainer: pl.Trainer, precision: str) -> str:
    if trainer.strategy.root_device.type == "cuda":
        names = f"{trainer.num_devices} x {torch.cuda.get_device_name(trainer.strategy.root_device)}"
    else:
        processes = _number(trainer.num_devices, "process", "processes")
        names = f"CPU, {_number(torch.get_num_threads(), 'thread')}, {processes}"
    return f"{names}, precision {precision}"
