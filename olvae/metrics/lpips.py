"""LPIPS, the learned perceptual distance (Zhang et al. 2018), as a metric."""

from pathlib import Path

import torch
from torch import Tensor

from olvae.metrics.metric import Unavailable
from olvae.modules.frozen import Trunk, perceptual_network

__all__ = ["LPIPS_SIZE", "LPIPSDistance"]

LPIPS_SIZE: dict[Trunk, int] = {"vgg": 16, "alex": 31}
"""The least height and width, in pixels, at which the last layer still has a position."""


class LPIPSDistance:
    """LPIPS of each pair, version 0.1, as the lpips package computes it.

    Args:
        trunk: ``vgg`` or ``alex``.
        path: of the trunk's weights, :data:`olvae.modules.frozen.TRUNKS`.
        device: where it is computed, in float32.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, trunk: Trunk, path: Path, device: str | torch.device = "cpu") -> None:
        self._least = LPIPS_SIZE[trunk]
        self._network = perceptual_network(trunk, path).to(device)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Two batches of uint8 images (B, 3, H, W) -> float64 (B,)."""
        if x.shape[1] != 3:
            raise Unavailable(f"LPIPS needs images of 3 channels, got {x.shape[1]}")
        if min(x.shape[-2:]) < self._least:
            raise Unavailable(f"LPIPS needs images of at least {self._least} pixels, got {tuple(x.shape[-2:])}")
        distances: Tensor = self._network(x.float() / 127.5 - 1.0, y.float() / 127.5 - 1.0)  # (B, 1, 1, 1)
        return distances.flatten().double()
