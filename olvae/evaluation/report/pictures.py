"""Pictures inside of a page."""

import base64
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from olvae.figures import viewable

__all__ = ["Inline", "inline", "side_limit"]


EXACT = 128
"""Pictures up to this side are kept to the pixel."""

PIXELS = 15e6
"""What all photographs of a page may have together: about 3 MB."""

SIDES = (96, 256)


class Inline(NamedTuple):
    """A picture as a data URI, its size, and whether its pixels are to be seen as such, at a whole multiple."""

    uri: str
    width: int
    height: int
    exact: bool


def side_limit(pictures: int) -> int:
    """The longest side at which so many photographs keep a page within a few MB."""
    smallest, largest = SIDES
    return max(smallest, min(largest, math.isqrt(int(PIXELS / max(pictures, 1)))))


def inline(image: Tensor, limit: int | None = None) -> Inline:
    """A picture of a page.

    Up to 128 pixels it is lossless. Where there is a limit it will be shown at some other size: a small picture is
    enlarged pixel by pixel to at least 256, so that scaling it makes no grid of its own; one above the limit is made
    smaller, and lossy.

    Args:
        image: uint8 (C, H, W).
        limit: of the longest side, in pixels.
    """
    array = viewable(image[None])[0].permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(np.ascontiguousarray(array))
    longest = max(picture.size)
    exact = longest <= EXACT
    if limit is not None and longest > limit and not exact:
        size = (max(1, round(side * limit / longest)) for side in picture.size)
        picture = picture.resize((next(size), next(size)), Image.Resampling.LANCZOS)
    elif limit is not None and exact:
        factor = -(-SIDES[1] // longest)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    if exact:
        picture.save(buffer, "WEBP", lossless=True, quality=50, method=2)  # both are effort: 14 ms instead of 130
    else:
        picture.save(buffer, "WEBP", quality=82)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Inline(uri, picture.width, picture.height, exact and limit is None)
