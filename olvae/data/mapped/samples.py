"""Real photographs to train and test on without a download: thirteen from scikit-image, two in this package."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from olvae.data.image import Photo, Picture, read_picture
from olvae.data.mapped.base import ImageDataset, MappedSource
from olvae.data.transforms import RandomScaleCrop, resize_shorter_side

__all__ = ["HELD_OUT", "PHOTOGRAPHS", "Photograph", "SamplePhotographs", "sample_photographs"]


class Photograph(NamedTuple):
    """A file inside an installed package, and its licence."""

    package: str
    file: str
    licence: str

    @property
    def path(self) -> Path:
        try:
            return Path(str(importlib.resources.files(self.package))) / self.file
        except ModuleNotFoundError as error:
            raise FileNotFoundError("the sample photographs need scikit-image: pip install scikit-image") from error


PHOTOGRAPHS = (
    Photograph("skimage", "data/astronaut.png", "public domain (NASA)"),
    Photograph("skimage", "data/brick.png", "CC0 (cc0textures.com)"),
    Photograph("skimage", "data/coins.png", "no known copyright restrictions (Brooklyn Museum)"),
    Photograph("skimage", "data/grass.png", "CC0 (linolafett)"),
    Photograph("skimage", "data/gravel.png", "CC0 (cc0textures.com)"),
    Photograph("skimage", "data/hubble_deep_field.jpg", "public domain (NASA)"),
    Photograph("skimage", "data/ihc.png", "no known copyright restrictions (CMMI)"),
    Photograph(
        "skimage",
        "data/motorcycle_left.png",
        "no licence stated (Middlebury 2014 stereo benchmark, Scharstein et al.)",
    ),
    Photograph("skimage", "data/retina.jpg", "CC0 (M. Häggström)"),
    Photograph("skimage", "data/rocket.jpg", "public domain (SpaceX)"),
    Photograph("olvae", "data/mapped/photographs/china.jpg", "CC BY 2.0 (danielbuechele)"),
)
"""For training."""

HELD_OUT = (
    Photograph("skimage", "data/camera.png", "CC0 (L. Varshney)"),
    Photograph("skimage", "data/chelsea.png", "CC0 (S. van der Walt)"),
    Photograph("skimage", "data/coffee.png", "CC0 (R. Michetti)"),
    Photograph("olvae", "data/mapped/photographs/flower.jpg", "CC BY 2.0 (vultilion)"),
)
"""For validation and test; never trained on."""


class _Pictures(ImageDataset):
    """Pictures in memory, by name."""

    def __init__(self, pictures: Sequence[tuple[str, Picture]], channels: int = 3) -> None:
        self.pictures = pictures
        self.channels = channels

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, index: int) -> str:
        return self.pictures[index][0]

    def __getitem__(self, index: int) -> Photo:
        name, picture = self.pictures[index]
        return Photo(picture, name, self.channels)


def sample_photographs(
    photographs: Sequence[Photograph] = (*PHOTOGRAPHS, *HELD_OUT), channels: int = 3
) -> ImageDataset:
    """The photographs, whole; by default all fifteen."""
    pictures = [(Path(photograph.file).name, read_picture(photograph.path)) for photograph in photographs]
    return _Pictures(pictures, channels)


def _tiles(photographs: Sequence[Photograph], size: int) -> ImageDataset:
    """The photographs, shrunk to a shorter side of two tiles, cut into tiles without overlap."""
    tiles: list[tuple[str, Picture]] = []
    for photograph in photographs:
        image = resize_shorter_side(read_picture(photograph.path), 2 * size)
        for top in range(0, image.height - size + 1, size):
            for left in range(0, image.width - size + 1, size):
                name = f"{Path(photograph.file).name}/{top // size}-{left // size}"
                tiles.append((name, image.crop((left, top, left + size, top + size))))
    return _Pictures(tiles)


class SamplePhotographs(MappedSource):
    """Eleven photographs to train on and four held out, from packages that are dependencies anyway.

    Validation and test are tiles of the held-out photographs: each is shrunk (bicubic) to a shorter side of
    2 ``size`` and cut into tiles of ``size`` pixels without overlap, 22 tiles in all.

    Args:
        size, batch_size, num_workers: see :class:`~olvae.data.source.Source`.
        crops_per_photograph: crops of each photograph in an epoch.
        min_fraction, filters, flip, shuffle_channels: see :class:`RandomScaleCrop`.
    """

    def __init__(
        self,
        size: int = 64,
        batch_size: int = 16,
        num_workers: int = 0,
        crops_per_photograph: int = 64,
        min_fraction: float = 0.15,
        filters: Sequence[str] = ("box", "bilinear", "bicubic", "lanczos"),
        flip: bool = True,
        shuffle_channels: float = 0.5,
    ) -> None:
        transform = RandomScaleCrop(size, min_fraction, filters, flip, shuffle_channels)
        train, val = sample_photographs(PHOTOGRAPHS), _tiles(HELD_OUT, size)
        super().__init__(train, val, transform, batch_size, num_workers, samples_per_image=crops_per_photograph)
        self.crops = "the held-out sample photographs: bicubic resize of the shorter side to two tiles, all whole tiles"

    def describe(self) -> str:
        return f"crops of {len(self.train)} photographs, {len(self.val)} tiles of {len(HELD_OUT)} held-out ones"
