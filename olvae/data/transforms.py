"""Crop and resize pictures to a square: random for training, fixed for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from olvae.data.image import Bands, Photo, Picture

FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's filters; all are antialiased when they shrink."""

ALL_FILTERS = ("box", "bilinear", "bicubic", "lanczos")
"""Filters that training draws from by default."""

OVERSAMPLING = 2.0
"""Least ratio of the square to the result for a JPEG that is decoded at a fraction of its size."""


@dataclass(frozen=True)
class RandomScaleCrop:
    """Stochastic image rescaling [R], random crop and flip.

    Cuts a square at a random place, whose side is a random fraction of the picture's shorter side, uniform between
    ``min_fraction`` and 1, and resizes it to ``size`` with a randomly chosen antialiased filter: the same as resizing
    the picture by a random factor and cropping ``size`` pixels of it [D], at a fraction of the cost. The square is at
    least ``size`` wide if the picture is, so that nothing is enlarged.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the square is then still at least twice as wide as the result,
    which changes a pixel by less than 1 of 255 on average (docs/data.md).

    Args:
        size: side of the result in pixels.
        min_fraction: in (0, 1].
        filters: names of :data:`FILTERS` to choose from.
        flip: mirror half of the results.
        shuffle_channels: share of the results whose channels are permuted: more colours, if there are few pictures.
    """

    size: int
    min_fraction: float = 0.5
    filters: Sequence[str] = ALL_FILTERS
    flip: bool = True
    shuffle_channels: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.shuffle_channels <= 1.0:
            raise ValueError(f"shuffle_channels must be between 0 and 1, got {self.shuffle_channels}")
        if not 0.0 < self.min_fraction <= 1.0:
            raise ValueError(f"min_fraction must be above 0 and at most 1, got {self.min_fraction}")
        if not self.filters or not set(self.filters) <= set(FILTERS):
            raise ValueError(f"filters must be some of {', '.join(FILTERS)}, got {list(self.filters)}")

    def __call__(self, photo: Picture | Photo, rng: np.random.Generator) -> Picture:
        width, height = photo.size
        shorter = min(width, height)
        side = rng.uniform(max(self.min_fraction * shorter, min(self.size, shorter)), shorter)
        left = rng.uniform(0.0, width - side)
        top = rng.uniform(0.0, height - side)
        resample = FILTERS[self.filters[int(rng.integers(len(self.filters)))]]
        image = photo.read(self._shrink(side)) if isinstance(photo, Photo) else photo
        shrunk = round(width / image.width)  # 1, 2, 4 or 8; the last column and row may reach beyond the picture
        box = (left / shrunk, top / shrunk, (left + side) / shrunk, (top + side) / shrunk)
        crop: Picture = image.resize((self.size, self.size), resample, box=box)
        if self.flip and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.shuffle_channels and rng.random() < self.shuffle_channels:
            channels = crop.bands if isinstance(crop, Bands) else crop.split()
            crop = Bands([channels[i] for i in rng.permutation(len(channels))])
        return crop

    def _shrink(self, side: float) -> int:
        """Factor by which a decoder may shrink a square of this side."""
        return next((n for n in (8, 4, 2) if side >= n * OVERSAMPLING * self.size), 1)


RESIZES = {  # descriptions for the protocol
    "shorter side": "{filter} antialiased resize of the shorter side (Pillow), centre crop",
    "adm": "halved by averaging while twice too large, {filter} resize of the shorter side (Pillow), centre crop",
    "squash": "{filter} antialiased resize of both sides (Pillow)",
    "none": "not resized, centre crop",
}


@dataclass(frozen=True)
class EvalTransform:
    """Resize and crop a picture to a square of ``size`` pixels for evaluation, without randomness.

    Args:
        resize: ``shorter side``: to ``size``, as in the results table [R]; ``adm``: the same, after halving the
            picture by averaging while its shorter side is at least twice ``size`` (Dhariwal and Nichol 2021);
            ``squash``: both sides; ``none``: only pictures that are smaller. Then the centre is cropped.
        resample: one of :data:`FILTERS`, antialiased.

    Raises ValueError: the resize or filter is unknown.
    """

    size: int
    resize: str = "shorter side"
    resample: str = "bicubic"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES or self.resample not in FILTERS:
            raise ValueError(
                f"resize must be one of {', '.join(RESIZES)} and the filter of {', '.join(FILTERS)}, got "
                f"{self.resize} and {self.resample}"
            )

    def __call__(self, image: Picture) -> Picture:
        size, resample = self.size, FILTERS[self.resample]
        if self.resize == "squash":
            return image.resize((size, size), resample)
        while self.resize == "adm" and min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), FILTERS["box"])
        if self.resize != "none" or min(image.size) < size:
            image = resize_shorter_side(image, size, resample)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def describe(self) -> str:
        """A description for the protocol."""
        return RESIZES[self.resize].format(filter=self.resample)


def resize_shorter_side(image: Picture, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Picture:
    """Resize to a shorter side of ``size`` pixels; by default bicubic and antialiased."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    return image.resize((width, height), resample)
