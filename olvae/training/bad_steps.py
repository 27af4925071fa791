"""What follows from steps whose numbers were not finite: they are told, counted, and in a row lead back."""

import json
import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from olvae.checkpoint import read_checkpoint, state_dict_of
from olvae.models.averaging import find_average
from olvae.models.bad_steps import BadStep
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import Run
from olvae.training.callbacks import current_run, last_good
from olvae.training.saving import BackgroundCheckpointIO

__all__ = ["BadSteps"]

log = logging.getLogger("olvae.training")

MOST_UNSEEN = 1000
"""Steps after which they are looked at, if nothing is logged before."""


class BadSteps(Callback):
    """Looks, where values are logged, which steps had a loss or gradients that were not finite.

    Such a step has changed nothing (:class:`~olvae.models.bad_steps.StepGuard`). It is counted as
    ``health/bad_steps``, and named with its images in ``bad_steps.jsonl``. After ``in_a_row`` of them, weights,
    averages and optimizers become those of ``last.ckpt`` again, the learning rates are multiplied by ``rate_factor``,
    and training goes on with the images that follow; after ``returns`` such returns it stops. Under fp16, gradients
    that were only too large for the loss scale are not counted: the scale is lowered, and the next step is a good one.

    Args:
        in_a_row: bad steps before a return.
        returns: before training stops.
        rate_factor: of the learning rates after each return.
    """

    def __init__(self, in_a_row: int = 20, returns: int = 3, rate_factor: float = 0.5) -> None:
        if in_a_row < 1 or returns < 0:
            raise ValueError("in_a_row must be at least 1, and returns not negative")
        if not 0 < rate_factor <= 1:
            raise ValueError(f"rate_factor must be above 0, and at most 1, got {rate_factor}")
        self.in_a_row = in_a_row
        self.returns = returns
        self.rate_factor = rate_factor
        self.bad = 0
        """Steps that changed nothing, in the whole run."""
        self.returned = 0
        """Times that training went back."""
        self._row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"bad": self.bad, "returned": self.returned, "row": self._row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bad, self.returned, self._row = state_dict["bad"], state_dict["returned"], state_dict["row"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        if pl_module.reports or pl_module.guard.unseen >= MOST_UNSEEN:
            self._look(trainer, pl_module)
        if pl_module.reports:
            pl_module.log("health/bad_steps", float(self.bad))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, model: LiteAutoencoderKL) -> None:
        bad: list[BadStep] = []
        for step in model.guard.look():
            if step is None:
                self._row = 0
            elif not step.overflow:
                self._row += 1
                bad.append(step)
        if not bad:
            return
        self.bad += len(bad)
        self._tell(trainer, bad)
        if self._row >= self.in_a_row:
            self._go_back(trainer, model, bad[-1])

    def _tell(self, trainer: pl.Trainer, bad: list[BadStep]) -> None:
        path = current_run(trainer).bad_steps
        lines = ({"step": s.step, "rank": trainer.global_rank, "term": s.term, "keys": s.keys} for s in bad)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:  # a note is no reason to stop
            log.warning("%s: the images of bad steps are not noted: %s", path, error.strerror)
        if trainer.is_global_zero:
            first, several = bad[0], len(bad) > 1
            _say(
                f"step {first.step}: {first.term} is not finite"
                + (f", and {len(bad) - 1} of the steps after it are bad too" if several else "")
                + f": {'these steps' if several else 'this step'} changed nothing ({self.bad} in this run so far); "
                f"the images are named in {path.name}"
            )

    def _go_back(self, trainer: pl.Trainer, model: LiteAutoencoderKL, last: BadStep) -> None:
        run, row, self._row = current_run(trainer), self._row, 0
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, BackgroundCheckpointIO):
            writer.wait()
        trainer.strategy.barrier()
        if self.returned == self.returns:
            times = "a return" if self.returned == 1 else f"{self.returned} returns"
            spite = f", in spite of {times} to earlier weights with a lower learning rate" if self.returned else ""
            raise FloatingPointError(
                f"{last.term} was not finite for {row} steps in a row until step {last.step}{spite}: look at the "
                f"images named in {run.bad_steps}, lower model.base_learning_rate, or train with --precision bf16 or 32"
                + last_good(run)
            )
        self.returned += 1
        where = "no checkpoint is there yet: the weights stay"
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if run.last_checkpoint.is_file():
            where = f"weights and optimizers are those of step {_restore(trainer, model, run)} again"
        model.rate_factor *= self.rate_factor
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * self.rate_factor
        if trainer.is_global_zero:
            _say(
                f"step {trainer.global_step}: {row} bad steps in a row: {where}, the learning rate is multiplied by "
                f"{self.rate_factor:g} (return {self.returned} of {self.returns})"
            )


def _restore(trainer: pl.Trainer, model: LiteAutoencoderKL, run: Run) -> int:
    """Take weights, average and optimizers from the last checkpoint, and nothing else; returns its step."""
    checkpoint = read_checkpoint(run.last_checkpoint)
    model.load_state_dict(state_dict_of(checkpoint, run.last_checkpoint, raw=True))
    if (average := find_average(trainer)) is not None:
        average.restore(checkpoint["state_dict"])
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        optimizer.load_state_dict(state)
    return int(checkpoint["global_step"])


def _say(text: str) -> None:
    Console(stderr=True).print(f"[bold yellow]{text}", highlight=False, soft_wrap=True)
