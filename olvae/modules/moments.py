"""Accumulate mean and standard deviation of latents per channel; compute scaling factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from olvae.modules.mixed_precision import in_float64

FEW_IMAGES = 100  # below which other images give noticeably other factors


@dataclass(frozen=True)
class Moments:
    """Sums over latents z = mean + std * noise, per channel in float64.

    Adding two of them merges batches and processes. The variance of z is the variance of the
    posterior means plus the mean of the posterior variances.
    """

    positions: int  # how many were summed over; the sums below are (n_z)
    means: Tensor  # of the posterior
    squares: Tensor  # of these means
    variances: Tensor  # of the posterior

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor | None = None) -> "Moments":
        """Sum over one latent (n_z, h, w), or a batch of them (B, n_z, h, w).

        Deterministic latents have no variance.
        """
        mean = _by_channel(mean)  # (n_z, positions)
        variance = torch.zeros_like(mean) if variance is None else _by_channel(variance)
        return cls(
            mean.shape[1], mean.sum(1).cpu(), mean.square().sum(1).cpu(), variance.sum(1).cpu()
        )

    @classmethod
    def from_state(cls, positions: int, sums: Sequence[Sequence[float]]) -> "Moments":
        """Restore what :meth:`state` gave."""
        return cls(positions, *torch.tensor(sums, dtype=torch.float64))

    def state(self) -> tuple[int, list[list[float]]]:
        """Return plain numbers, for JSON: the positions and the three sums."""
        return self.positions, [self.means.tolist(), self.squares.tolist(), self.variances.tolist()]

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.positions + other.positions,
            self.means + other.means,
            self.squares + other.squares,
            self.variances + other.variances,
        )

    @property
    def mean(self) -> Tensor:
        """The mean of z per channel, (n_z)."""
        return self.means / self.positions

    @property
    def std(self) -> Tensor:
        """The standard deviation of z per channel, (n_z)."""
        variance = (
            self.squares / self.positions - self.mean.square() + self.variances / self.positions
        )
        return variance.clamp(min=0.0).sqrt()

    @property
    def std_of_means(self) -> Tensor:
        """The standard deviation of the posterior means per channel, (n_z)."""
        return (self.squares / self.positions - self.mean.square()).clamp(min=0.0).sqrt()

    def factors(self) -> tuple[float, float]:
        """Return the scaling and the shift factor of all channels together.

        (z - shift) * scaling has mean 0 and variance 1. Raise ValueError if the latents are all
        equal.
        """
        shift = float(self.mean.mean())
        variance = float(((self.squares + self.variances) / self.positions).mean()) - shift**2
        # Not ``variance <= 0``, which is False for nan.
        if not variance > 0.0:
            raise ValueError("the latents are all equal: they have no scaling factor")
        return variance**-0.5, shift


def _by_channel(latents: Tensor) -> Tensor:
    """(n_z, h, w) or (B, n_z, h, w) -> (n_z, positions) in float64."""
    return in_float64(latents).movedim(-3, 0).flatten(1)
