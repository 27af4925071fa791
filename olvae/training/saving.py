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

from olvae import config as cfg
from olvae.config import Config
from olvae.data.read_errors import TooManyUnreadableError
from olvae.files import atomic_write, first_line, reason, write_json
from olvae.library_internals import tree_map
from olvae.metrics import METRICS
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.averaging import find_average
from olvae.modules.base import check_counts, check_not_negative
from olvae.runs import Run

log = logging.getLogger("olvae.training")

# Whether "higher" or "lower" is better, by the name of a validation value.
BETTER = {name: metric.better for name, metric in METRICS.items()}

# Checkpoints that may wait in host memory to be written: the last and the best of one step.
MAX_PENDING_SAVES = 2


class CheckpointError(OSError):
    """A checkpoint could not be written; the message has its path."""


class KeepCheckpoints(Checkpoint):
    """Save ``last.ckpt`` at an interval, the last step and a stop, ``best.ckpt`` by validation.

    Both are in ``checkpoints/``. At a step that is validated, they are saved after the validation,
    so that it is repeated after a kill. The end of a training saves, whether it validates or not.
    Non-finite weights are never saved. An error between two updates, such as an unreadable image,
    saves too.

    Args:
        every_n_steps: updates of the autoencoder between two saves of ``last.ckpt``.
        keep_every_n_steps: also keep ``step=N.ckpt`` at multiples of this; 0 keeps none.
        best: a value of validation, such as ``val/psnr``, ``val/rfid``, ``val_raw/lpips`` or
            ``val/latent_rmse``, by which ``best.ckpt`` is chosen; its value and step are in
            ``best.json``. None keeps no best weights.
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
        self._val_set: str | None = None  # the images of validation
        self._val_set_before: str | None = None  # the ones of a resumed run's checkpoint
        self._saved_step = 0  # of last.ckpt
        self._saved_images = 0  # too, as the step stands still in the discriminator's warm-up
        self._kept_step = 0  # of step=N.ckpt
        # Not to be saved now: before training starts, when a resumed run's optimizers may not be
        # restored yet, and within an update.
        self._started = False
        self._in_step = False
        self._save_after_validation = False
        self._warned = False

    def on_load_checkpoint(self, *args: Any) -> None:
        checkpoint: dict[str, Any] = args[-1]
        self._val_set_before = checkpoint.get("val_set")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        # Names of all values that a validation will have: of metrics, of parts, and of the metrics
        # with the weights before averaging.
        of_parts: dict[str, str] = {}
        for part in pl_module.each_part:
            of_parts |= part.better
        better = BETTER | of_parts
        metrics = list(dict.fromkeys(("psnr", "ssim", *pl_module.val_metrics)))
        others = [name for name in better if name not in BETTER]
        computed = [f"val/{name}" for name in metrics + others]
        if pl_module.use_ema:
            computed += [f"val_raw/{name}" for name in metrics]

        best = self.best or "val/psnr"
        if best not in computed:
            raise ValueError(
                f"best: {best} can't choose the best weights, only {', '.join(computed)} can: add "
                "it to model.params.val_metrics, or set best to null"
            )
        self._sign = 1 if better[best.rpartition("/")[2]] == "higher" else -1
        # A save takes all processes, so the first one decides.
        self._val_set = pl_module.val_set
        before = self._best_before(current_run(trainer)) if trainer.is_global_zero else None
        self._best_value = trainer.strategy.broadcast(before)

    def on_train_start(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        self._saved_step = trainer.global_step
        self._kept_step = trainer.global_step
        self._saved_images = pl_module.images_seen
        self._started = True

    def on_train_batch_start(self, *_: Any) -> None:
        self._in_step = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL, *_: Any
    ) -> None:
        step = trainer.global_step
        every = self.keep_every_n_steps
        if every and step != self._kept_step and step % every == 0:
            self._save(trainer, pl_module, f"step={step:08d}.ckpt")
            self._kept_step = step

        # last.ckpt, now or after the validation of this step.
        due = step != self._saved_step and step % self.every_n_steps == 0
        ends = step == trainer.max_steps or trainer.should_stop
        if due or (ends and pl_module.images_seen > self._saved_images):
            self._save_after_validation = True
            # Whether a validation follows this batch, as Lightning will decide.
            batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            interval = trainer.val_check_batch
            reached = trainer.should_stop or (interval is not None and batches % interval == 0)
            if not (trainer.enable_validation and trainer.limit_val_batches != 0 and reached):
                self._save_last(trainer, pl_module)
        self._in_step = not pl_module.update_is_complete

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        self._keep_best(trainer, pl_module)
        # A callback such as EarlyStopping may have stopped training in this validation.
        stops = trainer.should_stop and pl_module.images_seen > self._saved_images
        if self._save_after_validation or stops:
            self._save_last(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        # Whatever else decided not to validate: a training that ends well is never lost.
        if pl_module.images_seen > self._saved_images:
            self._save_last(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL, exception: BaseException
    ) -> None:
        # A save takes all processes. Only TooManyUnreadableError is raised in each of them.
        in_all = trainer.world_size == 1 or isinstance(exception, TooManyUnreadableError)
        # After the last step the run would seem to be done, without its validation.
        useful = trainer.global_step < trainer.max_steps
        useful &= not isinstance(exception, FloatingPointError | CheckpointError)
        useful &= self._started and pl_module.images_seen > self._saved_images
        if not (in_all and useful):
            return
        # A callback before this one, such as the progress, may have failed after a whole update.
        # Then the average, whose turn is later, still has to move. An interrupt may be within it.
        if self._in_step and isinstance(exception, Exception):
            batches = trainer.fit_loop.epoch_loop.batch_progress.state_dict()["current"]
            over = batches["processed"] == batches["ready"] and pl_module.update_is_complete
            average = find_average(trainer)
            if over and average is not None:
                average.on_train_batch_end(trainer)
            self._in_step = not over
        if not self._in_step:
            self._save(trainer, pl_module, "last.ckpt")

    def _save_last(self, trainer: pl.Trainer, module: LiteAutoencoderKL) -> None:
        self._save(trainer, module, "last.ckpt")
        self._saved_step = trainer.global_step
        self._saved_images = module.images_seen
        self._save_after_validation = False

    def _keep_best(self, trainer: pl.Trainer, module: LiteAutoencoderKL) -> None:
        """Save ``best.ckpt`` if the validation that has just ended is the best one so far."""
        if self.best is None or trainer.sanity_checking:
            return
        values = module.validation_values
        if self.best not in values:
            if trainer.is_global_zero and not self._warned:
                why = "no validation image could be read"
                if values:
                    why = f"{self.best} has no finite value"
                log.warning("%s, so best.ckpt is not kept", why)
            self._warned = True
            return
        value = values[self.best]
        before = self._best_value
        # Written with "not", so that any value improves on nan.
        improved = before is None or not self._sign * value <= self._sign * before
        if improved and math.isfinite(value):
            self._best_value = value
            note = {"metric": self.best, "value": value, "step": trainer.global_step}
            if self._val_set is not None:
                note["val_set"] = self._val_set
            self._save(trainer, module, "best.ckpt", note)

    def _best_before(self, run: Run) -> float | None:
        """Read a resumed run's best value, if it is of the same metric and validation images."""
        note = run.checkpoints / "best.json"
        if not note.is_file():
            return None
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
            # Without a name in runs of versions before this one.
            val_set = before.get("val_set", self._val_set_before)
            same = self._val_set is None or val_set in (None, self._val_set)
            if before["metric"] == self.best and same:
                return float(before["value"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            why = first_line(error)
            log.warning("%s: not readable: %s; the next validation replaces it", note, why)
        return None

    def _save(
        self, trainer: pl.Trainer, module: LiteAutoencoderKL, name: str, note: Config | None = None
    ) -> None:
        """Save a checkpoint of this file name, with ``note`` in JSON beside it; collective.

        FloatingPointError for non-finite weights.
        """
        # The flags are stacked, so that there is one wait for the device.
        run = current_run(trainer)
        names = []
        flags = []
        for tensor_name, tensor in module.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                names.append(tensor_name)
                flags.append(tensor.isfinite().all())
        finite = torch.stack(flags)
        if not finite.all():
            first = names[finite.tolist().index(False)]
            raise FloatingPointError(
                f"non-finite weights at step {trainer.global_step}, in {first}: nothing is saved"
                + last_good(run)
            )
        check_written(trainer, MAX_PENDING_SAVES - 1)
        trainer.save_checkpoint(run.checkpoints / name, storage_options=note)


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Copy a checkpoint to host memory, and write the copy to disk in a thread, in order.

    An error in the thread is raised by :meth:`wait`, which :func:`check_written` calls before each
    save, or by :meth:`teardown`, which Lightning calls at the end of training and after an
    exception.

    Args:
        config: a resumed run's config, and its file. It is written after the first ``last.ckpt``,
            so that config and checkpoint belong together whenever the run is killed.
        checkpoint: a resumed run's checkpoint, already read; emptied when Lightning takes it.
    """

    def __init__(
        self, config: tuple[Config, Path] | None = None, checkpoint: dict[str, Any] | None = None
    ) -> None:
        self._config = config
        self._checkpoint = {} if checkpoint is None else checkpoint
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

        def on_host(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach().to("cpu", copy=True, non_blocking=value.is_cuda)
            return value

        # Copies from a GPU are started all at once, and have arrived after one wait.
        copied = tree_map(on_host, checkpoint)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._pending.append(self._writer.submit(self._write, copied, Path(path), storage_options))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the resumed run's checkpoint, read before; if there is none, read ``path``."""
        taken = dict(self._checkpoint or super().load_checkpoint(path, *args, **kwargs))
        self._checkpoint.clear()
        return taken

    def wait(self, pending: int = 0) -> None:
        """Wait until at most ``pending`` saves are unwritten; CheckpointError if one has failed."""
        errors: list[BaseException] = []
        while self._pending and (len(self._pending) > pending or self._pending[0].done()):
            error = self._pending.popleft().exception()
            if error is not None:
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
            why = first_line(error)
            if not path.parent.is_dir():
                why = "the run's folder is gone"
            elif isinstance(error, OSError):
                why = reason(error)
            message = f"{path}: the checkpoint could not be written: {why}"
            raise CheckpointError(message) from error


def check_written(trainer: pl.Trainer, pending: int = 0) -> None:
    """Wait until at most ``pending`` saves are not on the disk yet; collective.

    The first process writes. If a save has failed there, CheckpointError is raised in all
    processes: the others would wait for it.
    """
    writer = trainer.strategy.checkpoint_io
    failure = ""
    try:
        if isinstance(writer, BackgroundCheckpointIO):
            writer.wait(pending)
    except CheckpointError as error:
        failure = str(error)
    failure = trainer.strategy.broadcast(failure)
    if failure:
        raise CheckpointError(failure)


def last_good(run: Run) -> str:
    """End an error message about lost weights with the place of good ones, if there are any."""
    newest = run.newest_checkpoint
    if not newest.exists():
        return ""
    return f"; the last good weights are in {newest}"


def current_run(trainer: pl.Trainer) -> Run:
    """The run that a trainer trains."""
    return Run(Path(trainer.default_root_dir))
