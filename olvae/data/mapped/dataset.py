"""Sources of numbered pictures: files, arrays, data sets."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from olvae.data.image import Photo, Picture, image_to_tensor, read_picture
from olvae.data.read_errors import ReadError, UnreadableImageError, read_or_replace
from olvae.data.source import FEW, LoaderProcess, Sample, Source, draws, eval_sample
from olvae.data.transforms import RandomScaleCrop, resize_shorter_side

USUAL_SHARE = 0.05
"""Of the images, held out for validation."""


class ImageDataset(ABC):
    """Numbered pictures, read on access."""

    @abstractmethod
    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A unique name for each picture, without leading slash; by default its number."""
        return f"{index:08d}"

    @abstractmethod
    def __getitem__(self, index: int) -> Photo:
        """Raises UnreadableImageError where it can't be read."""


class Subset(ImageDataset):
    """Pictures of a data set, by their numbers in it."""

    def __init__(self, images: ImageDataset, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.images.key(self.indices[index])

    def __getitem__(self, index: int) -> Photo:
        return self.images[self.indices[index]]


def not_few(images: int, fraction: float | None) -> int:
    """How many images to hold out at least: one; without a fraction :data:`FEW`, but no more than a fifth of all."""
    return 1 if fraction else max(1, min(FEW, images // 5))


def hold_out(images: ImageDataset, fraction: float | None = None) -> tuple[ImageDataset, ImageDataset]:
    """Images to train with, and about ``fraction`` of all, evenly spread, for validation.

    By default it is :data:`USUAL_SHARE`, and at least :func:`not_few`.
    """
    count = len(images)
    if fraction is not None and not 0.0 < fraction < 1.0:
        raise ValueError(f"val_fraction must be between 0 and 1, got {fraction}")
    if count < 2:
        raise ValueError(f"{count} images can't be split into training and validation")
    share = round(count * (fraction or USUAL_SHARE))
    held_out = {int(i) for i in np.linspace(0, count - 1, max(share, not_few(count, fraction)))}
    rest = [i for i in range(count) if i not in held_out]
    return Subset(images, rest), Subset(images, sorted(held_out))


class MappedSource(Source):
    """Images by number; the order of training is a function of the seed alone, whatever the workers and ranks.

    Args:
        train, val: the pictures.
        transform: from a training picture to a square; its size is that of all images.
        batch_size, num_workers, channels, max_unreadable: see :class:`Source`.
        samples_per_image: how often a training picture counts in an epoch.

    Raises:
        ValueError: a batch is larger than the training images of an epoch.
    """

    shares_evenly = True

    def __init__(
        self,
        train: ImageDataset,
        val: ImageDataset,
        transform: RandomScaleCrop,
        batch_size: int,
        num_workers: int = 0,
        channels: int = 3,
        max_unreadable: float = 0.01,
        samples_per_image: int = 1,
    ) -> None:
        super().__init__(transform.size, batch_size, num_workers, channels, max_unreadable)
        if samples_per_image < 1:
            raise ValueError(f"samples_per_image must be at least 1, got {samples_per_image}")
        self.train, self.val = train, val
        self.transform = transform
        self.samples_per_image = samples_per_image
        self._images = len(train) + len(val)  # whatever part of them is evaluated
        self.check_batch()

    @property
    def samples_per_epoch(self) -> int:
        return len(self.train) * self.samples_per_image

    @property
    def val_images(self) -> int:
        return len(self.val)

    @property
    def images(self) -> int:
        return self._images

    def describe(self) -> str:
        return f"{len(self.train)} training, {len(self.val)} validation and test images"

    def limit(self, images: int) -> None:
        if images > len(self.val):
            raise ValueError(f"the set has {len(self.val)} images, fewer than the {images} asked for")
        self.val = Subset(self.val, range(images))

    def stream(self, seed: int, position: int, process: LoaderProcess) -> Iterator[Sample]:
        for place, number in draws(seed, self.samples_per_epoch, process.positions(position)):
            yield self._train_sample(number % len(self.train), (seed, place))

    def _train_sample(self, index: int, seed: tuple[int, int]) -> Sample:
        """An image or, if it can't be read, another one, drawn with the same seed."""

        def read(index: int, _: list[ReadError]) -> Sample:
            image = self.transform(self.train[index], np.random.default_rng(seed))
            return Sample(image_to_tensor(image), self.train.key(index))

        sample, errors = read_or_replace(index, range(len(self.train)), seed, read)
        return sample._replace(errors=errors)

    def once(self, process: LoaderProcess) -> Iterator[Sample]:
        for index in takewhile(lambda i: i < len(self.val), process.positions()):
            key = self.val.key(index)
            try:
                yield eval_sample(self.val[index], key, self.eval_transform)
            except UnreadableImageError as error:
                yield Sample(None, key, (error.read_error(),))


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
