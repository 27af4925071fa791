"""Add baselines to an evaluation: bicubic resampling, and the first target before its training."""

from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from olvae.data.image import from_uint8, image_to_tensor, tensor_to_picture, to_uint8
from olvae.evaluation.observers.observer import Observer, Subject
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.loader import Target
from olvae.modules.distributions import Deterministic

UNTRAINED = "untrained"
"""A baseline's name, which no target may have."""


class Bicubic(Autoencoder):
    """Shrink images by a factor and enlarge them again, both with Pillow's antialiased bicubic."""

    def __init__(self, factor: int, channels: int = 3) -> None:
        super().__init__()
        self.downscale = factor
        self.in_channels = self.latent_channels = channels

    def encode(self, x: Tensor) -> Deterministic:
        return Deterministic(_resized(x, x.shape[-1] // self.downscale, x.shape[-2] // self.downscale))

    def decode(self, z: Tensor) -> Tensor:
        return _resized(z, z.shape[-1] * self.downscale, z.shape[-2] * self.downscale)


class Baselines(Observer):
    """Rows for bicubic resampling by the target's factor, and for the target's networks untrained."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        untrained = self._target.untrained()
        bicubic = Bicubic(untrained.downscale, untrained.in_channels)
        return {
            **subjects,
            f"bicubic, {bicubic.downscale}x smaller and back": Subject(bicubic, baseline=True),
            UNTRAINED: Subject(untrained, baseline=True),
        }


def _resized(images: Tensor, width: int, height: int) -> Tensor:
    """Float images in [-1, 1], through 8-bit pictures of another size."""
    pictures = (tensor_to_picture(image) for image in to_uint8(images).cpu())
    resized = [image_to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC)) for picture in pictures]
    return from_uint8(torch.stack(resized).to(images.device))
