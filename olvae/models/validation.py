"""Metrics of the validation images, with the weights as trained and with their average."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from olvae.data.image import to_uint8
from olvae.data.source import Batch
from olvae.metrics.metric import Metric, Unavailable
from olvae.metrics.registry import build_metrics

__all__ = ["ALWAYS", "ValidatedModule", "Validation", "uncouple", "weights_as_trained"]


ALWAYS = ("psnr", "ssim")


class Validation:
    """One validation's metrics, gathered over processes.

    Args:
        names: of metrics beside PSNR and SSIM.
        weights_dir: where their pretrained networks are looked for first.
        device: where they are computed.

    Raises:
        FileNotFoundError: a network is not to be had.
        ValueError: there is no such metric.
    """

    def __init__(self, names: Sequence[str], weights_dir: str | None, device: torch.device) -> None:
        self.device = device
        wanted = list(dict.fromkeys((*ALWAYS, *names)))
        self._make, skipped = build_metrics(wanted, weights_dir, device)
        if skipped:
            raise FileNotFoundError("; ".join(f"val_metrics: {name}: {reason}" for name, reason in skipped.items()))
        self._metrics: dict[str, dict[str, Metric]] = {}

    def __deepcopy__(self, memo: object) -> "Validation":
        return self  # a constant of the model, as its networks are

    def start(self) -> None:
        """Forget what was seen."""
        self._metrics = {}

    def update(self, weights: str, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Take in images.

        Args:
            weights: a name for those that made y: ``val``, or ``val_raw``.
            keys: of the B images.
            x, y: uint8 (B, C, H, W).
        """
        if weights not in self._metrics:
            self._metrics[weights] = self._make()
        for name, metric in list(self._metrics[weights].items()):
            try:
                metric.update(keys, x, y)
            except Unavailable:  # images of this size or these channels have no such metric
                del self._metrics[weights][name]

    def compute(self) -> dict[str, float]:
        """Values as ``val/psnr``, the same in every process; what can't be had, or is infinite, is left out."""
        states = {weights: {n: m.state() for n, m in metrics.items()} for weights, metrics in self._metrics.items()}
        if dist.is_initialized():
            parts: list[dict[str, dict[str, object]]] = [{}] * dist.get_world_size()
            dist.all_gather_object(parts, states)
            for part in parts:
                self._merge(part)
        values = {}
        for weights, metrics in self._metrics.items():
            for name, metric in metrics.items():
                try:
                    value = metric.compute()
                except Unavailable:
                    continue
                if math.isfinite(value):
                    values[f"{weights}/{name}"] = value
        return values

    def _merge(self, states: dict[str, dict[str, object]]) -> None:
        for weights, metrics in states.items():
            own = self._metrics.setdefault(weights, self._make())
            for name, state in metrics.items():
                if name in own:
                    own[name].merge(state)


def uncouple(trainer: pl.Trainer) -> None:
    """Let each process validate as many batches as it has, even none.

    The first one would begin with sending the discriminator's buffers to all processes, of which one without a batch
    takes no part. Training couples them again.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.require_forward_param_sync = False


def weights_as_trained(trainer: pl.Trainer) -> pl.LightningModule | None:
    """In a validation amid training with averaged weights: the model with those that are not averaged; else None.

    Lightning's callback exchanges the two for the time of a validation, so that they lie in its own copy. After
    training there is the average alone.
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
    """A module that reconstructs images; validation compares them, by the averaged weights and by those as trained.

    ``forward`` takes images (B, C, H, W) in [-1, 1], and gives the reconstructions first.

    Args:
        val_metrics: names of metrics beside PSNR and SSIM.
        weights_dir: where their pretrained networks are looked for first.
    """

    def __init__(self, val_metrics: Sequence[str] = (), weights_dir: str | None = None) -> None:
        super().__init__()
        self.val_metrics = list(val_metrics)
        self.weights_dir = weights_dir
        self.validated_at = 0
        """The step of the last validation."""
        self.validation_values: dict[str, float] = {}
        """What the last validation gave, as ``val/psnr``; nothing where no image could be read."""
        self._validation: Validation | None = None

    @abstractmethod
    def images(self, batch: Batch) -> Tensor:
        """The batch's uint8 images in [-1, 1], (B, C, H, W)."""

    def set_up_validation(self, device: torch.device | None = None) -> None:
        """Make the metrics of validation, which may need pretrained networks.

        Raises:
            FileNotFoundError, ValueError: one of them can't be had.
        """
        if self._validation is None or device not in (None, self._validation.device):
            self._validation = Validation(self.val_metrics, self.weights_dir, device or self.device)

    def on_validation_epoch_start(self) -> None:
        uncouple(self.trainer)
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
