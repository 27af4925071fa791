"""Metrics of the validation images, with the weights as trained and with their average."""

import math
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from olvae.metrics.metric import Metric, Unavailable
from olvae.metrics.registry import build_metrics

__all__ = ["ALWAYS", "Validation", "uncouple", "weights_as_trained"]

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
