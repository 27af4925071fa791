"""What every source of images offers: three loaders of the same batches."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from olvae.data.pixels import Picture, image_to_tensor
from olvae.data.stream import Draw, StreamSampler
from olvae.data.transforms import RandomScaleCrop, center_crop

__all__ = ["Batch", "ImageList", "Source"]


class Batch(TypedDict):
    """``image``: uint8 (B, channels, size, size); it becomes [-1, 1] on the device."""

    image: Tensor


class ImageList(ABC):
    """A sequence of pictures that are read when they are asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Picture: ...


class Source:
    """Training crops without end, and validation and test images once each, in order.

    Args:
        train, val, test: the pictures.
        size: side of the images in pixels.
        batch_size: images per batch and device.
        num_workers: loader processes; 0 loads in the training process.
        transform: from a training picture to a square of ``size`` pixels.
        samples_per_image: how often a training picture counts in an epoch.
        channels: of the pictures.

    Raises:
        ValueError: a batch is larger than the training or the validation images.
    """

    def __init__(
        self,
        train: ImageList,
        val: ImageList,
        test: ImageList,
        size: int,
        batch_size: int,
        num_workers: int,
        transform: RandomScaleCrop,
        samples_per_image: int = 1,
        channels: int = 3,
    ) -> None:
        for name, number in (
            ("size", size),
            ("batch_size", batch_size),
            ("samples_per_image", samples_per_image),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        self.size = size
        self.channels = channels
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.transform = transform
        self.samples_per_epoch = len(train) * samples_per_image
        self._train, self._val, self._test = train, val, test
        if batch_size > self.samples_per_epoch:
            raise ValueError(
                f"batch_size {batch_size} is larger than the data, {self.samples_per_epoch} training images: "
                "lower data.params.batch_size or add images"
            )

    def train_loader(self, seed: int = 0, start: int = 0) -> DataLoader[Batch]:
        """Endless batches: the stream of ``seed`` from sample ``start`` (counted over all ranks) on."""
        sampler = StreamSampler(self.samples_per_epoch, seed, start)
        return self._loader(_TrainImages(self._train, self.transform), sampler=sampler, drop_last=True)

    def val_loader(self) -> DataLoader[Batch]:
        """Each validation image once; a rank sees every world-size-th."""
        return self._loader(_share(_EvalImages(self._val, self.size)))

    def test_loader(self, batch_size: int | None = None) -> DataLoader[Batch]:
        """Each test image once; a rank sees every world-size-th. ``batch_size`` may differ from training's."""
        return self._loader(_share(_EvalImages(self._test, self.size)), batch_size=batch_size or self.batch_size)

    @property
    def test_images(self) -> str:
        """How the test images are made, for the evaluation's protocol."""
        return "bicubic antialiased resize of the shorter side, centre crop"

    def describe(self) -> str:
        """One line for the summary of a run."""
        return f"{len(self._train)} training, {len(self._val)} validation, {len(self._test)} test images"

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_interrupts_to_the_trainer,
            **{"batch_size": self.batch_size, **options},
        )


def _leave_interrupts_to_the_trainer(worker: int) -> None:  # noqa: ARG001  (torch's signature)
    """A terminal's Ctrl-C reaches the workers as well, which must live on until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _TrainImages(Dataset[Batch]):
    def __init__(self, images: ImageList, transform: RandomScaleCrop) -> None:
        self.images = images
        self.transform = transform

    def __getitem__(self, draw: Draw) -> Batch:
        image = self.images[draw.image % len(self.images)]
        return {"image": image_to_tensor(self.transform(image, draw.rng()))}


class _EvalImages(Dataset[Batch]):
    def __init__(self, images: ImageList, size: int) -> None:
        self.images = images
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        return {"image": image_to_tensor(center_crop(self.images[index], self.size))}


def _share(dataset: _EvalImages) -> Dataset[Batch]:
    if not dist.is_initialized():
        return dataset
    mine: Sequence[int] = range(dist.get_rank(), len(dataset), dist.get_world_size())
    return Subset(dataset, mine)
