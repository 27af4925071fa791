"""Mean absolute error."""

from torch import Tensor

__all__ = ["l1"]


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of each image, where black is 0 and white is 1.

    Args:
        x, y: uint8 (B, C, H, W).

    Returns:
        float64 (B,): the mean over the image of |x - y| / 255.
    """
    return (x.double() - y.double()).abs().flatten(1).mean(1) / 255.0
