"""Observe the latents' radial spectrum beside the images': spectrum matching's divergence."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.evaluation.cells import significant
from olvae.evaluation.observers.observer import Observation, PerImageObserver
from olvae.evaluation.results import Row
from olvae.losses.cosine_transform import (
    RADIAL_BINS,
    cosines,
    radial_sums,
    spectrum_divergence,
    tilted,
)
from olvae.modules.mixed_precision import in_float64


class Spectrum(PerImageObserver):
    """The divergence of the latents' spectrum from the images', tilted: spectrum matching's loss.

    Ning et al. 2026 (arXiv 2603.14645) hold that a diffusion model learns a latent more easily
    whose power falls more slowly than the images', which are averaged to as many positions: as
    theirs times the frequency. Powers are of the cosine transform of all means and images, scaled
    to mean 0 and deviation 1, averaged in 16 radial bins. ``divergence`` is KL(target || latents)
    of log(1 + power), normalised to sum 1, in nats; 0 is best. ``target`` and ``latents`` are the
    powers, from low to high frequencies; None in a bin without coefficients.
    """

    name = "spectrum"

    def measure(self, batch: Observation) -> list[tuple[list[float], list[float]]]:
        """Sums of each image's pixels, averaged to the latent's positions, and of its latents."""
        z = in_float64(batch.latents).cpu()
        small = F.adaptive_avg_pool2d(in_float64(batch.x).cpu(), (z.shape[-2], z.shape[-1]))
        return list(zip(_sums(small).tolist(), _sums(z).tolist(), strict=True))

    def summarise(self, columns: Sequence[Any]) -> dict[str, Any] | None:
        pairs = [mean_spectrum(torch.tensor(rows, dtype=torch.float64)) for rows in columns]
        images, latents = pairs
        if images is None or latents is None:
            return None
        power, counts = images
        found, _ = latents
        target = tilted(power, counts)
        there = counts > 0
        return {
            "divergence": spectrum_divergence(target, found, there).item(),
            "target": _or_none(target, there),
            "latents": _or_none(found, there),
        }

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        return {"spectrum": significant(entry["divergence"])}

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        if any(self.name in row.observed for row in rows):
            yield (
                "spectrum: divergence of the latents' frequencies from the images' times their "
                "frequency, in nats; 0 is spectrum matching's target"
            )


def _sums(x: Tensor) -> Tensor:
    """Return sums of each (C, h, w) of a batch, (B, 3 + 2 RADIAL_BINS).

    The number of values, their sum and their squares'; powers, then coefficients, by radial bin.
    """
    sums, counts = radial_sums(cosines(x).square().sum(1))
    channels = x.shape[1]
    values = torch.full((len(x), 1), x[0].numel(), dtype=x.dtype)
    plain = torch.stack((x.sum((1, 2, 3)), x.square().sum((1, 2, 3))), dim=1)
    return torch.cat((values, plain, sums, (channels * counts).expand(len(x), -1)), dim=1)


def mean_spectrum(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return all images' mean power by radial bin, at mean 0 and deviation 1, and the counts.

    None if all values are equal.
    """
    total = rows.sum(0)
    n, plain, squares = total[:3]
    sums, counts = total[3:].split(RADIAL_BINS)
    mean = plain / n
    variance = (squares - n * mean.square()) / (n - 1)
    if variance <= 1e-12 * (squares / n):
        return None

    # A mean of 0 leaves less in frequency 0 alone, by Parseval n times the mean's square.
    sums = sums.clone()
    sums[0] -= n * mean.square()
    return sums / counts / variance, counts


def _or_none(spectrum: Tensor, there: Tensor) -> list[float | None]:
    pairs = zip(spectrum.tolist(), there.tolist(), strict=True)
    return [value if present else None for value, present in pairs]
