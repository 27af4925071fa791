"""Add baselines to an evaluation: bicubic resampling, and the first target before its training."""

from collections.abc import Callable, Mapping

import torch
from PIL import Image
from torch import Tensor

from olvae.data.image import Bands, from_uint8, image_to_tensor, tensor_to_picture, to_uint8
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
        return Deterministic(_resized(x, lambda side: side // self.downscale))

    def decode(self, z: Tensor) -> Tensor:
        return _resized(z, lambda side: side * self.downscale)


class Baselines(Observer):
    """Rows for bicubic resampling by the target's factor, and for the target's networks untrained."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        untrained = self._target.untrained()
        factor = untrained.downscale
        bicubic = Bicubic(factor, untrained.in_channels)
        return {
            **subjects,
            f"bicubic, {factor}x smaller and back": Subject(bicubic, baseline=True),
            UNTRAINED: Subject(untrained, baseline=True),
        }


def _resized(images: Tensor, side: Callable[[int], int]) -> Tensor:
    """Float images in [-1, 1], through 8-bit pictures of other sides."""

    def resized(picture: Bands) -> Bands:
        return picture.resize((side(picture.width), side(picture.height)), Image.Resampling.BICUBIC)

    pictures = [image_to_tensor(resized(tensor_to_picture(image))) for image in to_uint8(images).cpu()]
    return from_uint8(torch.stack(pictures).to(images.device))
