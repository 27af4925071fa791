"""Validation during training: metrics of the averaged weights, and of the weights as trained."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from olvae.data.image import to_uint8
from olvae.data.source import Batch
from olvae.metrics.metric import MetricSet
from olvae.metrics.registry import MakeMetrics, build_metrics
from olvae.models.averaging import find_average
from olvae.models.parts.part import Part

__all__ = ["ValidatedModule", "allow_uneven_batches"]


def allow_uneven_batches(trainer: pl.Trainer) -> None:
    """Let processes validate different numbers of batches, even none.

    DDP sends buffers to all processes in the first forward pass; a process without a batch would never receive them.
    Training switches this on again.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.require_forward_param_sync = False


class ValidatedModule(pl.LightningModule, ABC):
    """A module whose reconstructions are validated, with the averaged weights and with the weights as trained.

    ``forward`` takes images (B, C, H, W) in [-1, 1], and ``moments``, a stand-in's or None; it returns the
    reconstructions first.

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
        self._make_metrics: tuple[torch.device, MakeMetrics] | None = None
        self._metrics: dict[str, MetricSet] = {}  # by the weights, val (averaged) or val_raw (as trained)
        self._sums: dict[str, dict[str, tuple[float, int]]] = {}  # by part and name: sum over images, their number

    @abstractmethod
    def images(self, batch: Batch) -> Tensor:
        """The batch's uint8 images in [-1, 1], (B, C, H, W)."""

    @property
    @abstractmethod
    def each_part(self) -> list[Part]:
        """Parts that validate something beside the metrics."""

    def set_up_validation(self) -> MakeMetrics:
        """Prepare the metrics on the module's device; they may need pretrained networks.

        Raises:
            FileNotFoundError: a pretrained network is missing.
            ValueError: a metric's name is unknown.
        """
        if self._make_metrics is None or self._make_metrics[0] != self.device:
            make, missing = build_metrics(("psnr", "ssim", *self.val_metrics), self.weights_dir, self.device)
            if missing:
                raise FileNotFoundError("; ".join(f"val_metrics: {name}: {reason}" for name, reason in missing.items()))
            self._make_metrics = self.device, make
        return self._make_metrics[1]

    def on_validation_epoch_start(self) -> None:
        allow_uneven_batches(self.trainer)
        make = self.set_up_validation()
        self._metrics = {"val": make()}
        self._sums = {part.name: {} for part in self.each_part}
        if find_average(self.trainer) is not None:
            self._metrics["val_raw"] = make()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, x = self.images(batch), batch["image"]
        keys = batch.get("key") or [f"{self.global_rank} {batch_idx} {i}" for i in range(len(x))]
        moments = batch.get("moments")
        self._metrics["val"].update(keys, x, to_uint8(self(images, moments=moments)[0]))
        for part in self.each_part:
            for name, mean in part.validate(cast("Any", self), images, moments).items():
                _add(self._sums[part.name], name, float(mean) * len(x), len(x))
        average = find_average(self.trainer)
        if average is not None:
            with average.weights_as_trained():
                self._metrics["val_raw"].update(keys, x, to_uint8(self(images, moments=moments)[0]))

    def on_validation_epoch_end(self) -> None:
        """Log the values over all processes, without those that are infinite or not available."""
        if dist.is_initialized():
            states: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(states, ({key: part.state() for key, part in self._metrics.items()}, self._sums))
            self._sums = {name: {} for name in self._sums}
            for metrics, sums in states:
                for weights, state in metrics.items():
                    self._metrics[weights].merge(state)
                for part, by_name in sums.items():
                    for name, (total, count) in by_name.items():
                        _add(self._sums[part], name, total, count)
        self.validation_values = {
            f"{weights}/{name}": value
            for weights, metrics in self._metrics.items()
            for name, value in metrics.compute().items()
            if math.isfinite(value)
        }
        for part in self.each_part:
            means = {name: total / count for name, (total, count) in self._sums[part.name].items()}
            self.validation_values |= {f"val/{name}": value for name, value in part.summarise(means).items()}
        self._metrics = {}
        self.log_dict(self.validation_values)
        self.log("step", float(self.global_step))
        self.validated_at = self.global_step


def _add(sums: dict[str, tuple[float, int]], name: str, total: float, count: int) -> None:
    before, images = sums.get(name, (0.0, 0))
    sums[name] = (before + total, images + count)
