"""Gaussian loss: what a blur takes away from an image, compared [P 4.3]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.losses.reconstruction import l1
from olvae.modules.precision import island, no_autocast

__all__ = ["gaussian_blur", "gaussian_loss"]


def gaussian_blur(x: Tensor, kernel_size: int = 5, sigma: float = 1.0) -> Tensor:
    """Separable Gaussian filter with reflected borders, in float32: (B, C, H, W) -> (B, C, H, W)."""
    x = island(x)
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    with no_autocast(x):
        x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def gaussian_loss(x: Tensor, y: Tensor, kernel_size: int = 5, sigma: float = 1.0) -> Tensor:
    """L1 between x - blur(x) and y - blur(y); 5x5, sigma 1 [D].

    Args:
        x, y: (B, C, H, W) in [-1, 1].

    Returns:
        The mean over all elements; gradients flow to both.
    """
    difference = island(x) - island(y)  # the filter is linear: the difference of the residuals is its residual
    return l1(difference, gaussian_blur(difference, kernel_size, sigma))
