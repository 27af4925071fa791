"""Wavelet loss: high-frequency detail, compared where it is separated from the rest [P 4.3]."""

from torch import Tensor

from olvae.losses.reconstruction import charbonnier
from olvae.modules.wavelet import dwt2

__all__ = ["wavelet_loss"]


def wavelet_loss(x: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:
    """Charbonnier between the three level-1 Haar detail bands, divided by 2, of two images [D].

    Args:
        x, y: (B, C, H, W) in [-1, 1].
        eps: Charbonnier's.

    Returns:
        The mean over bands and pixels; gradients flow to both through the transform.
    """
    channels = x.shape[1]
    return charbonnier(dwt2(x)[:, channels:] / 2, dwt2(y)[:, channels:] / 2, eps)  # (B, 3C, H/2, W/2)
