"""Sources of numbered pictures: files, arrays, data sets."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np

from olvae.data.errors import ReadError, UnreadableImageError, read_or_replace
from olvae.data.image import Photo, image_to_tensor
from olvae.data.sampler import LoaderProcess, draws
from olvae.data.source import FEW, Sample, Source, eval_sample
from olvae.data.transforms import RandomScaleCrop

__all__ = ["USUAL_SHARE", "ImageDataset", "MappedSource", "Subset", "hold_out", "not_few"]

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
