"""LPIPS networks from the lpips package, with torchvision's weights in their trunks."""

import warnings
from pathlib import Path
from typing import Literal

from torch import nn

from olvae.weights import ALEXNET, VGG16, WeightsFile, load_weights_file

__all__ = ["TRUNKS", "Trunk", "perceptual_network"]


Trunk = Literal["vgg", "alex"]

TRUNKS: dict[Trunk, WeightsFile] = {"vgg": VGG16, "alex": ALEXNET}
"""The trunks by the lpips package's names, and torchvision's files for them."""


def perceptual_network(trunk: Trunk, path: Path | None) -> nn.Module:
    """LPIPS (Zhang et al. 2018), version 0.1 with its own linear heads; frozen, in evaluation mode.

    Two batches of images (B, 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1).

    Args:
        path: the trunk's file of :data:`TRUNKS`; None for random weights, to count the network.

    Raises:
        ValueError: the file holds something else.
    """
    import lpips

    with warnings.catch_warnings():  # the package calls torchvision's API of before 0.13
        warnings.simplefilter("ignore", UserWarning)
        network = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    assert isinstance(network, nn.Module)
    assert isinstance(network.net, nn.Module)
    network.requires_grad_(False).eval()
    if path is None:
        return network
    own = {f"features.{name.split('.', 1)[1]}": tensor for name, tensor in network.net.state_dict().items()}
    load_weights_file(path, TRUNKS[trunk], "features.", own)  # the package cuts torchvision's trunk into slices
    return network
