"""LPIPS through the lpips package, with its VGG weights found or asked for."""

import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.modules.precision import island, no_autocast

__all__ = ["LPIPS", "vgg16_weights"]

VGG16_FILE = "vgg16-397923af.pth"
VGG16_URL = f"https://download.pytorch.org/models/{VGG16_FILE}"


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018), VGG, version 0.1, as the lpips package computes it.

    The network is a constant: it follows the module from device to device, but it is in no state dict, no
    parameter list and no copy of the module.

    Args:
        weights: torchvision's VGG16 ImageNet weights, a file named vgg16-397923af.pth. If it is not given,
            torch's hub cache is searched, then the file is downloaded into it.

    Raises:
        FileNotFoundError: the weights can't be had.
        ValueError: the file holds something else.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        import lpips

        with warnings.catch_warnings():  # the package calls torchvision as it was called before 0.13
            warnings.simplefilter("ignore", UserWarning)
            network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        _load_vgg16(network, vgg16_weights(weights))
        self.__dict__["network"] = network.requires_grad_(False).eval()

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
    """The file of torchvision's VGG16 weights: the given one, the cached one, or a fresh download."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    remedy = f"get {VGG16_URL} into {cached.parent}, or name its place with lpips_weights, or set lpips_weight to 0"
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"LPIPS needs {path}, which is not there: {remedy}")
        return Path(path)
    if not cached.is_file():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(VGG16_URL, str(cached), hash_prefix="397923af")
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: another checksum
            raise FileNotFoundError(
                f"LPIPS needs {VGG16_FILE}, which could not be downloaded ({error}): {remedy}"
            ) from error
    return cached


def _load_vgg16(network: nn.Module, path: Path) -> None:
    """torchvision's ``features.N.*`` into the slices of the lpips package, which keep the index N."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a file of VGG16 weights: {type(error).__name__}") from error
    trunk = network.net
    assert isinstance(trunk, nn.Module)
    wanted = {name: f"features.{name.split('.', 1)[1]}" for name in trunk.state_dict()}
    missing = sorted(set(wanted.values()) - set(state)) if isinstance(state, dict) else ["features.0.weight"]
    if missing:
        raise ValueError(f"{path} is not a file of VGG16 weights: it has no {missing[0]}")
    trunk.load_state_dict({name: state[source] for name, source in wanted.items()})
