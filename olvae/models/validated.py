"""What happens in a validation of a model in training."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor

from olvae.data.pixels import to_uint8
from olvae.data.source import Batch
from olvae.models.validation import Validation, uncouple, weights_as_trained

__all__ = ["ValidatedModule"]


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
