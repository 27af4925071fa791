"""Peak signal-to-noise ratio."""

from torch import Tensor

__all__ = ["psnr"]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR of each image in dB; infinite where the two are equal.

    Args:
        x, y: uint8 (B, C, H, W).

    Returns:
        float64 (B,): 10 log10(255^2 / mean squared error over the image).
    """
    error = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10.0 * (255.0**2 / error).log10()
