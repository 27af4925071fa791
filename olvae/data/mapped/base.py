"""Sources of pictures that can be asked for by number: files, arrays, data sets."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, Sampler

from olvae.data.errors import ReadError, UnreadableImageError
from olvae.data.image import Photo, Picture, image_to_tensor
from olvae.data.sampler import Draw, StreamSampler
from olvae.data.source import Loader, LoaderProcess, Part, Sample, Source
from olvae.data.transforms import EvalTransform, RandomScaleCrop
from olvae.devices import this_process

__all__ = ["ImageDataset", "MappedSource"]


STAND_INS = 20
"""How many other images are tried in the place of one that can't be read."""


class ImageDataset(ABC):
    """A sequence of pictures that are read when they are asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """A name of its own for each picture, without leading slash."""

    @abstractmethod
    def __getitem__(self, index: int) -> Picture | Photo:
        """Raises UnreadableImageError where it can't be read."""


class MappedSource(Source):
    """Images of lists; the order of training is a function of the seed alone, whatever the workers and ranks.

    Args:
        train, val, test: the pictures.
        transform: from a training picture to a square of ``size`` pixels.
        samples_per_image: how often a training picture counts in an epoch.
        size, batch_size, num_workers, channels, max_unreadable: see :class:`Source`.

    Raises:
        ValueError: a batch is larger than the training images of an epoch.
    """

    def __init__(
        self,
        train: ImageDataset,
        val: ImageDataset,
        test: ImageDataset,
        transform: RandomScaleCrop,
        size: int,
        batch_size: int,
        num_workers: int = 0,
        samples_per_image: int = 1,
        channels: int = 3,
        max_unreadable: float = 0.01,
    ) -> None:
        super().__init__(size, batch_size, num_workers, channels, max_unreadable)
        if samples_per_image < 1:
            raise ValueError(f"samples_per_image must be at least 1, got {samples_per_image}")
        self.train, self.val, self.test = train, val, test
        self.transform = transform
        self.samples_per_image = samples_per_image
        if batch_size > self.samples_per_epoch:
            raise ValueError(
                f"batch_size {batch_size} is larger than the data, {self.samples_per_epoch} training images: "
                "lower data.params.batch_size or add images"
            )

    @property
    def samples_per_epoch(self) -> int:
        return len(self.train) * self.samples_per_image

    @property
    def images(self) -> int:
        return len(self.train) + len(self.val)

    def count(self, part: Part) -> int:
        return len(self._part(part))

    def describe(self) -> str:
        return f"{len(self.train)} training, {len(self.val)} validation, {len(self.test)} test images"

    def stream(self, seed: int, position: int, consumer: LoaderProcess) -> Iterator[Sample]:
        images = _TrainImages(self.train, self.transform)
        draws = StreamSampler(self.samples_per_epoch, seed, position * consumer.count + consumer.index, consumer.count)
        return (images[draw] for draw in draws)

    def limit(self, images: int) -> None:
        if images > len(self.test):
            raise ValueError(f"the set has {len(self.test)} images, fewer than the {images} asked for")
        self.test = _First(self.test, images)

    def once(self, part: Part, consumer: LoaderProcess) -> Iterator[Sample]:
        images = _EvalImages(self._part(part), self.eval_transform)
        return (images[i] for i in range(consumer.index, len(images), consumer.count))

    def train_loader(self, seed: int = 0, start: int = 0) -> Loader:
        sampler = StreamSampler(self.samples_per_epoch, seed, start)
        return self._train_loader(_TrainImages(self.train, self.transform), sampler=sampler)

    def val_loader(self) -> Loader:
        return self._in_order("val", self.batch_size)

    def test_loader(self, batch_size: int | None = None) -> Loader:
        return self._in_order("test", batch_size or self.batch_size)

    def _in_order(self, part: Part, batch_size: int) -> Loader:
        images = _EvalImages(self._part(part), self.eval_transform)
        return self._once_loader(images, part, batch_size, sampler=_Turns(len(images)))

    def _part(self, part: Part) -> ImageDataset:
        return {"val": self.val, "test": self.test}[part]


class _First(ImageDataset):
    """The first so many of a list."""

    def __init__(self, images: ImageDataset, count: int) -> None:
        self.images = images
        self.count = count

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return self.images.key(index)

    def __getitem__(self, index: int) -> Picture | Photo:
        return self.images[index]


class _TrainImages(Dataset[Sample]):
    def __init__(self, images: ImageDataset, transform: RandomScaleCrop) -> None:
        self.images = images
        self.transform = transform

    def __getitem__(self, draw: Draw) -> Sample:
        """The drawn image; where it can't be read, another one, drawn with the same seed."""
        index = draw.image % len(self.images)
        faults: list[ReadError] = []
        for stand_in in range(STAND_INS + 1):
            try:
                image = self.transform(self.images[index], draw.rng())
                return Sample(image_to_tensor(image), self.images.key(index), tuple(faults))
            except UnreadableImageError as error:
                faults.append(ReadError(error.name, error.reason))
            index = int(np.random.default_rng((*draw.seed, 1, stand_in)).integers(len(self.images)))
        raise UnreadableImageError(faults[0].name, f"{faults[0].reason}; nor are {STAND_INS} others drawn in its place")


class _EvalImages(Dataset[Sample]):
    def __init__(self, images: ImageDataset, transform: EvalTransform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        try:
            return eval_sample(self.images[index], self.images.key(index), self.transform)
        except UnreadableImageError as error:
            return Sample(None, self.images.key(index), (ReadError(error.name, error.reason),))


def eval_sample(image: Picture | Photo, key: str, transform: EvalTransform) -> Sample:
    """By the evaluation transform.

    Raises:
        UnreadableImageError: the photograph's file is broken.
    """
    picture = image.read() if isinstance(image, Photo) else image
    return Sample(image_to_tensor(transform(picture)), key, enlarged=min(picture.size) < transform.size)


class _Turns(Sampler[int]):
    """Every world-size-th index: this rank's. The ranks are known only when the loader starts."""

    def __init__(self, length: int) -> None:
        self.length = length

    def _mine(self) -> range:
        rank, world = this_process()
        return range(rank, self.length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine())

    def __len__(self) -> int:
        return -(-self.length // this_process()[1])  # on all ranks: with 0 one would leave out validation
