"""Validation during training: metrics of the averaged weights, and of the weights as trained."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from olvae.data.image import to_uint8
from olvae.data.source import Batch
from olvae.metrics.metric import MetricSet
from olvae.metrics.registry import build_metrics

__all__ = ["ALWAYS", "ValidatedModule", "Validation", "allow_uneven_batches", "weights_as_trained"]


ALWAYS = ("psnr", "ssim")


class Validation:
    """The metrics of one validation, over all processes.

    Args:
        names: of metrics besides PSNR and SSIM.
        weights_dir: a folder of pretrained networks, searched first.
        device: where metrics are computed.

    Raises:
        FileNotFoundError: a pretrained network is missing.
        ValueError: a metric's name is unknown.
    """

    def __init__(self, names: Sequence[str], weights_dir: str | None, device: torch.device) -> None:
        self.device = device
        self._make, missing = build_metrics((*ALWAYS, *names), weights_dir, device)
        if missing:
            raise FileNotFoundError("; ".join(f"val_metrics: {name}: {reason}" for name, reason in missing.items()))
        self._sets: dict[str, MetricSet] = {}

    def __deepcopy__(self, memo: object) -> "Validation":
        return self  # the averaged copy of a model shares it: its networks are constants

    def start(self) -> None:
        """Forget the images seen so far."""
        self._sets = {}

    def update(self, weights: str, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Add images.

        Args:
            weights: which weights made y: ``val`` (averaged) or ``val_raw`` (as trained).
            keys: of the B images.
            x, y: uint8 (B, C, H, W).
        """
        if weights not in self._sets:
            self._sets[weights] = self._make()
        self._sets[weights].update(keys, x, y)

    def compute(self) -> dict[str, float]:
        """Values as ``val/psnr``, the same in every process; without those that are infinite or not available."""
        if dist.is_initialized():
            states = {weights: metrics.state() for weights, metrics in self._sets.items()}
            parts: list[dict[str, Any]] = [{}] * dist.get_world_size()
            dist.all_gather_object(parts, states)
            for part in parts:
                for weights, state in part.items():
                    self._sets.setdefault(weights, self._make()).merge(state)
        return {
            f"{weights}/{name}": value
            for weights, metrics in self._sets.items()
            for name, value in metrics.compute().items()
            if math.isfinite(value)
        }


def allow_uneven_batches(trainer: pl.Trainer) -> None:
    """Let processes validate different numbers of batches, even none.

    DDP sends buffers to all processes in the first forward pass; a process without a batch would never receive them.
    Training switches this on again.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.require_forward_param_sync = False


def weights_as_trained(trainer: pl.Trainer) -> pl.LightningModule | None:
    """During a training with averaged weights, the model with the weights as trained; otherwise None.

    Lightning's callback swaps the two during validation, so its own copy holds the weights as trained. After training
    only the average is left.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return None
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009  (mypy does not see it)
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            raw = callback._average_model.module
            assert isinstance(raw, pl.LightningModule)
            return raw.eval()
    return None


class ValidatedModule(pl.LightningModule, ABC):
    """A module whose reconstructions are validated, with the averaged weights and with the weights as trained.

    ``forward`` takes images (B, C, H, W) in [-1, 1] and returns the reconstructions first.

    Args:
        val_metrics: names of metrics besides PSNR and SSIM.
        weights_dir: a folder of their pretrained networks, searched first.
    """

    def __init__(self, val_metrics: Sequence[str] = (), weights_dir: str | None = None) -> None:
        super().__init__()
        self.val_metrics = list(val_metrics)
        self.weights_dir = weights_dir
        self.validated_at = 0
        """The step of the last validation."""
        self.validation_values: dict[str, float] = {}
        """The values of the last validation, as ``val/psnr``; empty if no image could be read."""
        self._validation: Validation | None = None

    @abstractmethod
    def images(self, batch: Batch) -> Tensor:
        """The batch's uint8 images in [-1, 1], (B, C, H, W)."""

    def set_up_validation(self, device: torch.device | None = None) -> None:
        """Make the metrics, which may need pretrained networks.

        Raises:
            FileNotFoundError, ValueError: see :class:`Validation`.
        """
        if self._validation is None or device not in (None, self._validation.device):
            self._validation = Validation(self.val_metrics, self.weights_dir, device or self.device)

    def on_validation_epoch_start(self) -> None:
        allow_uneven_batches(self.trainer)
        self.set_up_validation(self.device)
        assert self._validation is not None
        self._validation.start()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self._validation is not None
        images, x = self.images(batch), batch["image"]
        keys = batch.get("key") or [f"{self.global_rank} {batch_idx} {i}" for i in range(len(x))]
        self._validation.update("val", keys, x, to_uint8(self(images)[0]))
        raw = weights_as_trained(self.trainer)
        if raw is not None:
            self._validation.update("val_raw", keys, x, to_uint8(raw(images)[0]))

    def on_validation_epoch_end(self) -> None:
        assert self._validation is not None
        self.validation_values = self._validation.compute()
        self.log_dict(self.validation_values)
        self.log("step", float(self.global_step))
        self.validated_at = self.global_step
