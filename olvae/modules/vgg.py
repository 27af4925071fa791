"""VGG19 up to the features that ESRGAN's perceptual loss compares, with torchvision's weights."""

from pathlib import Path

import torch
from torch import nn

from olvae.modules.constant import Normalise
from olvae.weights import VGG19, load_weights_file

__all__ = ["conv5_4"]

DEPTH = 35
"""Layers of torchvision's ``features`` up to and including conv5_4, the last convolution, whose ReLU comes after."""


def conv5_4(path: Path | None) -> nn.Module:
    """VGG19's last convolution before its activation: images (B, 3, H, W) in [-1, 1] -> (B, 512, H/16, W/16).

    Args:
        path: the file of :data:`olvae.weights.VGG19`; None for weights without values, to count the network.

    Raises:
        ValueError: the file holds something else.
    """
    import torchvision

    device = torch.empty(0).device
    with torch.device("meta"):  # the classifier, most of VGG19, is not needed
        features = torchvision.models.vgg19(weights=None, init_weights=False).features[:DEPTH].requires_grad_(False)
    features.to_empty(device=device)
    if path is not None:
        own = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
        load_weights_file(path, VGG19, "features.", own)
    return nn.Sequential(Normalise(), features)
