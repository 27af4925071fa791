"""Keep a training's checkpoints: when to save, the best, and writing to disk in the background."""

import json
import logging
import math
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils._pytree import tree_map

from olvae import config as cfg
from olvae.config import Config
from olvae.data.read_errors import TooManyUnreadableError
from olvae.files import atomic_write, first_line, write_json
from olvae.metrics import METRICS
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.modules.base import check_counts, check_not_negative
from olvae.runs import Run

log = logging.getLogger("olvae.training")

BETTER = {
    name: metric.better for name, metric in METRICS.items()
}  # higher or lower, by the name of a validation value
MAX_PENDING = (
    2  # checkpoints that may wait in host memory to be written: the last and the best of one step
)


class CheckpointError(OSError):
    """A checkpoint could not be written; the message has its path."""


class KeepCheckpoints(Checkpoint):
    """Save ``checkpoints/last.ckpt`` at an interval, at the last step and at a stop, and ``best.ckpt`` by validation.

    At a step that is validated, both are saved after it, so that after a kill the validation is repeated. Non-finite
    weights are never saved. An error between two updates, such as an unreadable image, saves too.

    Args:
        every_n_steps: updates of the autoencoder between two saves of ``last.ckpt``.
        keep_every_n_steps: also keep ``step=N.ckpt`` at multiples of this; 0 keeps none.
        best: a value of validation, such as ``val/psnr``, ``val/rfid``, ``val_raw/lpips`` or ``val/latent_rmse``, by
            which ``best.ckpt`` is chosen; its value and step are in ``best.json``. None keeps no best weights.
    """

    def __init__(
        self, every_n_steps: int = 1000, keep_every_n_steps: int = 0, best: str | None = "val/psnr"
    ) -> None:
        check_counts(1, every_n_steps=every_n_steps)
        check_not_negative(keep_every_n_steps=keep_every_n_steps)
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.best = best
        self._best_value: float | None = None
        self._saved_step = self._kept_step = 0
        self._saved_images = 0  # beside the step, which stands still in the discriminator's warm-up
        self._in_step = (
            True  # until training starts: before, a resumed run's optimizers may not be restored
        )
        self._save_after_validation = False
        self._warned = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        better = BETTER | {
            name: which for part in pl_module.each_part for name, which in part.better.items()
        }
        metrics = dict.fromkeys(("psnr", "ssim", *pl_module.val_metrics))
        computed = [
            f"val/{name}" for name in (*metrics, *(name for name in better if name not in BETTER))
        ]
        computed += [f"val_raw/{name}" for name in metrics if pl_module.use_ema]
        best = self.best or "val/psnr"
        if best not in computed:
            raise ValueError(
                f"best: {best} can't choose the best weights, only {', '.join(computed)} can: add it to "
                "model.params.val_metrics, or set best to null"
            )
        self._sign = 1 if better[best.rpartition("/")[2]] == "higher" else -1
        before = self._best_before(current_run(trainer)) if trainer.is_global_zero else None
        self._best_value = trainer.strategy.broadcast(
            before
        )  # a save takes all processes, so one decides

    def on_train_start(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        self._saved_step = self._kept_step = trainer.global_step
        self._saved_images = pl_module.images_seen
        self._in_step = False

    def on_train_batch_start(self, *_: Any) -> None:
        self._in_step = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL, *_: Any
    ) -> None:
        step = trainer.global_step
        if (
            self.keep_every_n_steps
            and step != self._kept_step
            and step % self.keep_every_n_steps == 0
        ):
            self._save(trainer, pl_module, f"step={step:08d}.ckpt")
            self._kept_step = step
        due = step != self._saved_step and step % self.every_n_steps == 0
        ends = step == trainer.max_steps or trainer.should_stop
        if due or (ends and pl_module.images_seen > self._saved_images):
            self._save_after_validation = True
            if not _validation_follows(trainer):
                self._save_last(trainer, pl_module)
        self._in_step = not pl_module.update_is_complete

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        self._keep_best(trainer, pl_module)
        stops = (
            trainer.should_stop and pl_module.images_seen > self._saved_images
        )  # by a callback, as EarlyStopping
        if self._save_after_validation or stops:
            self._save_last(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL, exception: BaseException
    ) -> None:
        # A save takes all processes, and of all errors only TooManyUnreadableError is raised in each of them.
        in_all = trainer.world_size == 1 or isinstance(exception, TooManyUnreadableError)
        useful = not isinstance(exception, FloatingPointError | CheckpointError)
        useful &= (
            trainer.global_step < trainer.max_steps
        )  # else the run would seem to be done, without its validation
        if in_all and useful and not self._in_step and pl_module.images_seen > self._saved_images:
            self._save(trainer, pl_module, "last.ckpt")

    def _save_last(self, trainer: pl.Trainer, module: LiteAutoencoderKL) -> None:
        self._save(trainer, module, "last.ckpt")
        self._saved_step, self._saved_images = trainer.global_step, module.images_seen
        self._save_after_validation = False

    def _keep_best(self, trainer: pl.Trainer, module: LiteAutoencoderKL) -> None:
        """Save ``best.ckpt`` if the validation that has just ended is the best one so far."""
        if self.best is None or trainer.sanity_checking:
            return
        values = module.validation_values
        if self.best not in values:
            if trainer.is_global_zero and not self._warned:
                why = (
                    f"{self.best} has no finite value"
                    if values
                    else "no validation image could be read"
                )
                log.warning("%s, so best.ckpt is not kept", why)
            self._warned = True
            return
        value, before = values[self.best], self._best_value
        improved = before is None or not self._sign * value <= self._sign * before  # or that is nan
        if improved and math.isfinite(value):
            self._best_value = value
            note = {"metric": self.best, "value": value, "step": trainer.global_step}
            self._save(trainer, module, "best.ckpt", note)

    def _best_before(self, run: Run) -> float | None:
        """Read the best value of a resumed run, if it is of the same metric; ``last.ckpt`` may be older."""
        note = run.checkpoints / "best.json"
        if not note.is_file():
            return None
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
            return float(before["value"]) if before["metric"] == self.best else None
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning(
                "%s: not readable: %s; the next validation replaces it", note, first_line(error)
            )
            return None

    def _save(
        self, trainer: pl.Trainer, module: LiteAutoencoderKL, name: str, note: Config | None = None
    ) -> None:
        values = {
            n: t
            for n, t in module.state_dict().items()
            if isinstance(t, Tensor) and t.is_floating_point()
        }
        finite = torch.stack([t.isfinite().all() for t in values.values()])
        if not finite.all():  # one wait for the device
            first = list(values)[finite.tolist().index(False)]
            raise FloatingPointError(
                f"non-finite weights at step {trainer.global_step}, in {first}: nothing is saved"
                + last_good(current_run(trainer))
            )
        check_written(trainer, MAX_PENDING - 1)
        trainer.save_checkpoint(
            current_run(trainer).checkpoints / name, storage_options=note
        )  # the first one writes


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Copy a checkpoint to host memory, and write the copy to disk in a thread, in the order of the saves.

    An error in the thread is raised by :meth:`wait`, which :func:`check_written` calls before each save, or by
    :meth:`teardown`, which Lightning calls at the end of training and after an exception. ``config`` is a resumed
    run's, and its file, which is written after the first ``last.ckpt``, so that config and checkpoint belong together
    whenever the run is killed; ``checkpoint`` is what was read of such a run, and is emptied as Lightning takes it.
    """

    def __init__(
        self, config: tuple[Config, Path] | None = None, checkpoint: dict[str, Any] | None = None
    ) -> None:
        self._config, self._checkpoint = config, {} if checkpoint is None else checkpoint
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: deque[Future[None]] = deque()

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Start to save; the tensors may change as soon as this returns.

        ``storage_options`` are written in JSON beside the complete checkpoint: a.json for a.ckpt.
        """
        copied = tree_map(_on_host, checkpoint)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._pending.append(self._writer.submit(self._write, copied, Path(path), storage_options))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The resumed run's checkpoint, which is not read again; later, and in a new run, that of ``path``."""
        taken = dict(self._checkpoint or super().load_checkpoint(path, *args, **kwargs))
        self._checkpoint.clear()
        return taken

    def wait(self, pending: int = 0) -> None:
        """Wait until at most so many saves are not on the disk yet; raise CheckpointError if one has failed."""
        errors: list[BaseException] = []
        while self._pending and (len(self._pending) > pending or self._pending[0].done()):
            if (error := self._pending.popleft().exception()) is not None:
                errors.append(error)
        if errors:
            raise errors[0]

    def teardown(self) -> None:
        failed = sys.exc_info()[0] is not None  # training has an error of its own, which ends it
        try:
            self.wait()
        except CheckpointError as error:
            if not failed:
                raise
            log.error("%s", error)

    def _write(self, checkpoint: dict[str, Any], path: Path, note: dict[str, Any] | None) -> None:
        try:
            with atomic_write(path) as partial:
                torch.save(checkpoint, partial)
            if note is not None:
                write_json(note, path.with_suffix(".json"))
            if self._config is not None and path.name == "last.ckpt":
                cfg.save(*self._config)
                self._config = None
        except Exception as error:
            reason = first_line(error) if path.parent.is_dir() else "the run's folder is gone"
            raise CheckpointError(
                f"{path}: the checkpoint could not be written: {reason}"
            ) from error


def check_written(trainer: pl.Trainer, pending: int = 0) -> None:
    """Wait until at most so many saves are not on the disk yet; collective.

    Raises CheckpointError in all processes if one has failed, in the first process, which writes: the others would wait
    for it.
    """
    writer, failure = trainer.strategy.checkpoint_io, ""
    try:
        if isinstance(writer, BackgroundCheckpointIO):
            writer.wait(pending)
    except CheckpointError as error:
        failure = str(error)
    if failure := trainer.strategy.broadcast(failure):
        raise CheckpointError(failure)


def _on_host(value: Any) -> Any:
    """Copy a tensor to host memory, from a GPU without waiting: it has arrived once that is synchronised."""
    return (
        value.detach().to("cpu", copy=True, non_blocking=True)
        if isinstance(value, Tensor)
        else value
    )


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Whether this batch is followed by a validation."""
    batches, every = trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.val_check_batch
    due = trainer.should_stop or (every is not None and batches % every == 0)
    return bool(trainer.enable_validation and trainer.limit_val_batches != 0 and due)


def last_good(run: Run) -> str:
    """End an error message about lost weights with the place of good ones, if there are any."""
    last = run.last_checkpoint
    return f"; the last good weights are in {last}" if last.exists() else ""


def current_run(trainer: pl.Trainer) -> Run:
    """The run that a trainer trains."""
    return Run(Path(trainer.default_root_dir))
