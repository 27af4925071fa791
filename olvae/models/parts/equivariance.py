"""Equivariance of the latent under scaling and rotation, as in EQ-VAE."""

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

SCALES = (0.25, 0.5, 0.75, 1.0)


class Equivariance(Part):
    """On some steps, scale and rotate the latent and the target image alike before they are compared.

    The choice is the same in all processes and for the whole update. The adversary sits these steps out.

    ``probability``: of such a step.
    """

    def __init__(self, probability: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must be between 0 and 1, got {probability}")
        self.probability = probability

    def conflicts(self, model: "LiteAutoencoderKL") -> Iterable[str]:
        if model.freeze_decoder and model.stand_in is not None:
            yield f"parts.{self.name}: the decoder is frozen (freeze_decoder), and nothing is decoded: leave it out"

    def check(self, model: "LiteAutoencoderKL", source: Source) -> None:
        if model.objective.perceptual is not None and source.size < 64:
            needs = "equivariance shrinks images to a quarter, and the perceptual loss needs 16 pixels"
            raise ConfigError(f"data.params.size: {source.size}: {needs}: use 64 or more, or set lpips_weight to 0")

    def on_latent(self, model: "LiteAutoencoderKL", step: Step) -> None:
        if not step.warming_up and step.shared.random() < self.probability:
            step.latent, step.target = transform_alike(step.latent, step.target, step.shared)
            step.adversary_plays = False

    def describe(self) -> str:
        return f"on {self.probability:.0%} of the steps"


def transform_alike(z: Tensor, x: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Scale and rotate latents (B, n_z, h, w), and the images (B, C, f h, f w) that they should decode to, alike.

    The scale is one of those :data:`SCALES` that keep latent positions whole, the rotation a multiple of 90 degrees;
    both are the same for the whole batch. Scaling is bilinear and antialiased, in float32.
    """
    h, w = z.shape[-2:]
    scales = [s for s in SCALES if (s * h).is_integer() and (s * w).is_integer()]
    scale = scales[generator.integers(len(scales))]
    turns = int(generator.integers(4))

    def transform(t: Tensor) -> Tensor:
        if scale != 1.0:
            size = [round(scale * side) for side in t.shape[-2:]]
            t = F.interpolate(t.float(), size=size, mode="bilinear", antialias=True)
        return t.rot90(turns, dims=(-2, -1))

    return transform(z), transform(x)
