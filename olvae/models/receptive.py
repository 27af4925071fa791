"""What a decoder looks at: which latent positions a window of the image depends on."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from olvae.modules.halves import Decoder, Stage

__all__ = ["Range", "Window", "decode_window", "receptive_field"]

Range = tuple[int, int]
"""From, and up to but without: rows or columns."""

Window = tuple[Range, Range]
"""Rows and columns."""


def receptive_field(decoder: Decoder) -> int | None:
    """How many latent positions beyond its own, on each side, an output pixel depends on at most.

    Computed from the decoder's stages, and tight: the outermost position counts [D].

    Returns:
        Positions; None for a decoder without a finite field, such as Stable Diffusion's, whose GroupNorm and
        attention see the whole latent.
    """
    stages = decoder.stages()
    if stages is None:
        return None
    f = decoder.upscale
    far = 2**20  # a position away from any border
    (low, high), *_ = _needed(stages, (far * f, (far + 1) * f), 2 * far)
    return max(far - low, high - 1 - far)


def decode_window(stages: Sequence[Stage], z: Tensor, window: Window) -> Tensor:
    """A window of the image, from what it depends on and nothing else.

    Between two stages, everything that the rest does not need is cut off. At the image's own borders nothing is
    cut, and the zero padding there is that of the whole image: so the result is the window of the whole result.

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
    """Along one axis: what is needed before each stage, and last what is wanted; ``size`` is the latent's."""
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
