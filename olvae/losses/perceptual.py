"""LPIPS through the lpips package, with its VGG weights found or asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from olvae.modules.lpips import perceptual_network
from olvae.modules.precision import island, no_autocast
from olvae.weights import VGG16, find_weights

REMEDY = (
    "name its place with model.params.lossconfig.params.lpips_weights=FILE, or do without: "
    "model.params.lossconfig.params.lpips_weight=0"
)

__all__ = ["LPIPS", "vgg16_weights"]

VGG16_FILE = VGG16.name


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018), VGG, version 0.1, as the lpips package computes it.

    The network is a constant: it follows the module from device to device, but it is in no state dict, no
    parameter list and no copy of the module.

    Args:
        weights: torchvision's VGG16 ImageNet weights, a file named vgg16-397923af.pth. If it is not given, it is
            looked for, then downloaded: :func:`olvae.weights.find_weights`.

    Raises:
        FileNotFoundError: the weights can't be had.
        ValueError: the file holds something else.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.__dict__["network"] = perceptual_network("vgg", vgg16_weights(weights))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance between two batches of images (B, C, H, W) in [-1, 1], in float32.

        The network knows three channels: images with any other number are compared channel by channel, each as
        a grey picture [D].
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


def vgg16_weights(path: str | None = None) -> Path:
    """The file of torchvision's VGG16 weights: the given one, or as :func:`find_weights` finds it."""
    if path is None:
        return find_weights(VGG16, remedy=REMEDY)
    if not Path(path).is_file():
        raise FileNotFoundError(f"LPIPS needs {path}, which is not there: get {VGG16.url}, or {REMEDY}")
    return Path(path)
