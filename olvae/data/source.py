"""What every source of images offers: three loaders of the same batches."""

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from olvae.data.errors import ReadError, ReadErrors, UnreadableImages
from olvae.data.transforms import EvalTransform
from olvae.devices import this_process

__all__ = ["Batch", "Loader", "LoaderProcess", "Part", "Sample", "Source"]


Part = Literal["val", "test"]
"""What is seen once, in order."""


class _Named(TypedDict, total=False):
    key: list[str]
    label: Tensor


class Batch(_Named):
    """``image``: uint8 (B, channels, size, size), which becomes [-1, 1] on the device; ``key``: their B names.

    Where the source knows classes, ``label``: int64 (B,).
    """

    image: Tensor


class Sample(NamedTuple):
    """What a loader's process gives: an image, uint8 (C, H, W), or None where there was none to be had; and faults.

    ``label`` is the number of its class, where the source knows it.
    """

    image: Tensor | None
    key: str
    faults: tuple[ReadError, ...] = ()
    label: int | None = None
    enlarged: bool = False
    """Whether the picture was smaller than the image."""


@dataclass(frozen=True)
class LoaderProcess:
    """One of those who share a stream: a loader's process of a rank. ``index`` is below ``count``."""

    index: int = 0
    count: int = 1


class Source(ABC):
    """Training images without end, and validation and test images once each.

    Args:
        size: side of the images in pixels.
        batch_size: images per batch and device.
        num_workers: loader processes; 0 loads in the training process.
        channels: of the images.
        max_unreadable: share of the images that may be unreadable before training stops.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self, size: int, batch_size: int, num_workers: int = 0, channels: int = 3, max_unreadable: float = 0.01
    ) -> None:
        for name, number in (("size", size), ("batch_size", batch_size), ("channels", channels)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if not 0.0 <= max_unreadable <= 1.0:
            raise ValueError(f"max_unreadable must be between 0 and 1, got {max_unreadable}")
        self.size = size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.channels = channels
        self.max_unreadable = max_unreadable
        self.losses = UnreadableImages()
        self.crops: str | None = None
        """How the pictures to test with were cut, if they are parts of others."""
        self.eval_transform = EvalTransform(size)
        """What makes validation and test images of pictures; an evaluation may put another one here."""

    tensor = "image"
    """What batches call the samples' tensors."""

    @property
    @abstractmethod
    def samples_per_epoch(self) -> int | None:
        """Training images in an epoch, over all processes; None if only reading them would tell."""

    @abstractmethod
    def count(self, part: Part) -> int | None:
        """Images of a part, over all processes; None if only reading them would tell."""

    @property
    def images(self) -> int | None:
        """All images, of training and validation."""
        train, val = self.samples_per_epoch, self.count("val")
        return None if train is None or val is None else train + val

    @abstractmethod
    def stream(self, seed: int, position: int, consumer: LoaderProcess) -> Iterator[Sample]:
        """This consumer's training samples without end, from the one at ``position`` of its own on.

        A function of the arguments: started anywhere, it goes on as it would have.
        """

    @abstractmethod
    def once(self, part: Part, consumer: LoaderProcess) -> Iterator[Sample]:
        """This consumer's share of a part, each image once."""

    @property
    def test_images(self) -> str:
        """How the test images are made, for the evaluation's protocol."""
        return self.crops or self.eval_transform.describe()

    def limit(self, images: int) -> None:
        """Test with the first so many images only.

        Raises:
            ValueError: there are fewer, or only reading them would tell which are the first.
        """
        raise ValueError(f"{type(self).__name__} can't be limited to {images} images: give it fewer")

    @abstractmethod
    def describe(self) -> str:
        """One line for the summary of a run."""

    def train_loader(self, seed: int = 0, start: int = 0) -> "Loader":
        """Endless batches: the stream of ``seed`` from sample ``start`` (counted over all ranks) on."""
        return self._train_loader(_Endless(self, seed, start))

    def val_loader(self) -> "Loader":
        """Each validation image once, shared among the ranks."""
        return self._once_loader(_Once(self, "val"), "val", self.batch_size)

    def test_loader(self, batch_size: int | None = None) -> "Loader":
        """Each test image once, shared among the ranks. ``batch_size`` may differ from training's."""
        return self._once_loader(_Once(self, "test"), "test", batch_size or self.batch_size)

    def check_processes(self, world: int) -> None:  # noqa: B027  (most sources can be shared by any number)
        """Raises ValueError where the data can't be shared among the processes of ``world`` ranks."""

    def _train_loader(self, dataset: Any, **options: Any) -> "Loader":
        faults = ReadErrors(self.samples_per_epoch, self.images, self.max_unreadable, "training", self.losses)
        return Loader(dataset, self, faults, self.batch_size, drop_last=True, **options)

    def _once_loader(self, dataset: Any, part: Part, batch_size: int, **options: Any) -> "Loader":
        what = {"val": "validation", "test": "test"}[part]
        faults = ReadErrors(None, self.images, self.max_unreadable, what, self.losses)
        return Loader(dataset, self, faults, batch_size, **options)


class Loader(DataLoader[Any]):
    """Batches of a source; keeps the account of what could not be read.

    ``faults`` is that account; ``enlarged`` counts the validation or test images that were made of smaller pictures.
    """

    def __init__(self, dataset: Any, source: Source, faults: ReadErrors, batch_size: int, **options: Any) -> None:
        workers = source.num_workers
        super().__init__(
            dataset,
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_interrupts_to_the_trainer,
            collate_fn=_collate,
            **options,
        )
        self.faults = faults
        self.enlarged = 0
        self._tensor = source.tensor

    def __iter__(self) -> Any:
        rank, world = this_process()
        if isinstance(self.dataset, _Share):
            self.dataset.rank, self.dataset.world = rank, world
        for image, keys, labels, faults, enlarged in super().__iter__():
            self.faults.take(faults, len(keys), world)
            self.enlarged += enlarged
            if keys:
                batch = {self._tensor: image, "key": keys}
                yield batch if labels is None else {**batch, "label": labels}
        self.faults.end_of_epoch()


class _Share(IterableDataset[Sample]):
    """The part of a source's images that is this rank's and this loader process's."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.rank, self.world = 0, 1  # set by the loader, in whose process the ranks are known


class _Endless(_Share):
    def __init__(self, source: Source, seed: int, start: int) -> None:
        super().__init__(source)
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[Sample]:
        # Batches come from the loader's processes in turn. Those before ``start`` are done: the one whose turn it
        # would be takes the first turn, each from its own position.
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        done = self.start // (self.source.batch_size * self.world)
        role = (worker + done) % workers
        turns = len(range(role, done, workers))
        consumer = LoaderProcess(role * self.world + self.rank, workers * self.world)
        return self.source.stream(self.seed, turns * self.source.batch_size, consumer)


class _Once(_Share):
    def __init__(self, source: Source, part: Part) -> None:
        super().__init__(source)
        self.part = part

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        return self.source.once(self.part, LoaderProcess(worker * self.world + self.rank, workers * self.world))


def _collate(samples: Sequence[Sample]) -> tuple[Tensor, list[str], Tensor | None, list[ReadError], int]:
    good = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in good if sample.image is not None]
    labels = [sample.label for sample in good if sample.label is not None]
    return (
        default_collate(images) if images else torch.empty(0),  # in a loader's process into shared memory at once
        [sample.key for sample in good],
        torch.tensor(labels) if good and len(labels) == len(good) else None,
        [fault for sample in samples for fault in sample.faults],
        sum(sample.enlarged for sample in samples),
    )


def _leave_interrupts_to_the_trainer(worker: int) -> None:  # noqa: ARG001  (torch's signature)
    """Ctrl-C, and a scheduler's SIGTERM, reach the workers as well, which must live on until the step is done.

    A second SIGTERM ends a worker, because that is how its loader ends one that does not end by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, lambda *_: os._exit(0)))
