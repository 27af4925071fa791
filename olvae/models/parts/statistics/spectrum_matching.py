"""Spectrum matching: the latent gets the images' spectrum, tilted towards high frequencies."""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.losses.cosine_transform import (
    TINY_POWER,
    cosines,
    radial_sums,
    spectrum_divergence,
    tilted,
)
from olvae.models.parts.part import Loss, Model, Part, Step, fixed_latents
from olvae.modules.base import check_not_negative, mean_over_processes
from olvae.modules.mixed_precision import upcast, without_tf32


class SpectrumMatching(Part):
    """Match the latent's radial spectrum to the images', times frequency^delta.

    Ning et al. 2026 (arXiv 2603.14645), encoding spectrum matching: of the latent's means and of
    the images, averaged to as many positions, the power of the cosine transform is averaged in 16
    radial bins. The loss ``spectrum`` is KL(target || latent) of log(1 + power), normalised to sum
    1. The paper uses it in place of KL; with ``delta`` 1, images whose power falls as 1 / f^2 give
    a latent whose power falls as 1 / f.

    Spectra are of the whole batch over all processes, scaled to mean 0 and deviation 1 [D], so
    that neither a latent's scale nor a blank image changes the loss. Accumulated micro-batches
    have spectra of their own.

    Args:
        weight: weight of the loss, not negative; the paper's is .01.
        delta: exponent of the frequency; the paper's is 1.
    """

    def __init__(self, weight: float = 0.01, delta: float = 1.0) -> None:
        super().__init__()
        check_not_negative(weight=weight, delta=delta)
        self.weight = weight
        self.delta = delta

    def conflicts(self, model: Model) -> Iterable[str]:
        yield from fixed_latents(self, model)

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        assert step.encoded is not None
        return {"spectrum": (self(step.images, step.encoded.mean), self.weight)}

    def forward(self, images: Tensor, z: Tensor) -> Tensor:
        """Return the divergence, a scalar, of images (B, C, H, W) and latents (B, n_z, h, w)."""
        z = upcast(z)
        height, width = z.shape[-2:]
        small = F.adaptive_avg_pool2d(upcast(images), (height, width))  # (B, C, h, w)
        power, counts = _spectrum(small)
        target = tilted(power, counts, self.delta)
        found, _ = _spectrum(z)
        return spectrum_divergence(target, found, counts > 0).to(z.dtype)

    def describe(self) -> str:
        return f"weight {self.weight:g}, delta {self.delta:g}"


def _spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean power of (B, C, h, w) by radial bin, and the counts of coefficients.

    Of all processes' batches together, shifted and scaled to mean 0 and deviation 1.
    """
    x = without_tf32(x)
    x = x - mean_over_processes(x.mean())
    sums, counts = radial_sums(cosines(x).square().mean((0, 1)))

    # One message: the powers, and the variance to divide them by.
    own = torch.cat((sums / counts.clamp(min=1.0), x.square().mean()[None]))
    means = mean_over_processes(own)
    return means[:-1] / means[-1].clamp(min=TINY_POWER), counts
