"""Sums over stored latents, from which shift and scaling follow."""

from collections.abc import Iterable
from typing import Any

import torch

from olvae.data.latent_files import Latent

__all__ = ["LatentSums"]


class LatentSums:
    """Per channel and in float64, of images and positions: counts and moments of z = mean + std * noise.

    Kept for each shard, and added up in the shards' order, so that an interruption can't change the last digit.
    The conventions are those of ``olvae latents``: the variance of z is that of the means plus the mean variance.

    Args:
        images: seen.
        positions: of their latents, the mirrored ones' included.
        shape: of each latent, (n_z, h, w); None if they differ.
        mean, square, var: sums of the means, of their squares, of the variances; n_z numbers each.
    """

    def __init__(
        self,
        images: int = 0,
        positions: int = 0,
        shape: Iterable[int] | None = None,
        mean: Iterable[float] = (),
        square: Iterable[float] = (),
        var: Iterable[float] = (),
    ) -> None:
        self.images = images
        self.positions = positions
        self.shape = None if shape is None else tuple(shape)
        self.sums = torch.tensor([list(mean), list(square), list(var)], dtype=torch.float64)  # (3, n_z)

    def update(self, latents: Iterable[Latent]) -> None:
        """Add those of one image: its latent, and the mirrored one's."""
        for i, latent in enumerate(latents):
            mean = latent.mean.double().flatten(1)  # (n_z, h w)
            var = torch.zeros_like(mean) if latent.std is None else latent.std.double().flatten(1).square()
            sums = torch.stack([mean.sum(1), mean.square().sum(1), var.sum(1)])
            self._add(int(i == 0), mean.shape[1], tuple(latent.mean.shape), sums)

    def add(self, other: "LatentSums") -> None:
        self._add(other.images, other.positions, other.shape, other.sums)

    def _add(self, images: int, positions: int, shape: tuple[int, ...] | None, sums: torch.Tensor) -> None:
        self.shape = shape if not self.positions or shape == self.shape else None
        self.sums = self.sums + sums if self.positions else sums
        self.images += images
        self.positions += positions

    def state(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON has them."""
        mean, square, var = self.sums.tolist()
        shape = None if self.shape is None else list(self.shape)
        return {
            "images": self.images,
            "positions": self.positions,
            "shape": shape,
            "mean": mean,
            "square": square,
            "var": var,
        }

    def as_dict(self) -> dict[str, Any]:
        """Shape, shift and scaling over everything, and mean and standard deviation per channel."""
        mean, square, var = self.sums / self.positions
        shift = float(mean.mean())
        variance = float((square + var).mean()) - shift**2
        if not variance > 0.0:
            raise ValueError("the latents are all equal: there is nothing to scale, and nothing to learn from them")
        return {
            "latent_shape": None if self.shape is None else list(self.shape),
            "shift_factor": shift,
            "scaling_factor": variance**-0.5,
            "latents_mean": mean.tolist(),
            "latents_std": (square - mean.square() + var).clamp(min=0.0).sqrt().tolist(),
        }
