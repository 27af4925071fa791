"""LPIPS through the lpips package, with its VGG16 weights found or downloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.modules.lpips import perceptual_network
from olvae.modules.precision import island, no_autocast
from olvae.weights import VGG16, find_weights

__all__ = ["LPIPS"]


REMEDY = (
    "name the file with model.params.lossconfig.params.lpips_weights=FILE, or train without LPIPS: "
    "model.params.lossconfig.params.lpips_weight=0"
)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018), VGG, version 0.1, as the lpips package computes it.

    The network is a constant: it moves with the module from device to device, but is not in its state dict, its
    parameters or its copies.

    Args:
        weights: torchvision's VGG16 ImageNet weights, a file named vgg16-397923af.pth; by default searched, then
            downloaded: :func:`olvae.weights.find_weights`. On the meta device, where nothing has values, none are read.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: the file holds something else.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        if torch.empty(0).device.type == "meta":
            self.__dict__["network"] = perceptual_network("vgg", None)
            return
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"LPIPS needs {weights}, which is missing: get {VGG16.url}, or {REMEDY}")
        path = find_weights(VGG16, remedy=REMEDY) if weights is None else Path(weights)
        self.__dict__["network"] = perceptual_network("vgg", path)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance between two batches of images (B, C, H, W) in [-1, 1], in float32.

        The network takes three channels: images with another number are compared channel by channel, each as a grey
        image [D].
        """
        x, y = (_three_channels(island(image)) for image in (x, y))
        with no_autocast(x):
            distance: Tensor = self.__dict__["network"](x, y).mean()
        return distance

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LPIPS":
        self.__dict__["network"]._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "LPIPS":
        return self


def _three_channels(x: Tensor) -> Tensor:
    return x if x.shape[1] == 3 else x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)  # (B C, 3, H, W)
