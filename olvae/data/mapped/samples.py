"""Photographs, and a few drawings, to train and test on without a download: sixty files in this package."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from olvae.data.image import Photo, Picture, read_picture
from olvae.data.mapped.base import ImageDataset, MappedSource
from olvae.data.transforms import RandomScaleCrop, resize_shorter_side

__all__ = ["HELD_OUT", "PHOTOGRAPHS", "Photograph", "SamplePhotographs", "sample_photographs"]

_FOLDER = Path(__file__).parent / "photographs"

_HELD_OUT = (
    "camera.jpg",
    "chelsea.jpg",
    "coffee.jpg",
    "colosseum.jpg",
    "flower.jpg",
    "gateway-of-india.jpg",
    "picos-de-europa.jpg",
    "safe-landing.jpg",
)


class Photograph(NamedTuple):
    """A JPEG file of this package, who made it, and its licence; ``LICENCES.txt`` beside it says more."""

    file: str
    author: str
    licence: str

    @property
    def path(self) -> Path:
        return _FOLDER / self.file


def _read_licences() -> list[Photograph]:
    """One for each entry of LICENCES.txt: a file's name, then a line ``Author:``, ``Licence:`` and others."""
    photographs = []
    for entry in (_FOLDER / "LICENCES.txt").read_text(encoding="utf-8").split("\n\n"):
        file, *lines = entry.strip().splitlines()
        if file.endswith(".jpg"):
            fields = dict(line.strip().split(": ", 1) for line in lines)
            photographs.append(Photograph(file, fields["Author"], fields["Licence"]))
    return photographs


_ALL = _read_licences()

PHOTOGRAPHS = tuple(photograph for photograph in _ALL if photograph.file not in _HELD_OUT)
"""For training."""

HELD_OUT = tuple(photograph for photograph in _ALL if photograph.file in _HELD_OUT)
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
    """The photographs, whole; by default all sixty."""
    pictures = [(photograph.file, read_picture(photograph.path)) for photograph in photographs]
    return _Pictures(pictures, channels)


def _tiles(photographs: Sequence[Photograph], size: int) -> ImageDataset:
    """The photographs, shrunk to a shorter side of two tiles, cut into whole tiles without overlap around the centre.

    Nothing is enlarged: a photograph whose shorter side is less than two tiles is cut as it is. If that side is less
    than one tile, it is the tile's side.
    """
    tiles: list[tuple[str, Picture]] = []
    for photograph in photographs:
        image = read_picture(photograph.path)
        if min(image.size) > 2 * size:
            image = resize_shorter_side(image, 2 * size)
        side = min(size, *image.size)
        for row in range(image.height // side):
            for column in range(image.width // side):
                left, top = image.width % side // 2 + column * side, image.height % side // 2 + row * side
                tiles.append((f"{photograph.file}/{row}-{column}", image.crop((left, top, left + side, top + side))))
    return _Pictures(tiles)


class SamplePhotographs(MappedSource):
    """52 photographs to train on and 8 held out, files of this package with a shorter side of 300 to 317 pixels.

    Validation and test are tiles of the held-out photographs: each is shrunk (bicubic) to a shorter side of
    2 ``size`` and cut into tiles of ``size`` pixels without overlap. That gives 42 tiles for a ``size`` up to 150
    pixels. Larger tiles are cut from the photographs as they are, and are fewer: from 229 pixels on 8, the centre of
    each. Above 300 pixels a photograph is smaller than ``size``: its centre is enlarged, which evaluation reports.

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
        crops_per_photograph: int = 16,
        min_fraction: float = 0.15,
        filters: Sequence[str] = ("box", "bilinear", "bicubic", "lanczos"),
        flip: bool = True,
        shuffle_channels: float = 0.5,
    ) -> None:
        transform = RandomScaleCrop(size, min_fraction, filters, flip, shuffle_channels)
        train, val = sample_photographs(PHOTOGRAPHS), _tiles(HELD_OUT, size)
        super().__init__(train, val, transform, batch_size, num_workers, samples_per_image=crops_per_photograph)
        self.crops = (
            "the held-out sample photographs: bicubic resize of the shorter side to at most two tiles, all whole tiles"
        )

    def describe(self) -> str:
        return f"crops of {len(self.train)} photographs, {len(self.val)} tiles of {len(HELD_OUT)} held-out ones"
