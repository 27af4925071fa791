"""PSNR, L1, SSIM with a Gaussian or a uniform window, and MS-SSIM: functions of pairs of uint8 images."""

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from olvae.metrics.metric import Unavailable

SSIM_WINDOW = 11

UNIFORM_WINDOW = 7


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


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each image: Gaussian window of 11 pixels, sigma 1.5, K 0.01 and 0.03, range 255, mean over channels.

    Args:
        x, y: uint8 (B, C, H, W), at least 11 pixels in height and width.

    Returns:
        float64 (B,); computed in float32, which is 13 times as fast and agrees to 2e-6.
    """
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise Unavailable(f"SSIM needs images of at least {SSIM_WINDOW} pixels, got {tuple(x.shape[-2:])}")
    _, values = structural_similarity_index_measure(
        x.float(), y.float(), data_range=255.0, reduction="none", return_full_image=True
    )
    # torchmetrics' own mean includes the padded border; scikit-image's and the paper's do not.
    border = SSIM_WINDOW // 2
    return values[..., border:-border, border:-border].flatten(1).double().mean(1)


def ssim_uniform(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each image as scikit-image computes it by default: a uniform window of 7 pixels, sample covariances.

    Args:
        x, y: uint8 (B, C, H, W), at least 7 pixels in height and width.

    Returns:
        float64 (B,).
    """
    if min(x.shape[-2:]) < UNIFORM_WINDOW:
        raise Unavailable(f"SSIM needs images of at least {UNIFORM_WINDOW} pixels, got {tuple(x.shape[-2:])}")
    from skimage.metrics import structural_similarity  # slow to import

    pairs = zip(x.cpu().numpy(), y.cpu().numpy(), strict=True)
    return torch.tensor(
        [structural_similarity(a, b, channel_axis=0, data_range=255) for a, b in pairs], dtype=torch.float64
    )


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

MS_SSIM_SIZE = SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)
"""The least height and width in pixels: after four halvings the window still fits."""


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM of each image as torchmetrics computes it, data range 255, with the paper's five weights.

    Each scale averages 2x2 pixels of the one before; the window is that of :func:`ssim`. The first four scales give
    their contrast term, averaged over channels and over the positions where the window fits. The last gives its SSIM,
    averaged over all positions, with the image reflected at its border. A negative mean counts as 0.

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
