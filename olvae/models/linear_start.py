"""Fit the linear paths of an autoencoder in closed form, so that training begins where linear algebra ends."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from time import monotonic

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.data.image import from_uint8, to_uint8
from olvae.data.source import LoaderProcess, Source
from olvae.metrics.metric import psnr
from olvae.models.autoencoder import LiteVAE
from olvae.modules.linear import JointMoments

POSITIONS = 2**16  # latent positions to fit on, hundreds for each unknown of an f8 code
CROPS = (256, 4096)  # the fewest and the most training crops to take for them
CROP_BYTES = 2**28  # in memory at most, if that is fewer crops
PART = 2**13  # positions that are summed at a time
MEASURED_IMAGES = 64  # of validation, on which a fitted code is measured

Means = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [-1, 1] to latents (B, n_z, H/f, W/f)."""


@dataclass(frozen=True)
class LinearStart:
    """How good a fitted linear code is.

    Args:
        crops: training crops that it was fitted on.
        psnr: mean over ``images`` validation images in dB; None without a linear path of the decoder, or images.
        seconds: that it took.
    """

    crops: int
    psnr: float | None
    images: int
    seconds: float

    def __str__(self) -> str:
        good = "" if self.psnr is None else f"{self.psnr:.2f} dB on {self.images} validation images, "
        return f"linear code: {good}fitted on {self.crops:,} training crops in {self.seconds:.1f} s"


def start_linearly(
    model: LiteVAE, source: Source, seed: int, device: torch.device, teacher: Means | None = None
) -> LinearStart:
    """Fit the linear paths on a source's first training crops, the same in every process, and measure the code.

    See :func:`fit_linear_paths`.
    """
    began = monotonic()
    crops = training_crops(source, seed, model.downscale)
    model.to(device)
    latents = fit_linear_paths(model, crops, teacher)
    values = []
    if model.decoder.linear is not None:
        samples = source.once(LoaderProcess())
        for image in islice((s.image for s in samples if s.image is not None), MEASURED_IMAGES):
            with torch.no_grad():
                y = model.decoder.linear_path(latents(from_uint8(image[None].to(device))))
            values.append(float(psnr(image[None], to_uint8(y).cpu())))
    mean = sum(values) / len(values) if values else None
    return LinearStart(len(crops), mean, len(values), monotonic() - began)


def training_crops(source: Source, seed: int, factor: int) -> Tensor:
    """The first training crops of a seed, read once: uint8 (N, C, H, W).

    N is such that they have :data:`POSITIONS` latent positions, within :data:`CROPS` and :data:`CROP_BYTES`.
    """
    least, most = CROPS
    count = min(most, max(least, POSITIONS // (source.size // factor) ** 2))
    count = min(count, max(1, CROP_BYTES // (source.channels * source.size**2)))
    return torch.stack(list(source.first_images(seed, count)))


@torch.no_grad()
def fit_linear_paths(model: LiteVAE, crops: Tensor, teacher: Means | None = None) -> Means:
    """Set the encoder's path to whitened principal components, the decoder's to least squares from 3x3 latents.

    Args:
        model: of fresh weights, so that an encoder with a linear path is nothing else.
        crops: uint8 (N, C, H, W).
        teacher: its posterior's means; the encoder's path becomes least squares to them, the decoder's from them.

    Returns:
        The latents that the decoder's path was fitted to.
    """
    device = next(model.parameters()).device
    f, n, values = model.downscale, model.latent_channels, model.in_channels * model.downscale**2

    def batches() -> Iterator[Tensor]:
        together = max(1, PART * f**2 // crops[0, 0].numel())
        return (from_uint8(part.to(device)) for part in crops.split(together))

    if (path := model.encoder.linear) is not None:
        if teacher is None:
            moments = JointMoments(values, 0)
            for x in batches():
                patches = _vectors(F.pixel_unshuffle(x, f))
                moments.update(patches, patches[:, :0])
            moments.principal_components(n).copy_to(path)
        else:
            moments = JointMoments(path.weight[0].numel(), n)
            for x in batches():
                moments.update(_vectors(_windows(x, path)), _vectors(teacher(x)))
            moments.least_squares().copy_to(path)
    latents: Means = teacher or path or (lambda x: model.encode(x).mean)
    if model.decoder.linear is not None:
        moments = JointMoments(9 * n, values)
        for x in batches():
            around, patches = _windows(latents(x), model.decoder.linear), F.pixel_unshuffle(x, f)
            if min(around.shape[-2:]) > 2:  # else there is nothing but a border
                around, patches = around[..., 1:-1, 1:-1], patches[..., 1:-1, 1:-1]
            moments.update(_vectors(around), _vectors(patches))
        moments.least_squares().copy_to(model.decoder.linear)
    return latents


def _windows(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a linear path sees at each of its positions: (B, C, H, W) -> (B, C k k, h, w)."""
    more = (conv.kernel_size[0] - conv.stride[0]) // 2
    windows = F.unfold(F.pad(x, (more,) * 4, mode="replicate"), conv.kernel_size, stride=conv.stride)
    height, width = (side // conv.stride[0] for side in x.shape[-2:])
    return windows.view(*windows.shape[:2], height, width)


def _vectors(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C)."""
    return x.movedim(1, -1).flatten(0, 2)
