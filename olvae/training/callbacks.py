"""Callbacks: pictures, imbalance, unreadable images, non-finite steps, stops, and traces."""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from olvae.checkpoint import read_checkpoint, state_dict_of
from olvae.data.source import Batch, BatchLoader
from olvae.devices import tf32
from olvae.figures import error_map, labelled_grid
from olvae.files import ECHO_S, SIGNALS, atomic_write, counted, reason
from olvae.launcher import Agreement
from olvae.library_internals import dump_memory_history, record_memory_history
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.averaging import find_average
from olvae.models.updates.nonfinite import BadStep
from olvae.modules.base import check_counts, check_not_negative
from olvae.runs import Run
from olvae.training.loggers import log_picture
from olvae.training.progress import notify
from olvae.training.saving import check_written, current_run, last_good

log = logging.getLogger("olvae.training")

WARNING = "bold yellow"


class ImageGrids(Callback):
    """Draw a grid at every validation: inputs, reconstructions, errors, and samples from N(0, I).

    It goes to ``images/step=N.png`` in the run folder, TensorBoard and W&B. The weights are
    validation's: the averaged ones if there are any.

    ``count``: images in a row, the first of validation.
    """

    def __init__(self, count: int = 8) -> None:
        check_counts(1, count=count)
        self.count = count
        self._batches: list[Batch] = []  # of this validation, until there are enough images

    def on_validation_epoch_start(self, *_: Any) -> None:
        self._batches = []

    def on_validation_batch_end(
        self, _: pl.Trainer, __: Any, ___: Any, batch: Batch, *____: Any
    ) -> None:
        if sum(len(one["image"]) for one in self._batches) < self.count:
            self._batches.append(batch)

    @tf32(False)
    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        if not self._batches or trainer.sanity_checking or not trainer.is_global_zero:
            return
        # The first images, (B, C, H, W), with the latents that the data bring, if they do.
        moments = None
        given = [one["moments"] for one in self._batches if "moments" in one]
        if given:
            moments = torch.cat(given)[: self.count]
        read = torch.cat([one["image"] for one in self._batches])[: self.count]

        # Reconstructions, and noise as a diffusion model would hand it to the decoder.
        pixels = pl_module.pixel_range
        decoded, posterior = pl_module(pl_module.images({"image": read}), moments=moments)
        images = pixels.levels(read)
        reconstruction = pixels.to_levels(decoded)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        latent = pl_module.autoencoder.from_diffusion(noise)
        samples = pixels.to_levels(pl_module.decode_trained(latent))

        # The picture, to the disk and to the loggers.
        step = trainer.global_step
        rows = {
            f"input, held out, step {step}": pixels.picture(images).cpu(),
            "reconstruction": pixels.picture(reconstruction).cpu(),
            "error, black 0 to white 64 of 255": error_map(images, reconstruction),
            "decoded from N(0, I): noise is expected": pixels.picture(samples).cpu(),
        }
        grid = labelled_grid(rows)
        path = current_run(trainer).images / f"step={step:08d}.png"
        try:
            with atomic_write(path) as partial:
                grid.save(partial)
        except OSError as error:  # no reason to stop a training
            log.warning("%s: not written: %s", path, reason(error))
        for logger in trainer.loggers:
            log_picture(logger, "val/images", grid, step)


ADVERSARY = "model.params.adversary_config.params"

SYMPTOMS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "health/accuracy",
        lambda accuracy: accuracy > 0.95,
        "the discriminator has won: it is right about {value:.0%} of its logits. "
        f"Lower {ADVERSARY}.learning_rate_ratio, or set lecam_weight, or r1_weight (such that "
        "r1_weight times train/r1 is about 1)",
    ),
    (
        "health/accuracy",
        lambda accuracy: abs(accuracy - 0.5) < 0.02,
        "the discriminator is blind: it is right about {value:.0%} of its logits, as a coin would "
        f"be. Raise {ADVERSARY}.learning_rate_ratio or updates_per_step, or take a larger "
        "discriminator",
    ),
    (
        "health/gradient_ratio",
        lambda ratio: ratio > 2.0,
        "the adversarial gradient dominates: at the decoder's last layer it is {value:.1f} times "
        f"the pixel terms' gradient. Lower {ADVERSARY}.weight, or set adaptive_weight",
    ),
)
"""Logged value, a condition on it, and the warning once the condition has held for long."""


class Health(Callback):
    """Warn when autoencoder and discriminator are out of balance, judged by logged values.

    ``patience``: steps that a symptom must last, without a break, before each warning.
    """

    def __init__(self, patience: int = 1000) -> None:
        check_counts(1, patience=patience)
        self.patience = patience
        self._since: dict[str, int] = {}  # sentence of a lasting symptom -> its first step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL, *_: Any
    ) -> None:
        step = trainer.global_step
        if pl_module.adversary is None or not trainer.is_global_zero or not pl_module.reports:
            return
        for name, holds, sentence in SYMPTOMS:
            value = float(pl_module.logged.get(name, math.nan))
            if not holds(value):  # no condition holds for nan, a value that was not logged
                self._since.pop(sentence, None)
                continue
            steps = step - self._since.setdefault(sentence, step)
            if steps >= self.patience:
                notify(f"step {step}, for {steps} steps: {sentence.format(value=value)}", WARNING)
                self._since[sentence] = step


class UnreadableLimit(Callback):
    """Add up unreadable images over processes, so that all of them stop together at the limit."""

    def __init__(self) -> None:
        self._lost = Agreement()
        self._shared = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, BatchLoader):
            return
        if self._lost.any_asked(loader.read_errors.lost > self._shared):
            loader.read_errors.share()
            self._shared = loader.read_errors.lost


# Steps after which the flags of bad steps are read from the device, even if nothing is logged.
MAX_UNREAD_STEPS = 1000


class BadSteps(Callback):
    """Count non-finite training steps; after several in a row, return to the last checkpoint.

    A step with a non-finite loss or gradient changes nothing, see
    :class:`~olvae.models.updates.nonfinite.NonFiniteGuard`. It counts in ``health/bad_steps``, and
    ``bad_steps.jsonl`` names its images. After ``in_a_row`` of them, weights, averages and
    optimizers are loaded from ``last.ckpt``, the learning rates are multiplied by ``rate_factor``,
    and training continues with the next images; after ``returns`` such returns it stops. Under
    fp16, gradients that were only too large for the loss scale do not count: the scale is lowered.

    Args:
        in_a_row: non-finite steps before a return.
        returns: returns before training stops.
        rate_factor: factor of the learning rates at each return, in (0, 1].
    """

    def __init__(self, in_a_row: int = 20, returns: int = 3, rate_factor: float = 0.5) -> None:
        check_counts(1, in_a_row=in_a_row)
        check_not_negative(returns=returns)
        if not 0 < rate_factor <= 1:
            raise ValueError(f"rate_factor must be above 0, and at most 1, got {rate_factor}")
        self.in_a_row = in_a_row
        self.returns = returns
        self.rate_factor = rate_factor
        self.bad = 0  # non-finite steps of the whole run
        self.returned = 0  # returns to a checkpoint
        self._row = 0  # non-finite steps since the last good one

    def state_dict(self) -> dict[str, Any]:
        return {"bad": self.bad, "returned": self.returned, "row": self._row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bad = state_dict["bad"]
        self.returned = state_dict["returned"]
        self._row = state_dict["row"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL, *_: Any
    ) -> None:
        # Also at a stop, before it is saved: the count, or a return, belongs to the checkpoint.
        if pl_module.reports or trainer.should_stop or pl_module.guard.pending >= MAX_UNREAD_STEPS:
            self._read(trainer, pl_module)
        if pl_module.reports:
            pl_module.log("health/bad_steps", float(self.bad))

    def on_train_end(self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL) -> None:
        self._read(trainer, pl_module)

    def _read(self, trainer: pl.Trainer, model: LiteAutoencoderKL) -> None:
        """Count the steps since the last reading; report bad ones, and return if there are many."""
        bad: list[BadStep] = []
        for step in model.guard.collect():
            if step is None:
                self._row = 0
            elif not step.overflow:
                self._row += 1
                bad.append(step)
        if not bad:
            return
        self.bad += len(bad)
        self._report(trainer, bad)
        if self._row >= self.in_a_row:
            self._return(trainer, model, bad[-1])

    def _report(self, trainer: pl.Trainer, bad: list[BadStep]) -> None:
        """Print the first of some non-finite steps, and append all of them to the run's file."""
        path = current_run(trainer).bad_steps
        rank = trainer.global_rank
        lines = [{"step": s.step, "rank": rank, "term": s.term, "keys": s.keys} for s in bad]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:  # no reason to stop a training
            log.warning("%s: the images of bad steps are not noted: %s", path, reason(error))
        if trainer.is_global_zero:
            first = bad[0]
            what = "step" if all(step.whole for step in bad) else "update"
            rest = f": this {what}"
            if len(bad) > 1:
                rest = f", and {len(bad) - 1} of the steps after it are bad too: these {what}s"
            count = f"({self.bad} in this run so far); {path.name} names the images"
            message = f"{first.term} is not finite{rest} changed nothing {count}"
            notify(f"step {first.step}: {message}", WARNING)

    def _return(self, trainer: pl.Trainer, model: LiteAutoencoderKL, last: BadStep) -> None:
        """Load the last checkpoint and lower the learning rates.

        FloatingPointError after too many returns.
        """
        run = current_run(trainer)
        row = self._row
        self._row = 0
        check_written(trainer)
        if self.returned == self.returns:
            spite = ""
            if self.returned:
                times = "a return" if self.returned == 1 else f"{self.returned} returns"
                spite = f", in spite of {times} to good weights with a lower learning rate"
            raise FloatingPointError(
                f"{last.term} was not finite for {row} steps in a row until step {last.step}"
                f"{spite}: look at the images named in {run.bad_steps}, lower "
                "model.base_learning_rate, or set `precision` to bf16 or 32" + last_good(run)
            )

        # The rates are read before and set after, as the optimizers' states have the old ones. The
        # first process decides whether there is a checkpoint: the others may not see it yet.
        self.returned += 1
        where = "there is no checkpoint yet: the weights stay"
        rates = [group["lr"] for group in _parameter_groups(trainer)]
        if trainer.strategy.broadcast(run.newest_checkpoint.is_file()):
            step = _restore(trainer, model, run)
            where = f"weights and optimizers are back at step {step}"
        model.rate_factor *= self.rate_factor
        for group, rate in zip(_parameter_groups(trainer), rates, strict=True):
            group["lr"] = rate * self.rate_factor
        if trainer.is_global_zero:
            notify(
                f"step {trainer.global_step}: {row} bad steps in a row: {where}, the learning rate "
                f"is multiplied by {self.rate_factor:g} "
                f"(return {self.returned} of {self.returns})",
                WARNING,
            )


def _parameter_groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _restore(trainer: pl.Trainer, model: LiteAutoencoderKL, run: Run) -> int:
    """Load weights, average and optimizers of the last checkpoint; return its step."""
    file = run.newest_checkpoint
    checkpoint = read_checkpoint(file)
    # The average first: it also puts the weights as trained back into the model.
    average = find_average(trainer)
    if average is not None:
        average.restore(checkpoint["state_dict"])
    model.load_state_dict(state_dict_of(checkpoint, file, raw=True))
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        optimizer.load_state_dict(state)
    return int(checkpoint["global_step"])


class GracefulStop(Callback):
    """Stop training after the step, with a checkpoint, at Ctrl-C, SIGTERM and others of SIGNALS.

    At a second signal, :data:`ECHO_S` seconds after the first or later, it stops at once. A
    validation that has begun is finished first. The last step is validated whatever the interval,
    before it is saved.

    ``time_limit``: seconds from now on, after which training stops in the same way.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.reason: str | None = None  # of this process: the name of a signal, or the time limit
        self.agreed = False  # whether all processes stop; the same in each
        self.requeues = False  # whether SIGUSR1 reached any of them
        self._end = math.inf if time_limit is None else time.monotonic() + time_limit
        self._announced_at = math.inf
        self._agreement = Agreement()
        # Handlers outside of training, and the signals whose handlers are replaced now.
        self._outer: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        self._replaced: set[int] = set()

    @property
    def preempted(self) -> bool:
        """Whether anything but Ctrl-C in this process ended training."""
        stops = self.agreed or self.reason is not None
        return stops and self.reason != SIGNALS[signal.SIGINT]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals as in training, so that an echo of the first one changes nothing."""
        self._listen()
        try:
            yield
        finally:
            self.teardown()

    def on_train_start(self, *_: Any) -> None:
        # Here, Lightning has set handlers of its own, which end training without a checkpoint:
        # replace them.
        self._listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL, *_: Any
    ) -> None:
        if not pl_module.update_is_complete:
            return
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # with a validation
            return
        if self.reason is None and time.monotonic() >= self._end:
            self._announce("the time limit")
        if self._all_stop():
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # no validation on the way out

    def on_train_end(self, *_: Any) -> None:
        self._all_stop(wait=True)

    def _all_stop(self, wait: bool = False) -> bool:
        """Agree with all processes whether to stop, and to requeue by SIGUSR1. Collective."""
        asked = 0
        if self.reason is not None:
            asked = 2 if self.reason == "SIGUSR1" else 1
        answer = self._agreement.any_asked(asked, wait)
        self.agreed |= answer > 0
        self.requeues |= answer == 2
        return self.agreed

    def teardown(self, *_: Any, **__: Any) -> None:
        while self._replaced:
            number = self._replaced.pop()
            signal.signal(number, self._outer[number])

    def _listen(self) -> None:
        # No other thread than the main one may set handlers.
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._outer.items():
            # nohup ignores SIGHUP, which is to stay so.
            under_nohup = SIGNALS[number] == "SIGHUP" and handler is signal.SIG_IGN
            if handler is not None and not under_nohup:
                signal.signal(number, self._ask)
                self._replaced.add(number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note the first one; stop at once at a later one that is no echo."""
        if self.reason is None:
            self._announce(SIGNALS[number])
        elif time.monotonic() - self._announced_at >= ECHO_S:
            # The command's own handler knows the exit code.
            outer = self._outer[number]
            if callable(outer):
                outer(number, frame)
            raise KeyboardInterrupt

    def _announce(self, reason: str) -> None:
        self._announced_at = time.monotonic()
        self.reason = reason
        notify(
            f"{reason}: stopping after this step, with a checkpoint; a further signal, after a "
            "second: at once"
        )


# First steps, left out: kernels are chosen, memory is allocated, networks are compiled.
UNTRACED = 3


class StepTrace(Callback):
    """Trace ``steps`` steps of the first process into ``trace.json``, for https://ui.perfetto.dev.

    ``trace.txt`` has the operations that take most time. If a GPU's memory runs out,
    ``memory.pickle`` is a snapshot for https://docs.pytorch.org/memory_viz. All are in the run
    folder. ValueError for fewer steps than one.
    """

    def __init__(self, steps: int = 3) -> None:
        check_counts(1, steps=steps)
        self.steps = steps
        self._done = 0
        self._profile: profile | None = None

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            record_memory_history(entries=100_000)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._done == UNTRACED and self._profile is None and trainer.is_global_zero:
            activities = [ProfilerActivity.CPU]
            if trainer.strategy.root_device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LiteAutoencoderKL, *_: Any
    ) -> None:
        self._done += pl_module.update_is_complete
        if self._profile is not None and self._done == UNTRACED + self.steps:
            self._write(trainer, self._profile)
            self._profile = None

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._drop()
        if self._done < UNTRACED + self.steps and trainer.is_global_zero:
            notify(f"nothing is traced, because that needs {UNTRACED + self.steps} steps", WARNING)

    def on_exception(
        self, trainer: pl.Trainer, _: pl.LightningModule, exception: BaseException
    ) -> None:
        self._drop()
        on_cuda = trainer.strategy.root_device.type == "cuda"
        if on_cuda and isinstance(exception, torch.OutOfMemoryError):
            path = current_run(trainer).path / "memory.pickle"
            dump_memory_history(str(path))
            notify(f"a snapshot of the memory is in {path}")

    def _drop(self) -> None:
        """Stop a trace that the run's end cuts off: a process that exits in one crashes."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, trainer: pl.Trainer, traced: profile) -> None:
        traced.stop()
        on_gpu = trainer.strategy.root_device.type == "cuda"
        trace = current_run(trainer).path / "trace.json"
        traced.export_chrome_trace(str(trace))

        # The operations by the time they take themselves, on the device.
        averages = traced.key_averages()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = averages.table(sort_by=order, row_limit=50)
        trace.with_suffix(".txt").write_text(table, encoding="utf-8")
        launches = ""
        if on_gpu:
            launches = f", {count_kernels(averages) / self.steps:.0f} kernels a step"
        notify(f"{counted(self.steps, 'step')} traced in {trace}{launches}")


def count_kernels(averages: Iterable[FunctionEventAvg]) -> int:
    """Count the kernels of a trace: all that ran on the GPU but copies, memsets and annotations."""
    kernels = 0
    for row in averages:
        moved = str(row.key).startswith(("Memcpy", "Memset"))
        if row.device_type.name == "CUDA" and not row.is_user_annotation and not moved:
            kernels += row.count
    return kernels
