"""Images of any size: padded to what the networks take, and cropped back."""

import torch
from torch import Tensor

from olvae.models.autoencoder import LiteVAE
from olvae.models.large.streaming import encode_within
from olvae.models.large.tiling import decode_tiled
from olvae.modules.distributions import DiagonalGaussian

__all__ = ["Size", "crop_to", "decode_any", "encode_any", "pad_to_multiple"]


Size = tuple[int, int]
"""Height and width in pixels."""


def pad_to_multiple(x: Tensor, f: int) -> Tensor:
    """(..., H, W) -> (..., H', W'), the next multiples of f, of any dtype; :func:`crop_to` is the inverse.

    Rows are added at the bottom and columns at the right, so that latent position (i, j) belongs to the pixels from
    (f i, f j) for any size. They are the image's reflection, or copies of its last row or column along an axis with no
    more pixels than are added [D].

    Raises:
        ValueError: the image has no pixels, or f is not positive.
    """
    if f < 1:
        raise ValueError(f"can't pad to a multiple of {f}")
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"expected images of at least one pixel, got shape {tuple(x.shape)}")
    for axis in (-2, -1):
        last = x.shape[axis] - 1
        if pad := -x.shape[axis] % f:
            places = torch.arange(last + 1 + pad, device=x.device)
            mirrored = last - (places - last).abs() if pad <= last else places.clamp(max=last)
            x = x.index_select(axis % x.ndim, mirrored)
    return x


def crop_to(x: Tensor, size: Size) -> Tensor:
    """The first rows and columns of (..., H', W'), which are the image before padding."""
    height, width = size
    if not (1 <= height <= x.shape[-2] and 1 <= width <= x.shape[-1]):
        raise ValueError(f"can't crop {x.shape[-1]}x{x.shape[-2]} to {width}x{height} pixels")
    return x[..., :height, :width]


def encode_any(model: LiteVAE, x: Tensor, memory: int | None = None) -> tuple[DiagonalGaussian, Size]:
    """Images (B, C, H, W) in [-1, 1] of any size -> the posterior over (B, n_z, ceil(H/f), ceil(W/f)), and (H, W).

    Args:
        memory: a limit in bytes, see :func:`encode_within`; by default none.
    """
    padded = pad_to_multiple(x, model.downscale)
    posterior = model.encode(padded) if memory is None else encode_within(model, padded, memory)
    return posterior, (x.shape[-2], x.shape[-1])


def decode_any(model: LiteVAE, z: Tensor, size: Size, tile: int | None = None, memory: int | None = None) -> Tensor:
    """The latent (B, n_z, h, w) and the size that :func:`encode_any` gave -> (B, C, H, W).

    Args:
        tile, memory: see :func:`decode_tiled`; with neither, the latent is decoded whole.

    Raises:
        ValueError: an image of that size has a latent of another size.
    """
    f = model.downscale
    expected = -(-size[0] // f), -(-size[1] // f)
    if (z.shape[-2], z.shape[-1]) != expected:
        raise ValueError(
            f"an image of {size[1]}x{size[0]} pixels has a latent of {expected[1]}x{expected[0]}, "
            f"got {z.shape[-1]}x{z.shape[-2]}"
        )
    whole = tile is None and memory is None
    return crop_to(model.decode(z) if whole else decode_tiled(model, z, tile, memory), size)
