"""Structural similarity over five scales (Wang et al. 2003)."""

from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from olvae.metrics.metric import Unavailable
from olvae.metrics.ssim import SSIM_WINDOW

__all__ = ["MS_SSIM_SIZE", "MS_SSIM_WEIGHTS", "ms_ssim"]

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SIZE = SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)
"""Pixels that an image must have in height and width: the window, after four halvings."""


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM of each image as torchmetrics computes it, data range 255, with the paper's five weights.

    Each scale is the mean over 2x2 pixels of the one before, its window that of :func:`ssim`. The first four give
    their contrast term, averaged over channels and over the places where the window fits; the last gives its SSIM,
    averaged over all places, with the image reflected at its border. A negative mean counts as 0.

    Args:
        x, y: uint8 (B, C, H, W), at least 176 pixels in height and width.

    Returns:
        float64 (B,), computed in float32.
    """
    if min(x.shape[-2:]) < MS_SSIM_SIZE:
        raise Unavailable(
            f"MS-SSIM with five scales needs images of at least {MS_SSIM_SIZE} pixels, got {tuple(x.shape[-2:])}"
        )
    return multiscale_structural_similarity_index_measure(
        x.float(), y.float(), data_range=255.0, reduction="none", betas=MS_SSIM_WEIGHTS, normalize="relu"
    ).double()
