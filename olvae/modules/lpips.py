"""LPIPS networks from the lpips package, with torchvision's weights in their trunks."""

import warnings
from pathlib import Path
from typing import Literal

from torch import nn

from olvae.weights import ALEXNET, VGG16, WeightsFile, read_weights_file

__all__ = ["TRUNKS", "Trunk", "perceptual_network"]


Trunk = Literal["vgg", "alex"]

TRUNKS: dict[Trunk, WeightsFile] = {"vgg": VGG16, "alex": ALEXNET}
"""The trunks by the lpips package's names, and torchvision's files for them."""


def perceptual_network(trunk: Trunk, path: Path) -> nn.Module:
    """LPIPS (Zhang et al. 2018), version 0.1 with its own linear heads; frozen, in evaluation mode.

    Two batches of images (B, 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1).

    Args:
        path: the trunk's file of :data:`TRUNKS`.

    Raises:
        ValueError: the file holds something else.
    """
    import lpips

    with warnings.catch_warnings():  # the package calls torchvision's API of before 0.13
        warnings.simplefilter("ignore", UserWarning)
        network = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    assert isinstance(network, nn.Module)
    _load_trunk(network, path, TRUNKS[trunk])
    return network.requires_grad_(False).eval()


def _load_trunk(network: nn.Module, path: Path, file: WeightsFile) -> None:
    """torchvision's ``features.N.*`` into the slices of the lpips package, which keep the index N."""
    state = read_weights_file(path, file, "features.")
    trunk = network.net
    assert isinstance(trunk, nn.Module)
    own = trunk.state_dict()
    sources = {name: f"features.{name.split('.', 1)[1]}" for name in own}
    for name, source in sorted(sources.items(), key=lambda pair: pair[1]):
        if source not in state:
            raise ValueError(f"{path} is not a file of {file.what} weights: {source} is missing")
        if state[source].shape != own[name].shape:
            shapes = f"{tuple(state[source].shape)} for {tuple(own[name].shape)}"
            raise ValueError(f"{path} is not a file of {file.what} weights: {source} is {shapes}")
    trunk.load_state_dict({name: state[source] for name, source in sources.items()})
