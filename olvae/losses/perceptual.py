"""Perceptual losses: LPIPS, and ESRGAN's; distances of VGG's features, with its weights found or downloaded."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from olvae.checkpoint import VGG16, VGG19, WeightsFile, find_weights
from olvae.modules.base import island, no_autocast
from olvae.modules.frozen import Constant, conv5_4, perceptual_network

Perceptual = Literal["lpips", "esrgan"]

REMEDY = (
    "name the file with model.params.lossconfig.params.lpips_weights=FILE, or train without a perceptual loss: "
    "model.params.lossconfig.params.lpips_weight=0"
)


class PerceptualLoss(Constant, ABC):
    """A distance of images in the features of a frozen network, a constant: see :class:`Constant`.

    ``build`` makes the network from its file of weights; from None without values, to count it. ``weights`` is the file
    if it is not to be found or downloaded; FileNotFoundError if it is missing.
    """

    def __init__(
        self, title: str, file: WeightsFile, build: Callable[[Path | None], nn.Module], weights: str | None
    ) -> None:
        if torch.empty(0).device.type == "meta":
            super().__init__(build(None))
            return
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"{title} needs {weights}, which is missing: get {file.url}, or {REMEDY}")
        super().__init__(build(find_weights(file, remedy=REMEDY) if weights is None else Path(weights)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance between two batches of images (B, C, H, W) in [-1, 1], in float32.

        The network takes three channels: images with another number are compared channel by channel, each as a grey
        image [D]. Images have 16 pixels or more.
        """
        x, y = (_three_channels(island(image)) for image in (x, y))
        with no_autocast(x):
            return self.distance(x, y)

    @abstractmethod
    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Of images of three channels; a scalar."""


class LPIPS(PerceptualLoss):
    """Learned perceptual distance (Zhang et al. 2018), VGG, version 0.1, as the lpips package computes it.

    ``weights`` is torchvision's file of VGG16, vgg16-397923af.pth; see :class:`PerceptualLoss`.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__("LPIPS", VGG16, lambda path: perceptual_network("vgg", path), weights)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        distances: Tensor = self.network(x, y)  # (B, 1, 1, 1)
        return distances.mean()


class ESRGAN(PerceptualLoss):
    """ESRGAN's perceptual loss (Wang et al. 2018): mean L1 distance of VGG19's conv5_4 features before activation.

    The paper's weight is 1, beside 0.01 for L1 and 0.005 for the adversary. Images are normalised as for ImageNet.
    ``weights`` is torchvision's file of VGG19, vgg19-dcbb9e9d.pth; see :class:`PerceptualLoss`.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__("the ESRGAN loss", VGG19, conv5_4, weights)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        distance: Tensor = (self.network(x) - self.network(y)).abs().mean()
        return distance


PERCEPTUAL: dict[Perceptual, type[LPIPS] | type[ESRGAN]] = {"lpips": LPIPS, "esrgan": ESRGAN}


def _three_channels(x: Tensor) -> Tensor:
    return x if x.shape[1] == 3 else x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)  # (B C, 3, H, W)
