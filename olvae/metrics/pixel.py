"""PSNR and L1 of 8-bit images."""

import torch
from torch import Tensor

__all__ = ["l1", "psnr"]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR of each image in dB; infinite where the two are equal.

    Args:
        x, y: uint8 (B, C, H, W).

    Returns:
        float64 (B,): 10 log10(255^2 / mean squared error over the image).
    """
    rows = zip(x.split(64, 2), y.split(64, 2), strict=True)  # large images need little memory, and integers are exact
    error = torch.stack([(a.int() - b.int()).square().flatten(1).sum(1) for a, b in rows]).sum(0)
    return 10.0 * (255.0**2 / (error.double() / x[0].numel())).log10()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of each image, on a scale from 0 (black) to 1 (white).

    Args:
        x, y: uint8 (B, C, H, W).

    Returns:
        float64 (B,): the mean over the image of |x - y| / 255.
    """
    return (x.double() - y.double()).abs().flatten(1).mean(1) / 255.0
