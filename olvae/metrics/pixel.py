"""PSNR and L1 of 8-bit images."""

from torch import Tensor

__all__ = ["l1", "psnr"]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR of each image in dB; infinite where the two are equal.

    Args:
        x, y: uint8 (B, C, H, W).

    Returns:
        float64 (B,): 10 log10(255^2 / mean squared error over the image).
    """
    error = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10.0 * (255.0**2 / error).log10()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of each image, on a scale from 0 (black) to 1 (white).

    Args:
        x, y: uint8 (B, C, H, W).

    Returns:
        float64 (B,): the mean over the image of |x - y| / 255.
    """
    return (x.double() - y.double()).abs().flatten(1).mean(1) / 255.0
