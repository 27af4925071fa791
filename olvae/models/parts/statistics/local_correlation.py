"""Local correlation of the latent: neighbouring positions become alike, as in SSVAE."""

import math
from collections.abc import Iterable, Mapping

import torch.nn.functional as F
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.losses.objective import IMAGE_TERMS
from olvae.losses.terms import local_correlation
from olvae.models.parts.part import (
    Loss,
    Model,
    Part,
    Step,
    adaptive_factor,
    fixed_latents,
)
from olvae.modules.base import check_counts, check_not_negative, mean_over_processes
from olvae.modules.mixed_precision import upcast


class LocalCorrelation(Part):
    """Raise the correlation of a latent's neighbouring positions up to a threshold.

    Liu et al. 2025 (SSVAE, arXiv 2512.05394): latents with low frequencies are easier to learn.
    The loss ``local_correlation`` is max(0, threshold - r), where r is the mean Pearson correlation
    over channels of all pairs of positions in windows of the posterior's mean, whose channels are
    scaled to mean 0 and deviation 1. ``health/local_correlation`` is r. Mean, deviation and r are
    of the whole batch over all processes; the gradient does not pass through the first two.
    Accumulated micro-batches have values of their own.

    Defaults are the published code's (93851d3), made for videos at f16 with 48 channels.

    Args:
        weight: weight of the loss, not negative; the code's .02 times its further factor of .1.
        threshold: at most 1; the loss is 0 beyond it.
        window: side of a window, in positions.
        adaptive_weight: in each step, multiply the weight by |gradient of the weighted image terms|
            / |gradient of the loss| at the encoder's last convolution. It costs another backward
            pass through the decoder.
    """

    def __init__(
        self,
        weight: float = 0.002,
        threshold: float = 0.75,
        window: int = 2,
        adaptive_weight: bool = True,
    ) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        check_counts(2, window=window)
        if not -1 < threshold <= 1:
            raise ValueError(f"threshold must be a correlation, from -1 to 1, got {threshold}")
        self.weight = weight
        self.threshold = threshold
        self.window = window
        self.adaptive_weight = adaptive_weight

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"
        yield from fixed_latents(self, model)
        if model.autoencoder.latent_channels < 2:
            yield f"{here}: one channel has no correlation over channels: leave it out"
        if self.adaptive_weight and not set(IMAGE_TERMS) & set(model.loss_weights):
            yield f"{here}.params.adaptive_weight: no loss compares images: set it to false"

    def check(self, model: Model, source: Source) -> None:
        positions = source.size // model.autoencoder.upscale
        here = f"model.params.parts.{self.name}.params.window"
        if min(positions) < self.window:
            raise ConfigError(
                f"{here}: {positions.short} latent positions are less than a window of "
                f"{self.window}: change it, or data.params.size"
            )

        # Equivariance also encodes images of down to a quarter of the size.
        moving = [part.name for part in model.each_part if part.moves_latents]
        if moving and math.ceil(min(positions) / 4) < self.window:
            raise ConfigError(
                f"{here}: parts.{moving[0]} shrinks {positions.short} latent positions to a "
                f"quarter, less than a window of {self.window}: change it, or data.params.size"
            )

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        assert step.encoded is not None
        found = self(step.encoded.mean)
        loss = F.relu(self.threshold - found)
        weight: Tensor | float = self.weight
        if self.adaptive_weight:
            weight = self.weight * adaptive_factor(model, step, loss)
        model.report({"health/local_correlation": found})
        return {"local_correlation": (loss, weight)}

    def forward(self, z: Tensor) -> Tensor:
        """Return the mean correlation, a scalar, of latents (B, n_z, h, w)."""
        z = upcast(z)
        channels = (0, 2, 3)
        mean = mean_over_processes(z.detach().mean(channels, keepdim=True))
        variance = mean_over_processes((z.detach() - mean).square().mean(channels, keepdim=True))
        scaled = (z - mean) / variance.sqrt().clamp(min=1e-6)
        return mean_over_processes(local_correlation(scaled, self.window))

    def describe(self) -> str:
        adaptive = ", adaptive" if self.adaptive_weight else ""
        return f"up to {self.threshold:g}, weight {self.weight:g}{adaptive}"
