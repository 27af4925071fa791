"""Decode in tiles, each from exactly the latent positions that it depends on."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from olvae.models.autoencoder import LiteVAE
from olvae.models.large.memory import GIB, peak_bytes
from olvae.modules.base import Decoder, Stage

__all__ = ["Range", "Window", "decode_tiled", "decode_window", "receptive_field", "split", "tile_bytes", "tile_for"]


Range = tuple[int, int]
"""Rows or columns: start and stop, without the stop."""

Window = tuple[Range, Range]
"""Rows and columns."""


def receptive_field(decoder: Decoder) -> int | None:
    """The most latent positions beyond its own, on each side, that an output pixel depends on.

    Computed from the decoder's stages, and tight: the outermost position matters [D].

    Returns:
        Positions; None for a decoder without a finite field, such as Stable Diffusion's, whose GroupNorm and attention
        depend on the whole latent.
    """
    stages = decoder.stages()
    if stages is None:
        return None
    f = decoder.upscale
    far = 2**20  # a position away from any border
    (low, high), *_ = _needed(stages, (far * f, (far + 1) * f), 2 * far)
    return max(far - low, high - 1 - far)


def decode_window(stages: Sequence[Stage], z: Tensor, window: Window) -> Tensor:
    """Decode a window of the image from the latent positions that it depends on.

    Between two stages, whatever the rest does not need is cut off. At the image's borders nothing is cut, and the zero
    padding is that of the whole image: so the result equals the window of the whole image.

    Args:
        stages: those of the decoder.
        z: the whole latent, (B, z_channels, h, w).
        window: rows and columns of the image, in pixels.
    """
    rows = _needed(stages, window[0], z.shape[-2])
    columns = _needed(stages, window[1], z.shape[-1])
    h = _cut(z, rows[0], columns[0])
    for stage, (row, next_row), (column, next_column) in zip(stages, pairwise(rows), pairwise(columns), strict=True):
        top, left = row[0] * stage.scale, column[0] * stage.scale  # where the stage's output starts
        h = stage.run(h)
        h = _cut(h, (next_row[0] - top, next_row[1] - top), (next_column[0] - left, next_column[1] - left))
    return h


def _needed(stages: Sequence[Stage], wanted: Range, size: int) -> list[Range]:
    """Along one axis: the range needed before each stage, and last the wanted one; ``size`` is the latent's."""
    for stage in stages:
        size *= stage.scale
    out = [wanted]
    for stage in reversed(stages):
        size //= stage.scale
        low, high = out[-1][0] - stage.reach, out[-1][1] + stage.reach
        out.append((max(0, low // stage.scale), min(size, -(-high // stage.scale))))
    return out[::-1]


def _cut(x: Tensor, rows: Range, columns: Range) -> Tensor:
    return x[..., rows[0] : rows[1], columns[0] : columns[1]]


@torch.no_grad()
def decode_tiled(
    model: LiteVAE,
    z: Tensor,
    tile: int | None = None,
    memory: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """``model.decode(z)`` tile by tile: equal to rounding, because each tile includes all that it depends on.

    A decoder without a finite receptive field (see :func:`receptive_field`) is never tiled: with ``memory`` it decodes
    the whole latent if that fits.

    Args:
        model: in evaluation mode; faster if folded.
        z: (B, n_z, h, w).
        tile: side of a tile, in latent positions.
        memory: the bytes of a tile beside z, the image and the parameters, for the largest tile that fits. Give tile or
            memory.
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
        _check_whole(decoder, z, memory)
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
        z = model.quantizer.post_quant_conv(z)  # 1x1, no neighbours
    f = decoder.upscale
    height, width = z.shape[-2:]
    image = torch.empty(z.shape[0], decoder.out_channels, f * height, f * width, dtype=z.dtype, device=z.device)
    windows = [(rows, columns) for rows in split(height, tile, f) for columns in split(width, tile, f)]
    for done, (rows, columns) in enumerate(windows, start=1):
        image[..., slice(*rows), slice(*columns)] = decode_window(stages, z, (rows, columns))
        if progress is not None:
            progress(done / len(windows))
    return image


def _check_whole(decoder: Decoder, z: Tensor, memory: int | None) -> None:
    """Raise unless a decoder that can't be tiled may decode the whole latent."""
    name = type(decoder).__name__
    if memory is None:
        raise ValueError(f"{name} sees the whole latent at every position: tiles would change its result; leave --tile")
    needs = peak_bytes(decoder, lambda d, x: d(x), (z.shape[0], decoder.z_channels, *z.shape[-2:]))
    if needs > memory:
        raise ValueError(
            f"{name} sees the whole latent at every position and can't be tiled; decoding "
            f"{z.shape[-1] * decoder.upscale}x{z.shape[-2] * decoder.upscale} pixels whole takes "
            f"{needs / GIB:.3g} GiB, more than {memory / GIB:.3g}: allow more memory, or a smaller image"
        )


def split(size: int, tile: int, f: int) -> list[Range]:
    """The fewest pieces of at most ``tile`` positions, of about equal size; in pixels."""
    pieces = -(-size // tile)
    edges = [f * (size * i // pieces) for i in range(pieces + 1)]
    return list(pairwise(edges))


def tile_bytes(decoder: Decoder, tile: int, shape: tuple[int, ...]) -> int:
    """The bytes of the largest tile of a latent of shape (B, z_channels, h, w); see :func:`peak_bytes`."""
    f = decoder.upscale

    def one(size: int) -> tuple[int, int]:
        start = (size - min(tile, size)) // 2  # in the middle, with surroundings on both sides
        return f * start, f * (start + min(tile, size))

    def run(module: Decoder, z: Tensor) -> Tensor:
        stages = module.stages()
        assert stages is not None
        return decode_window(stages, z, (one(shape[-2]), one(shape[-1])))

    return peak_bytes(decoder, run, (shape[0], decoder.z_channels, *shape[-2:]))


def tile_for(decoder: Decoder, memory: int, shape: tuple[int, ...]) -> int:
    """The largest tile within ``memory`` bytes for a latent of that shape, at most all of it.

    Raises:
        ValueError: even a tile of one position takes more.
    """
    tile = bisect_right(range(1, max(shape[-2:]) + 1), memory, key=lambda tile: tile_bytes(decoder, tile, shape))
    if not tile:
        least = tile_bytes(decoder, 1, shape) / GIB
        raise ValueError(f"the smallest tile takes {least:.3g} GiB, more than {memory / GIB:.3g}: allow more memory")
    return tile
