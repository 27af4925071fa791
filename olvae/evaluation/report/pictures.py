"""The report's pictures: those inside the page, as data URIs, and the figure beside it."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from olvae.evaluation.artefacts import Artefacts
from olvae.evaluation.gallery import Example, Gallery
from olvae.figures import error_map, labelled_grid, rgb
from olvae.files import atomic_write

__all__ = ["Inline", "PatternTable", "inline", "side_limit", "triple", "write_figure"]


EXACT = 128
"""Pictures up to this side are kept to the pixel."""

LOSSLESS = {"lossless": True, "quality": 50, "method": 2}  # the last two are effort: 14 ms instead of 130

PIXELS = 15e6
"""Of all photographs of a page together: about 3 MB."""

SIDES = (96, 256)

PATCH = 128
"""Screen pixels per side of a patch of a test pattern."""

SHOWN = 8
"""Images of the figure, chosen by the hash of their keys alone."""


class Inline(NamedTuple):
    """A picture as a data URI, its size, and whether its pixels should be shown at a whole multiple."""

    uri: str
    width: int
    height: int
    exact: bool


def side_limit(pictures: int) -> int:
    """The longest side at which this number of photographs keeps the page within a few MB."""
    smallest, largest = SIDES
    return max(smallest, min(largest, math.isqrt(int(PIXELS / max(pictures, 1)))))


def inline(image: Tensor, limit: int | None = None) -> Inline:
    """A picture for the page.

    Up to 128 pixels it is lossless. A limit means that the page scales it: then a small picture is enlarged pixel by
    pixel to at least 256, so that scaling adds no grid of its own; one above the limit is shrunk, and lossy.

    Args:
        image: uint8 (C, H, W).
        limit: of the longest side, in pixels.
    """
    picture = rgb(image)
    longest = max(picture.size)
    exact = longest <= EXACT
    if limit is not None and longest > limit and not exact:
        size = (max(1, round(side * limit / longest)) for side in picture.size)
        picture = picture.resize((next(size), next(size)), Image.Resampling.LANCZOS)
    elif limit is not None and exact:
        factor = -(-SIDES[1] // longest)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    options = LOSSLESS if exact else {"quality": 82}
    picture.save(buffer, "WEBP", **options)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Inline(uri, picture.width, picture.height, exact and limit is None)


def triple(example: Example, limit: int) -> dict[str, Inline]:
    """An image of a gallery: input, reconstruction and absolute error."""
    error = error_map(example.x[None], example.y[None])[0]
    images = {"input": example.x, "reconstruction": example.y, "error": error}
    return {name: inline(image, limit) for name, image in images.items()}


class PatternTable:
    """What became of the test patterns with each target; the patterns have one size and number of channels.

    The top left corner is shown: 64 pixels, or 128 where a target's downscale factor is above 16.
    """

    def __init__(self, artefacts: Mapping[str, Artefacts]) -> None:
        found = list(artefacts.values())
        self.targets = list(artefacts)
        self.colours = list(zip(*(one.colours for one in found), strict=True))
        self.patterns = list(zip(*(one.patterns for one in found), strict=True))
        self.side = min(PATCH // 2 if max(one.period for one in found) <= PATCH // 8 else PATCH, found[0].size)
        self.screen = self.side * max(1, PATCH // self.side)  # a whole multiple: other scaling would add a grid

    def corner(self, image: Tensor) -> Inline:
        return inline(image[:, : self.side, : self.side])


def write_figure(galleries: Mapping[str, Gallery], path: Path) -> None:
    """reconstructions.png: a few inputs, then each target's reconstructions and errors."""
    examples: dict[str, Sequence[Example]] = {name: gallery.spread(SHOWN) for name, gallery in galleries.items()}
    inputs = torch.stack([example.x for example in next(iter(examples.values()))])
    rows = {"input, held out": inputs}
    for target, shown in examples.items():
        images = torch.stack([example.y for example in shown])
        rows[f"{target}: reconstruction"] = images
        rows[f"{target}: error, black 0 to white 64 of 255"] = error_map(inputs, images)
    with atomic_write(path) as partial:
        labelled_grid(rows).save(partial)
