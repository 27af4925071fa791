"""Predictors of how well a diffusion model learns a latent, measured before it is trained.

Of mapped latents (N, n, h, w), in float64 where pictures are not needed.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.evaluation.latent_report import high_and_all
from olvae.evaluation.observers.ifid import PRECISION_NEIGHBOURS
from olvae.evaluation.observers.interpolated import drawn_neighbours, slerp_halfway
from olvae.losses import cosine_transform, terms
from olvae.metrics.features import Features
from study.latent_maps import Scale, radial_spectrum, target_spectrum

WINDOW = 4  # positions along the side of a window of the local correlation

Decode = Callable[[Tensor], Tensor]
"""Mapped latents (N, n, h, w) -> uint8 images (N, 3, H, W)."""


def share_of_high_frequencies(z: Tensor) -> float:
    """As ``olvae latents`` has it: of the energy, in the upper half along either axis."""
    high, total = high_and_all(z.double()).tolist()
    return float(high / total)


def spectrum_divergence(z: Tensor, images: Tensor) -> float:
    """Spectrum matching's loss (arXiv 2603.14645): KL(target | latent) of log(1 + power).

    ``images``, (N, C, h, w), are averaged to as many positions. Both are normalised to sum 1
    over the radial bins that have coefficients.
    """
    found = radial_spectrum(z)
    target = target_spectrum(images)
    return float(cosine_transform.spectrum_divergence(target, found, found.isfinite()))


def local_correlation(z: Tensor) -> float:
    """SSVAE's (arXiv 2512.05394): mean Pearson correlation of all pairs of positions in a window.

    Over the channels of latents whose channels have mean 0 and deviation 1; windows of 4x4
    positions that do not overlap.
    """
    z = Scale.of(z.double(), per_channel=True).apply(z.double())
    return float(terms.local_correlation(z, WINDOW))


def equivariance_error(z: Tensor, decode: Decode, images: Tensor) -> float:
    """EQ-VAE's error of pixels: of latents that are turned, or shrunk by two, and then decoded.

    Mean squared, over the images' variance; the mean of both. ``images`` are uint8 (N, 3, H, W).
    """
    x = images.double()
    errors = [
        (decode(change(z)).double() - change(x)).square().mean() for change in (_turned, _halved)
    ]
    return float(torch.stack(errors).mean() / x.var())


def _turned(x: Tensor) -> Tensor:
    return x.rot90(1, (-2, -1))


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def interpolated(z: Tensor, decode: Decode, extract: Callable[[Tensor], Features]) -> Features:
    """Features of the pictures of iFID (arXiv 2603.05630): between each latent and a neighbour."""
    uniform = torch.rand(len(z), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen, _, _ = drawn_neighbours(z.float().flatten(1), uniform)
    return extract(decode(slerp_halfway(z, z[chosen])))


def precision(pictures: Features, images: Features) -> float:
    """As the observer ``interpolated_precision``: the share of pictures that are near an image."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, prc_features_to_metric

    found = prc_features_to_metric(
        torch.from_numpy(np.ascontiguousarray(pictures)),
        torch.from_numpy(np.ascontiguousarray(images)),
        prc_neighborhood=PRECISION_NEIGHBOURS,
        save_cpu_ram=True,
        verbose=False,
    )
    return float(found[KEY_METRIC_PRECISION])


class Wiener:
    """The best linear denoiser of latents (N, n, h, w): what covariances alone can know.

    On the straight line from z to noise, x = (1 - t) z + t noise, it guesses the velocity
    noise - z. No orthogonal map changes its error.
    """

    def __init__(self, z: Tensor) -> None:
        flat = z.double().flatten(1)
        self.mean = flat.mean(0)
        variances, self.axes = torch.linalg.eigh(torch.cov(flat.T))
        self.variances = variances.clamp(min=0.0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """(N, n, h, w) and times (N,) -> velocity (N, n, h, w)."""
        t = t.double()[:, None]
        centred = (x.double().flatten(1) - (1.0 - t) * self.mean) @ self.axes
        together = (1.0 - t).square() * self.variances + t.square()
        gain = (t - (1.0 - t) * self.variances) / together
        velocity = (gain * centred) @ self.axes.T - self.mean
        return velocity.view(x.shape).to(x.dtype)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """A normal distribution's latents, of this mean and covariance, (count, n h w)."""
        noise = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return (noise * self.variances.sqrt()) @ self.axes.T + self.mean


def velocity_losses(
    velocities: list[Callable[[Tensor, Tensor], Tensor]], z: Tensor, draws: int = 4
) -> list[float]:
    """The mean squared error of each, on the same noise and times of a diffusion training.

    ``z`` are (N, n, h, w) in float32; each gets so many times.
    """
    generator = torch.Generator().manual_seed(0)
    totals = [0.0] * len(velocities)
    with torch.no_grad():
        for _ in range(draws):
            noise = torch.randn(z.shape, generator=generator)
            t = torch.randn(len(z), generator=generator).sigmoid()
            at = t[:, None, None, None]
            x = (1 - at) * z + at * noise
            for number, velocity in enumerate(velocities):
                parts = zip(x.split(50), t.split(50), strict=True)
                guess = torch.cat([velocity(some, times) for some, times in parts])
                totals[number] += float(F.mse_loss(guess, noise - z)) / draws
    return totals
