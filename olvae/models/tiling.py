"""Decoding in tiles: the whole result, within a stated memory."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from olvae.models.autoencoder import LiteVAE
from olvae.models.memory import GIB, peak_bytes
from olvae.models.receptive import Range, decode_window
from olvae.modules.halves import Decoder, Stage

__all__ = ["decode_tiled", "split", "tile_bytes", "tile_for"]


@torch.no_grad()
def decode_tiled(
    model: LiteVAE,
    z: Tensor,
    tile: int | None = None,
    memory: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """``model.decode(z)``, tile by tile: equal to rounding, because each tile sees all that it depends on.

    A decoder without a finite receptive field (see :func:`receptive_field`) is never tiled: with ``memory``
    it decodes whole if that fits.

    Args:
        model: in evaluation mode; folded, it is faster.
        z: (B, n_z, h, w).
        tile: side of a tile, in latent positions.
        memory: bytes that a tile may take beside z, the image and the parameters; the largest tile that does
            is taken. Give one of the two.
        progress: called after every tile with the fraction that is done.

    Returns:
        (B, C, f h, f w) on z's device, without gradients.

    Raises:
        ValueError: the decoder can't be tiled, no tile is small enough, or neither or both of tile and memory.
    """
    if (tile is None) == (memory is None):
        raise ValueError("give decode_tiled a tile or a memory, and not both")
    decoder = model.decoder
    stages = decoder.stages()
    if stages is None:
        _whole_or_refuse(decoder, z, tile, memory)
        image = model.decode(z)
        if progress is not None:
            progress(1.0)
        return image
    if memory is not None:
        tile = tile_for(decoder, memory, tuple(z.shape))
    assert tile is not None
    if tile < 1:
        raise ValueError(f"a tile has at least one latent position, got {tile}")
    if model.quantizer is not None:
        z = model.quantizer.post_quant_conv(z)  # 1x1: sees nothing but its position
    return _decode(decoder, stages, z, tile, progress)


def _whole_or_refuse(decoder: Decoder, z: Tensor, tile: int | None, memory: int | None) -> None:
    name = type(decoder).__name__
    if tile is not None:
        raise ValueError(f"{name} sees the whole latent at every position: tiles would change its result; leave --tile")
    assert memory is not None
    needs = peak_bytes(decoder, lambda d, x: d(x), (z.shape[0], decoder.z_channels, *z.shape[-2:]))
    if needs > memory:
        raise ValueError(
            f"{name} sees the whole latent at every position and can't be tiled; decoding "
            f"{z.shape[-1] * decoder.upscale}x{z.shape[-2] * decoder.upscale} pixels whole takes "
            f"{needs / GIB:.3g} GiB, more than {memory / GIB:.3g}: allow more memory, or a smaller image"
        )


def _decode(
    decoder: Decoder, stages: list[Stage], z: Tensor, tile: int, progress: Callable[[float], None] | None
) -> Tensor:
    f = decoder.upscale
    height, width = z.shape[-2:]
    image = torch.empty(z.shape[0], decoder.out_channels, f * height, f * width, dtype=z.dtype, device=z.device)
    windows = [(rows, columns) for rows in split(height, tile, f) for columns in split(width, tile, f)]
    for done, (rows, columns) in enumerate(windows, start=1):
        image[..., slice(*rows), slice(*columns)] = decode_window(stages, z, (rows, columns))
        if progress is not None:
            progress(done / len(windows))
    return image


def split(size: int, tile: int, f: int) -> list[Range]:
    """As few pieces of at most ``tile`` positions as will do, of about one size; in pixels."""
    pieces = -(-size // tile)
    edges = [f * (size * i // pieces) for i in range(pieces + 1)]
    return list(pairwise(edges))


def tile_bytes(decoder: Decoder, tile: int, shape: tuple[int, ...]) -> int:
    """What the costliest tile of a latent of shape (B, z_channels, h, w) takes; see :func:`peak_bytes`."""
    f = decoder.upscale

    def one(size: int) -> tuple[int, int]:
        start = (size - min(tile, size)) // 2  # in the middle, where both sides need their surroundings
        return f * start, f * (start + min(tile, size))

    def run(module: Decoder, z: Tensor) -> Tensor:
        stages = module.stages()
        assert stages is not None
        return decode_window(stages, z, (one(shape[-2]), one(shape[-1])))

    return peak_bytes(decoder, run, (shape[0], decoder.z_channels, *shape[-2:]))


def tile_for(decoder: Decoder, memory: int, shape: tuple[int, ...]) -> int:
    """The largest tile within ``memory`` bytes for a latent of that shape, or one that covers it.

    Raises:
        ValueError: not even a tile of one position is.
    """
    low, high = 1, max(shape[-2:])
    if (least := tile_bytes(decoder, low, shape)) > memory:
        raise ValueError(
            f"the smallest tile takes {least / GIB:.3g} GiB, more than {memory / GIB:.3g}: allow more memory"
        )
    while low < high:
        middle = (low + high + 1) // 2
        if tile_bytes(decoder, middle, shape) <= memory:
            low = middle
        else:
            high = middle - 1
    return low
