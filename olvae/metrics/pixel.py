"""PSNR, L1, SSIM with a Gaussian or a uniform window, and MS-SSIM: functions of pairs of uint8 images."""

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from olvae.metrics.metric import Unavailable

SSIM_WINDOW = 11


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR of each image in dB, infinite for equal ones: uint8 (B, C, H, W) twice -> float64 (B,).

    10 log10(255^2 / mean squared error over the image).
    """
    rows = zip(x.split(64, 2), y.split(64, 2), strict=True)  # large images need little memory, and integers are exact
    error = torch.stack([(a.int() - b.int()).square().flatten(1).sum(1) for a, b in rows]).sum(0)
    return 10.0 * (255.0**2 / (error.double() / x[0].numel())).log10()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean of |x - y| / 255 over each image: uint8 (B, C, H, W) twice -> float64 (B,)."""
    return (x.double() - y.double()).abs().flatten(1).mean(1) / 255.0


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each image: uint8 (B, C, H, W) twice, of at least 11 pixels -> float64 (B,).

    Gaussian window of 11 pixels, sigma 1.5, K 0.01 and 0.03, range 255, mean over channels; in float32, which is 13
    times as fast as float64 and agrees to 2e-6.
    """
    _check_size("SSIM", x, SSIM_WINDOW)
    _, values = structural_similarity_index_measure(
        x.float(), y.float(), data_range=255.0, reduction="none", return_full_image=True
    )
    # torchmetrics' own mean includes the padded border; scikit-image's and the paper's do not.
    border = SSIM_WINDOW // 2
    return values[..., border:-border, border:-border].flatten(1).double().mean(1)


def ssim_uniform(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each image as scikit-image's default: a uniform window of 7 pixels, sample covariances."""
    _check_size("SSIM", x, 7)
    from skimage.metrics import structural_similarity  # slow to import

    pairs = zip(x.cpu().numpy(), y.cpu().numpy(), strict=True)
    return torch.tensor(
        [structural_similarity(a, b, channel_axis=0, data_range=255) for a, b in pairs], dtype=torch.float64
    )


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM of each image as torchmetrics computes it: uint8 (B, C, H, W) twice, of at least 176 pixels -> (B,).

    Range 255, the paper's five weights, the window of :func:`ssim`. Each scale averages 2x2 pixels of the one before.
    The first four give their contrast term, averaged over channels and over the positions where the window fits, the
    last its SSIM, averaged over all positions, with the image reflected at its border. A negative mean counts as 0.
    """
    _check_size("MS-SSIM with five scales", x, SSIM_WINDOW * 2**4)  # after four halvings the window still fits
    return multiscale_structural_similarity_index_measure(
        x.float(), y.float(), data_range=255.0, reduction="none"
    ).double()


def _check_size(name: str, x: Tensor, least: int) -> None:
    if min(x.shape[-2:]) < least:
        raise Unavailable(f"{name} needs images of at least {least} pixels, got {tuple(x.shape[-2:])}")
