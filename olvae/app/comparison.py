"""Compare autoencoders on one image: reconstruction, error, latent, PSNR, SSIM and time of each."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from olvae.data.image import Photo, image_to_tensor
from olvae.export.reconstruction import ReconstructOptions, reconstruct
from olvae.figures import error_map
from olvae.metrics.pixel import SSIM_WINDOW, psnr, ssim
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import default_memory
from olvae.models.loading.loader import Target

MAX_PIXELS = 4_000_000
"""Limit of an image on the page; one thread reconstructs it in about a minute."""

SHOWN_SIDE = 256
"""Pixels that the longer side of a picture has at least on the page."""


class Result(NamedTuple):
    """One model's reconstruction of one image, and the seconds that encoding and decoding took together."""

    y: Tensor  # uint8 (C, H, W)
    error: Tensor  # uint8 (3, H, W), of olvae.figures.error_map
    latent: Tensor  # what was decoded, (n_z, h, w)
    psnr: float  # in dB, infinite for an equal image
    ssim: float | None  # None if the image is too small for it
    seconds: float


def load(targets: Sequence[Target], device: str) -> dict[str, Autoencoder]:
    """Load models by name, folded for inference; raise ValueError if they take images of different channels."""
    models = {target.name: target.load().fold().to(device).eval() for target in targets}
    if len(channels := {model.in_channels for model in models.values()}) > 1:
        raise ValueError(f"the targets take images of {' and '.join(map(str, sorted(channels)))} channels")
    return models


def read_image(path: str | Path, channels: int) -> Tensor:
    """Read an image as uint8 (C, H, W); raise ValueError if it is none, or has more than :data:`MAX_PIXELS`."""
    photo = Photo(Path(path), Path(path).name, channels)
    width, height = photo.size  # the header's: nothing is decoded yet
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width}x{height} pixels are too many for this page, which takes {MAX_PIXELS / 1e6:.0f} million: "
            "olvae reconstruct takes any size"
        )
    return image_to_tensor(photo.read())


def compare(models: Mapping[str, Autoencoder], x: Tensor, device: str) -> dict[str, Result]:
    """Reconstruct an image, uint8 (C, H, W), with every model; raise ValueError if a reconstruction is not finite."""
    where = torch.device(device)
    options = ReconstructOptions(where, default_memory(where))
    found = {}
    for name, model in models.items():
        start = time.perf_counter()
        try:
            y, z = reconstruct(model, x, options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        seconds = time.perf_counter() - start
        similarity = ssim(x[None], y[None]).item() if min(x.shape[-2:]) >= SSIM_WINDOW else None
        picture = error_map(x[None], y[None])[0]
        found[name] = Result(y, picture, z[0].float().cpu(), psnr(x[None], y[None]).item(), similarity, seconds)
    return found


def latent_pictures(latent: Tensor) -> Tensor:
    """Show the channels of a latent (n_z, h, w) as enlarged grey pictures, uint8 (n_z, 1, H, W).

    Black and white are the smallest and the largest value of each channel, and a constant channel is black.
    """
    low, high = latent.amin((1, 2), keepdim=True), latent.amax((1, 2), keepdim=True)  # (n_z, 1, 1)
    grey = (255.0 * (latent - low) / (high - low).clamp_min(1e-12)).round().to(torch.uint8)
    return enlarged(grey[:, None])


def enlarged(image: Tensor) -> Tensor:
    """Enlarge small pictures, uint8 (..., H, W), pixel by pixel: scaling in a browser would blur them."""
    factor = math.ceil(SHOWN_SIDE / max(image.shape[-2:]))
    return image.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def crop_around(image: Tensor, place: tuple[int, int], side: int) -> Tensor:
    """Crop a square of ``side`` pixels at most, with its centre as near to ``place`` (x, y) as fits the image."""
    height, width = image.shape[-2:]
    left, top = (
        min(max(at - side // 2, 0), max(length - side, 0)) for at, length in zip(place, (width, height), strict=True)
    )
    return image[:, top : top + side, left : left + side]
