"""A Fréchet distance in the features of EfficientNet-Lite0, which installs from PyPI.

Never to be called rFID.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.data.pixels.size_and_range import from_uint8
from olvae.devices import full_float32
from olvae.metrics.features import Features, frechet_distance
from olvae.modules.frozen import installed_lite0, lite0_network

SIZE = 224


class Lite0:
    """The 1280 pooled features of EfficientNet-Lite0, in float32.

    Images are resized to 224x224 (bicubic).
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        # a third faster
        self._network = lite0_network(installed_lite0()).to(
            device, memory_format=torch.channels_last
        )
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W) -> float32 (B, 1280)."""
        x = from_uint8(images.to(self._device))
        with full_float32(x):
            x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
            pooled = self._network.forward_head(self._network.forward_features(x), pre_logits=True)
        features: Features = pooled.cpu().numpy()
        return features

    def of(self, batches: Iterable[Tensor]) -> Features:
        """Features of all batches, (N, 1280)."""
        return np.concatenate([self(batch) for batch in batches])


def frechet_lite0(a: Features, b: Features) -> float:
    """The Fréchet distance of two sets of features (N, 1280):
    :func:`~olvae.metrics.features.frechet_distance`.

    Below some thousands of images it is biased upwards:
    compare it only between sets of the same size.

    Raises:
        ValueError: a set has fewer than two images.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(
            f"a Fréchet distance needs at least 2 images on both sides, got {len(a)} and {len(b)}"
        )
    return frechet_distance(a, b)
