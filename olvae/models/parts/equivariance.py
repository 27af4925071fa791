"""Equivariance of the latent under scaling and rotation, as in EQ-VAE."""

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import Sides
from olvae.data.source import Source
from olvae.models.parts.part import Model, Part, Step, nothing_decoded


class Equivariance(Part):
    """On some steps, shrink and rotate the latent and the target image alike before decoding.

    The choice is the same in all processes and for the whole update. All defaults are from EQ-VAE's
    published code. Its losses are sums over the image, so that a step at scale s weighs s^2 there,
    .42 on average. Here they are means: every step weighs the same, 1 / s^2 times as much.

    Args:
        probability: share of such steps; the default is also the paper's (Kouzelis et al. 2025).
        antialias: filter when scaling.
        adversary: whether the adversary plays on these steps too; its discriminator then has to
            take images of any size, as PatchGAN does.
        shrunk: share of steps, among the others, that shrink the images before they are encoded, by
            the same scales, so that the autoencoder still knows small images. Images that come with
            moments stay whole.
    """

    moves_latents = True

    def __init__(
        self,
        probability: float = 0.5,
        antialias: bool = False,
        adversary: bool = True,
        shrunk: float = 0.25,
    ) -> None:
        super().__init__()
        for name, value in {"probability": probability, "shrunk": shrunk}.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        self.probability = probability
        self.antialias = antialias
        self.adversary = adversary
        self.shrunk = shrunk

    def conflicts(self, model: Model) -> Iterable[str]:
        yield from nothing_decoded(self, model)

    def check(self, model: Model, source: Source) -> None:
        if model.objective.perceptual is not None and min(source.size) < 64:
            raise ConfigError(
                f"data.params.size: {source.size.short}: equivariance shrinks images to a quarter, "
                "and the perceptual loss needs 16 pixels: use 64 or more, or set lpips_weight to 0"
            )

        # The discriminator has to take the smallest and the largest size, also turned.
        common = math.gcd(*source.size // model.autoencoder.upscale)
        sizes = [Sides(*(side * n // common for side in source.size)) for n in sizes_of(common)]
        if model.adversary is not None and self.adversary and sizes:
            try:
                for size in {sizes[0], sizes[-1], Sides(*sizes[0][::-1]), Sides(*sizes[-1][::-1])}:
                    model.adversary.check_image(source.channels, size)
            except ConfigError as error:
                where = f"model.params.parts.{self.name}.params.adversary"
                raise ConfigError(
                    f"{where}: set it to false, or change the discriminator: {error}"
                ) from error

    def on_images(self, model: Model, step: Step) -> None:
        # A step transforms latents and targets, or shrinks images, or leaves both as they are.
        self._alike = not step.warming_up and step.rng.random() < self.probability
        whole = step.warming_up or self._alike or step.moments is not None
        if not whole and step.rng.random() < self.shrunk:
            positions = math.gcd(*step.images.shape[-2:]) // model.autoencoder.upscale
            step.images = resize(step.images, _fraction(positions, step.rng), self.antialias)
            step.adversary_plays &= self.adversary

    def on_latent(self, model: Model, step: Step) -> None:
        if self._alike:
            step.latent, step.target = transform_alike(
                step.latent, step.target, step.rng, self.antialias
            )
            step.adversary_plays &= self.adversary

    def describe(self) -> str:
        others = (1.0 - self.probability) * self.shrunk
        return f"on {self.probability:.0%} of the steps, shrunk images on {others:.0%}"


def sizes_of(positions: int) -> range:
    """Return the latent positions per side to shrink to: from 32, EQ-VAE's published 8 to 31."""
    return range(math.ceil(positions / 4), positions)


def transform_alike(
    z: Tensor, x: Tensor, generator: np.random.Generator, antialias: bool = False
) -> tuple[Tensor, Tensor]:
    """Shrink and rotate latents (B, n_z, h, w) and their target images (B, C, f h, f w) alike.

    The scale is at least a quarter and keeps latent positions whole, the rotation is by 90, 180 or
    270 degrees, as in EQ-VAE's published code; both are the same for the whole batch. Scaling is
    bilinear, in float32. A latent without a smaller size of whole positions is only rotated.
    """
    scale = _fraction(math.gcd(*z.shape[-2:]), generator)
    turns = 1 + int(generator.integers(3))
    z = resize(z, scale, antialias).rot90(turns, dims=(-2, -1))
    x = resize(x, scale, antialias).rot90(turns, dims=(-2, -1))
    return z, x


def _fraction(positions: int, generator: np.random.Generator) -> Fraction:
    """Draw a scale that keeps this number of positions whole; 1 if no smaller one does."""
    sizes = sizes_of(positions) or range(positions, positions + 1)
    return Fraction(sizes[generator.integers(len(sizes))], positions)


def resize(t: Tensor, scale: Fraction, antialias: bool) -> Tensor:
    """Scale (B, C, H, W) bilinearly, in float32; sides times ``scale`` have to be whole numbers.

    A scale of 1 returns the tensor itself.
    """
    if scale == 1:
        return t
    shape = [int(side * scale) for side in t.shape[-2:]]
    return F.interpolate(t.float(), size=shape, mode="bilinear", antialias=antialias)
