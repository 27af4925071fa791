"""Equivariance of the latent under scaling and rotation, as in EQ-VAE."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.models.parts.part import Part, Step

if TYPE_CHECKING:
    from olvae.models.liteautoencoder import LiteAutoencoderKL


class Equivariance(Part):
    """On some steps, shrink and rotate the latent and the target image alike before they are compared.

    The choice is the same in all processes and for the whole update. Not taken over from EQ-VAE's published code: a
    quarter of its other steps is on images that were shrunk before they are encoded.

    Args:
        probability: of such a step; 0.5 is the paper's (Kouzelis et al. 2025).
        antialias: of the scaling; the published code has none.
        adversary: whether the adversary plays on these steps, as in the published code. Its discriminator has to take
            images of any size, as PatchGAN does.
    """

    def __init__(self, probability: float = 0.5, antialias: bool = False, adversary: bool = True) -> None:
        super().__init__()
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must be between 0 and 1, got {probability}")
        self.probability, self.antialias, self.adversary = probability, antialias, adversary

    def conflicts(self, model: "LiteAutoencoderKL") -> Iterable[str]:
        if model.freeze_decoder and model.stand_in is not None:
            yield f"parts.{self.name}: the decoder is frozen (freeze_decoder), and nothing is decoded: leave it out"

    def check(self, model: "LiteAutoencoderKL", source: Source) -> None:
        if model.objective.perceptual is not None and source.size < 64:
            needs = "equivariance shrinks images to a quarter, and the perceptual loss needs 16 pixels"
            raise ConfigError(f"data.params.size: {source.size}: {needs}: use 64 or more, or set lpips_weight to 0")
        f = model.autoencoder.downscale
        sizes = [f * positions for positions in sizes_of(source.size // f)]
        if model.adversary is not None and self.adversary and sizes:
            try:
                for size in {sizes[0], sizes[-1]}:
                    model.adversary.check_image(source.channels, size)
            except ConfigError as error:
                message = f"model.params.parts.{self.name}.params.adversary: set it to false, or take PatchGAN: {error}"
                raise ConfigError(message) from error

    def on_latent(self, model: "LiteAutoencoderKL", step: Step) -> None:
        if not step.warming_up and step.shared.random() < self.probability:
            step.latent, step.target = transform_alike(step.latent, step.target, step.shared, self.antialias)
            step.adversary_plays &= self.adversary

    def describe(self) -> str:
        return f"on {self.probability:.0%} of the steps"


def sizes_of(positions: int) -> range:
    """The sizes in latent positions to shrink so many to: of 32, EQ-VAE's published 8 to 31."""
    return range(math.ceil(positions / 4), positions)


def transform_alike(
    z: Tensor, x: Tensor, generator: np.random.Generator, antialias: bool = False
) -> tuple[Tensor, Tensor]:
    """Shrink and rotate latents (B, n_z, h, w), and the images (B, C, f h, f w) that they should decode to, alike.

    The scale is at least a quarter and keeps latent positions whole, the rotation is by 90, 180 or 270 degrees, as in
    EQ-VAE's published code; both are the same for the whole batch. Scaling is bilinear, in float32. A latent of which
    no smaller size has whole positions is rotated alone.
    """
    h, w = z.shape[-2:]
    common = math.gcd(h, w)
    sizes = sizes_of(common) or range(common, common + 1)
    size = sizes[generator.integers(len(sizes))]
    turns = 1 + int(generator.integers(3))

    def transform(t: Tensor) -> Tensor:
        if size != common:
            shape = [side * size // common for side in t.shape[-2:]]
            t = F.interpolate(t.float(), size=shape, mode="bilinear", antialias=antialias)
        return t.rot90(turns, dims=(-2, -1))

    return transform(z), transform(x)
