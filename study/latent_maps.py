"""Invertible maps of latents, which are undone before the decoder: same pictures, other latents.

A map is a sequence of steps, each with its own inverse, in float64: applied and undone, it gives
back float32 latents to the bit. Latents are those that a diffusion model sees today, with one
shift and one factor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.losses.cosine_transform import (
    cosines,
    inverse_cosines,
    radial_bins,
    radial_sums,
    tilted,
)

SIGNS_SIDE = 64  # positions: the largest side of a latent whose signs are drawn
RANDOM = 7  # seed of the rotation and of the signs, the same for all seeds of the experiment

MAPS = {
    "plain": "none",
    "W": "W: each channel to deviation 1",
    "U": "U: principal axes of channels",
    "R": "R: W, channels rotated at random",
    "T+": "T+: upper half of frequencies x 2",
    "T-": "T-: upper half of frequencies x 1/2",
    "E": "E: spectrum matching's spectrum",
    "F": "F: 2x2 positions packed",
    "X": "X: random signs by position",
}
"""Titles by name. The first is the control."""


class Step(Protocol):
    """An invertible function of latents (N, n, h, w)."""

    def apply(self, z: Tensor) -> Tensor: ...

    def undo(self, z: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Scale:
    """(z - shift) / deviation, with numbers of each channel or of all, (n or 1, 1, 1)."""

    shift: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, z: Tensor, per_channel: bool = False) -> "Scale":
        """To mean 0 and deviation 1."""
        values = z.transpose(0, 1).flatten(1) if per_channel else z.flatten()[None]
        return cls(values.mean(1)[:, None, None], values.std(1)[:, None, None])

    def apply(self, z: Tensor) -> Tensor:
        return (z - self.shift) / self.deviation

    def undo(self, z: Tensor) -> Tensor:
        return z * self.deviation + self.shift


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix (n, n), the same at all positions."""

    matrix: Tensor

    def apply(self, z: Tensor) -> Tensor:
        return torch.einsum("dc,nchw->ndhw", self.matrix, z)

    def undo(self, z: Tensor) -> Tensor:
        return torch.einsum("dc,ndhw->nchw", self.matrix, z)


@dataclass(frozen=True)
class Filter:
    """The coefficients of the cosine transform times gains (h, w), which a function has by size."""

    gains: Callable[[int, int], Tensor]

    def apply(self, z: Tensor) -> Tensor:
        return inverse_cosines(cosines(z) * self.gains(*z.shape[-2:]))

    def undo(self, z: Tensor) -> Tensor:
        return inverse_cosines(cosines(z) / self.gains(*z.shape[-2:]))


@dataclass(frozen=True)
class Signs:
    """One sign (SIGNS_SIDE, SIGNS_SIDE) for all channels of a position, the same in all images."""

    signs: Tensor

    def apply(self, z: Tensor) -> Tensor:
        height, width = z.shape[-2:]
        return z * self.signs[:height, :width]

    undo = apply


class Packing:
    """2x2 positions to four times the channels."""

    def apply(self, z: Tensor) -> Tensor:
        return F.pixel_unshuffle(z, 2)

    def undo(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, 2)


@dataclass(frozen=True)
class LatentMap:
    """Steps, one after the other."""

    steps: Sequence[Step]
    packs: bool = False

    def apply(self, z: Tensor) -> Tensor:
        """Latents (N, n, h, w) to others, in float64."""
        z = z.double()
        for step in self.steps:
            z = step.apply(z)
        return z

    def undo(self, z: Tensor) -> Tensor:
        """The inverse, in float64."""
        z = z.double()
        for step in reversed(self.steps):
            z = step.undo(z)
        return z


def fit(name: str, z: Tensor, images: Tensor) -> LatentMap:
    """The map of this name for latents (N, n, h, w) of mean 0 and deviation 1.

    ``images``, (N, C, h, w), are the same images, averaged to as many positions. At the end, as for
    the control, one factor makes the deviation 1 where a map changed it.
    """
    z = z.double()
    generator = torch.Generator().manual_seed(RANDOM)
    if name == "plain":
        return LatentMap([])
    if name == "F":
        return LatentMap([Packing()], packs=True)
    if name == "X":
        sides = (SIGNS_SIDE, SIGNS_SIDE)
        return LatentMap([Signs(torch.randint(2, sides, generator=generator).double() * 2 - 1)])

    steps: list[Step] = []
    if name in ("W", "R"):
        steps.append(Scale.of(z, per_channel=True))
    if name == "R":
        square = torch.randn(z.shape[1], z.shape[1], generator=generator, dtype=torch.float64)
        steps.append(Rotation(torch.linalg.qr(square).Q))
    if name == "U":
        covariance = torch.cov(z.transpose(0, 1).flatten(1))
        steps.append(Rotation(torch.linalg.eigh(covariance).eigenvectors.flip(1).T))
    if name in ("T+", "T-"):
        factor = 2.0 if name == "T+" else 0.5
        steps.append(Filter(lambda height, width: upper_half(height, width, factor)))
    if name == "E":
        ratio = (target_spectrum(images) / radial_spectrum(z)).sqrt()
        # bins in which no coefficient of this size falls
        gain = ratio.nan_to_num(1.0)
        steps.append(Filter(lambda height, width: gain[radial_bins(height, width)]))
    if not steps:
        raise ValueError(f"no map is named {name}: choose from {', '.join(MAPS)}")
    changed = LatentMap(steps).apply(z)
    return LatentMap([*steps, Scale.of(changed)])


def upper_half(height: int, width: int, factor: float) -> Tensor:
    """Gains (h, w): ``factor`` where a frequency is in the upper half along either axis, else 1."""
    gains = torch.full((height, width), factor, dtype=torch.float64)
    gains[: -(-height // 2), : -(-width // 2)] = 1.0
    return gains


def radial_spectrum(x: Tensor) -> Tensor:
    """Mean power in each radial bin, (RADIAL_BINS,); NaN in a bin without coefficients.

    Of (N, C, h, w), shifted and scaled to mean 0 and deviation 1.
    """
    x = Scale.of(x.double()).apply(x.double())
    sums, counts = radial_sums(cosines(x).square().mean((0, 1)))
    return sums / counts


def target_spectrum(images: Tensor) -> Tensor:
    """Spectrum matching's target with its default, delta 1: the images' power times frequency.

    The mean power of all coefficients is 1.
    """
    _, counts = radial_sums(images[0, 0].double())
    return tilted(radial_spectrum(images), counts)
