"""Callbacks beside the training step: checkpoints, pictures, health, a graceful stop."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import Tensor

from olvae import config as cfg
from olvae.data.image import to_uint8
from olvae.data.read_errors import TooManyUnreadableError
from olvae.data.source import Batch, Loader
from olvae.devices import Agreement
from olvae.figures import error_map, labelled_grid
from olvae.files import atomic_write, reason, set_aside, write_json
from olvae.metrics.registry import METRICS
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import Run
from olvae.training.loggers import log_picture
from olvae.training.saving import CheckpointError

__all__ = [
    "Health",
    "ImageGrids",
    "KeepCheckpoints",
    "SaveConfig",
    "UnreadableLimit",
    "current_run",
    "last_good",
]


log = logging.getLogger("olvae.training")


BETTER = {name: metric.better for name, metric in METRICS.items()} | {"latent_rmse": "lower"}
"""Which way is better, of the metrics and of the distance between a student's latents and its teacher's."""


class KeepCheckpoints(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` up to date, through the last step and a stop before it.

    They are written by a :class:`~olvae.training.saving.BackgroundCheckpointIO`. Non-finite weights are refused. A
    checkpoint is also saved when training fails between two steps, at an unreadable image for example.

    Args:
        every_n_steps: updates of the autoencoder between two saves.
        keep_every_n_steps: also keep ``step=N.ckpt`` for good at multiples of this; 0 keeps none.
        best: a value of validation, such as ``val/psnr``, ``val/rfid``, ``val_raw/lpips`` or ``val/latent_rmse``: its
            best weights so far are kept as ``best.ckpt``, with value and step in ``best.json``; None keeps none. A
            validation without a readable image changes nothing.
    """

    def __init__(self, every_n_steps: int = 1000, keep_every_n_steps: int = 0, best: str | None = "val/psnr") -> None:
        if best is not None and best.rpartition("/")[2] not in BETTER:
            raise ValueError(f"best: {best!r} is not a metric of validation: choose one of val/{', val/'.join(BETTER)}")
        if every_n_steps < 1 or keep_every_n_steps < 0:
            raise ValueError("every_n_steps must be at least 1, and keep_every_n_steps not negative")
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.best = best
        self._best: float | None = None
        self._saved = self._kept = 0  # steps
        self._images = 0  # seen at the last save: they grow in the discriminator's warm-up too
        self._in_step = False
        self._due = False  # a save, after the validation of this step
        self._warned = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._best = self._best_before(current_run(trainer), trainer.is_global_zero)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        self._saved = self._kept = trainer.global_step
        self._images = pl_module.images_seen

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_step = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        # Saving needs all processes, and only this error is raised in all of them.
        together = trainer.world_size == 1 or isinstance(exception, TooManyUnreadableError)
        useful = not isinstance(exception, FloatingPointError | CheckpointError)  # else what is saved is better
        if together and useful and not self._in_step and pl_module.images_seen > self._images:
            self._save(trainer, pl_module, "last.ckpt")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        step = trainer.global_step
        stopping = step == trainer.max_steps or trainer.should_stop
        if self.keep_every_n_steps and step != self._kept and step % self.keep_every_n_steps == 0:
            self._save(trainer, pl_module, f"step={step:08d}.ckpt")
            self._kept = step
        due = step != self._saved and step % self.every_n_steps == 0
        if due or (stopping and pl_module.images_seen > self._images):
            self._due = True
            if not _validation_follows(trainer):
                self._save_last(trainer, pl_module)
        self._in_step = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_best(trainer, pl_module)
        if self._due:  # not earlier: a run that is killed in between and resumed would leave the validation out
            self._save_last(trainer, pl_module)

    def _save_last(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        self._save(trainer, pl_module, "last.ckpt")
        self._saved, self._images, self._due = trainer.global_step, pl_module.images_seen, False

    def _keep_best(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        after_fit = trainer.state.fn != TrainerFn.FITTING
        if (
            self.best is None
            or trainer.sanity_checking
            or (after_fit and not current_run(trainer).last_checkpoint.is_file())
        ):
            return
        assert isinstance(pl_module, LiteAutoencoderKL)
        values = pl_module.validation_values
        if not values:
            if trainer.is_global_zero and not self._warned:
                log.warning("no validation image could be read, so best.ckpt is not kept")
            self._warned = True
            return
        if after_fit and self.best not in values:
            return  # one of the weights as trained, which are validated while they are trained
        if self.best not in values:
            raise ValueError(
                f"KeepCheckpoints: best: {self.best} is not computed by validation ({', '.join(values)}): add it to "
                "model.params.val_metrics, or set best to null"
            )
        value = values[self.best]
        higher = BETTER[self.best.rpartition("/")[2]] == "higher"
        if self._best is None or (value > self._best if higher else value < self._best):
            self._best = value
            note = {"metric": self.best, "value": value, "step": trainer.global_step}
            if not after_fit:
                self._save(trainer, pl_module, "best.ckpt", note)
            elif trainer.is_global_zero:  # the model has one of two sets of weights, last.ckpt has both
                _copy_last(current_run(trainer), note)

    def _best_before(self, run: Run, is_first: bool) -> float | None:
        """The best value of a run that is resumed, of the same metric. A note that can't be read is set aside."""
        note = run.checkpoints / "best.json"
        if not note.is_file():
            return None
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
            metric, value = before["metric"], float(before["value"])
            if not math.isfinite(value):
                raise ValueError("its value is not finite")
        except (ValueError, KeyError, TypeError, OSError):
            if is_first:
                name = set_aside(note)
                log.warning(
                    "%s: cut off, or not readable: set aside as %s; the next validation replaces best.ckpt", note, name
                )
            return None
        return value if metric == self.best else None

    def _save(
        self, trainer: pl.Trainer, module: pl.LightningModule, name: str, note: dict[str, Any] | None = None
    ) -> None:
        values = {n: t for n, t in module.state_dict().items() if isinstance(t, Tensor) and t.is_floating_point()}
        finite = torch.stack([t.isfinite().all() for t in values.values()])
        if not finite.all():  # the device is waited for once
            first = list(values)[finite.tolist().index(False)]
            raise FloatingPointError(
                f"non-finite weights at step {trainer.global_step}, in {first}: nothing is saved"
                + last_good(current_run(trainer))
            )
        path = current_run(trainer).checkpoints / name
        trainer.save_checkpoint(path, storage_options=note)  # the first process writes


class SaveConfig(Callback):
    """Writes the resolved config: a new run's when training begins, so that a failed start changes nothing; that of one
    that is resumed after the first ``last.ckpt`` of its settings, so that config and checkpoint belong together.

    Args:
        config: of the run.
        run: its folder.
    """

    def __init__(self, config: Mapping[str, Any], run: Run) -> None:
        self.config = config
        self.run = run
        self._written = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not self.run.config.exists():
            self._write()

    def on_saved(self, checkpoint: Path) -> None:
        """A checkpoint is on the disk."""
        if checkpoint.name == self.run.last_checkpoint.name and not self._written:
            self._write()

    def _write(self) -> None:
        cfg.save(self.config, self.run.config)
        self._written = True


class ImageGrids(Callback):
    """Draws a grid at every validation: inputs, reconstructions, errors, and decoded samples from N(0, I).

    It is ``images/step=N.png`` in the run folder and an image in TensorBoard and W&B, drawn with the weights that
    validation uses: the averaged ones if there are any.

    Args:
        count: pictures in a row, from the first validation batch.
    """

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count = count

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LiteAutoencoderKL)
        moments = batch["moments"][: self.count] if "moments" in batch else None
        batch = {"image": batch["image"][: self.count]}
        decoded, posterior = pl_module(pl_module.images(batch), moments=moments)
        reconstruction = to_uint8(decoded)
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0)).to(posterior.mean)
        samples = to_uint8(pl_module.decode_trained(pl_module.autoencoder.from_diffusion(noise)))
        step = trainer.global_step
        grid = labelled_grid(
            {
                f"input, held out, step {step}": batch["image"].cpu(),
                "reconstruction": reconstruction.cpu(),
                "error, black 0 to white 64 of 255": error_map(batch["image"], reconstruction),
                "decoded from N(0, I): noise is expected": samples.cpu(),
            }
        )
        path = current_run(trainer).images / f"step={step:08d}.png"
        try:
            with atomic_write(path) as partial:
                grid.save(partial)
        except OSError as error:  # a picture is no reason to stop
            log.warning("%s: not written: %s", path, reason(error))
        for logger in trainer.loggers:
            log_picture(logger, "val/images", grid, step)


SETTINGS = "model.params.adversary_config.params"


SYMPTOMS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "health/accuracy",
        lambda accuracy: accuracy > 0.95,
        "the discriminator has won: it is right about {value:.0%} of its logits. "
        f"Lower {SETTINGS}.learning_rate_ratio, or set lecam_weight, or r1_weight (such that r1_weight times "
        "train/r1 is about 1)",
    ),
    (
        "health/accuracy",
        lambda accuracy: abs(accuracy - 0.5) < 0.02,
        "the discriminator is blind: it is right about {value:.0%} of its logits, as a coin would be. "
        f"Raise {SETTINGS}.learning_rate_ratio or updates_per_step, or take a larger discriminator",
    ),
    (
        "health/gradient_ratio",
        lambda ratio: ratio > 2.0,
        "the adversarial gradient dominates: at the decoder's last layer it is {value:.1f} times that of the pixel "
        f"terms. Lower {SETTINGS}.weight, or set adaptive_weight",
    ),
)
"""Logged values, a condition on each, and the sentence for when it has held for long."""


class Health(Callback):
    """Warns when the two sides of phase B are out of balance, by the values that are logged.

    Args:
        patience: steps of the autoencoder that a symptom must last, without a break, before a warning; the warning is
            repeated after as many more.
    """

    def __init__(self, patience: int = 1000) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience = patience
        self.console = Console(stderr=True)
        self._since: dict[str, int] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        step = trainer.global_step
        if pl_module.adversary is None or not trainer.is_global_zero or not pl_module.reports:
            return
        for name, holds, sentence in SYMPTOMS:
            value = float(trainer.callback_metrics.get(name, math.nan))
            if not holds(value):  # or it was not logged: no condition holds for nan
                self._since.pop(sentence, None)
            elif (steps := step - self._since.setdefault(sentence, step)) >= self.patience:
                text = f"[bold yellow]step {step}, for {steps} steps: {sentence.format(value=value)}"
                self.console.print(text, highlight=False, soft_wrap=True)
                self._since[sentence] = step


class UnreadableLimit(Callback):
    """Adds up unreadable images over processes, so that all of them stop together at the limit."""

    def __init__(self) -> None:
        self._lost = Agreement()
        self._shared = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        loader = trainer.train_dataloader
        if trainer.world_size == 1 or not isinstance(loader, Loader):
            return
        if self._lost.any_asked(loader.read_errors.lost > self._shared):
            loader.read_errors.share()
            self._shared = loader.read_errors.lost


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Whether this batch is followed by a validation."""
    batches, every = trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.val_check_batch
    return trainer.enable_validation and trainer.limit_val_batches != 0 and every is not None and batches % every == 0


def _copy_last(run: Run, note: Mapping[str, Any]) -> None:
    """Let the last weights be the best ones, too."""
    best = run.checkpoints / "best.ckpt"
    with atomic_write(best) as partial:
        shutil.copyfile(run.last_checkpoint, partial)
    write_json(note, best.with_suffix(".json"))


def last_good(run: Run) -> str:
    """The end of a message about weights that are lost: where good ones are, if anything is saved."""
    last = run.last_checkpoint
    return f"; the last good weights are in {last}" if last.exists() else ""


def current_run(trainer: pl.Trainer) -> Run:
    """The run that a trainer trains."""
    return Run(Path(trainer.default_root_dir))
