"""Sources of numbered pictures (files, arrays, data sets), and the sample photographs."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import overload

import numpy as np

from olvae.data.image import (
    ALL_FILTERS,
    Augment,
    EvalTransform,
    Photo,
    Picture,
    RandomScaleCrop,
    image_to_tensor,
    read_picture,
    resize_shorter_side,
)
from olvae.data.order.groups import FILE, Grouping, shared_groups
from olvae.data.order.permutation import draws
from olvae.data.pixels.size_and_range import RangeNode, Sides, Size
from olvae.data.read_errors import ReadError, UnreadableImageError, read_or_replace
from olvae.data.source import (
    BOUND,
    MIN_VAL_IMAGES,
    LoaderProcess,
    Sample,
    Source,
    eval_sample,
)
from olvae.files import counted, warn_once

VAL_FRACTION = 0.05  # default share of the images that is held out for validation
MAX_VAL_IMAGES = 10_000  # held out by default: 5 % of more would take long, and tell no more
ONE_GROUP = (
    "all images are of one group by `hold_out_by`, which can't be split into training and "
    "validation: name images for validation (data.params.val_root; val_dataset or val_split of "
    "data sets), or another `hold_out_by`"
)


class ImageDataset(ABC):
    """Numbered pictures, read on access."""

    @abstractmethod
    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A unique name for each picture, without leading slash; by default its number."""
        return f"{index:08d}"

    def file(self, index: int) -> str:
        """The file that a picture is a part of, by its name: a volume's, a scene's."""
        return self.key(index)

    def name(self, index: int) -> str:
        """A file's name where one is known, in which a pattern of `hold_out_by` finds a group."""
        return self.file(index)

    def group(self, index: int, grouping: Grouping) -> str:
        """Name a picture's group. Raises ValueError: the grouping does not find it."""
        return self.file(index) if grouping.how == FILE else grouping.of(self.name(index))

    @property
    def whole_files(self) -> bool:
        """Whether each picture is a file of its own."""
        return type(self).file is ImageDataset.file

    def eval_transform(self) -> EvalTransform | None:
        """What cuts each picture, where all have a size of their own, as a scene's tiles."""
        return None

    def state(self, index: int) -> str:
        """A picture's key, and a file's size and time: a repeated command sees changes by it."""
        return self.key(index)

    def identity(self, index: int) -> str:
        """A picture's key, and a file's size: the same for a copy of the data."""
        return self.key(index)

    def files(self, index: int) -> Mapping[str, bytes]:  # noqa: ARG002
        """Files that `olvae encode` keeps beside a picture's latent, by extension."""
        return {}

    @abstractmethod
    def __getitem__(self, index: int) -> Photo:
        """Raises UnreadableImageError if the picture can't be read."""


@dataclass
class Subset(ImageDataset):
    """Pictures of a data set, by their numbers in it."""

    images: ImageDataset
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.images.key(self.indices[index])

    def file(self, index: int) -> str:
        return self.images.file(self.indices[index])

    def name(self, index: int) -> str:
        return self.images.name(self.indices[index])

    @property
    def whole_files(self) -> bool:
        return self.images.whole_files

    def state(self, index: int) -> str:
        return self.images.state(self.indices[index])

    def identity(self, index: int) -> str:
        return self.images.identity(self.indices[index])

    def files(self, index: int) -> Mapping[str, bytes]:
        return self.images.files(self.indices[index])

    def __getitem__(self, index: int) -> Photo:
        return self.images[self.indices[index]]


class AllBut(Sequence[int]):
    """The numbers below ``count`` but for some, ascending, in the memory of those left out."""

    def __init__(self, count: int, left_out: Sequence[int]) -> None:
        self._all = count
        # How many kept numbers lie below each one that is left out.
        self._kept_before = np.array(left_out) - np.arange(len(left_out))

    def __len__(self) -> int:
        return self._all - len(self._kept_before)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = range(len(self))[index]
        return place + int(np.searchsorted(self._kept_before, place, side="right"))


@dataclass
class InMemory(ImageDataset):
    """Pictures in memory, by name."""

    pictures: Sequence[tuple[str, Picture]]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, index: int) -> str:
        return self.pictures[index][0]

    def __getitem__(self, index: int) -> Photo:
        name, picture = self.pictures[index]
        return Photo(picture, name, self.channels)


def bound_held_out(share: float, images: int, fraction: float | None) -> int:
    """Clamp the validation size to [1, images - 1].

    By default it is at least 20, or a fifth, and at most :data:`MAX_VAL_IMAGES`.
    """
    if fraction is not None and not 0.0 < fraction < 1.0:
        raise ValueError(f"val_fraction must be between 0 and 1, got {fraction}")
    if fraction is not None:
        return min(images - 1, max(round(share), 1))
    least = max(1, min(MIN_VAL_IMAGES, images // 5))
    return min(images - 1, MAX_VAL_IMAGES, max(round(share), least))


def evenly_spread(count: int, fraction: float | None) -> list[int]:
    """Numbers below ``count`` that are held out: as :func:`bound_held_out` says, free of a seed."""
    held_out = bound_held_out(count * (fraction or VAL_FRACTION), count, fraction)
    return sorted({int(number) for number in np.linspace(0, count - 1, held_out)})


def usual_groups(
    sizes: Sequence[int], images: int, fraction: float | None
) -> tuple[int, list[int]]:
    """Return how many images are wanted for validation, and the groups that may be held out.

    Groups are numbered as their sizes are. One that is larger than most and than what is wanted
    would leave too little to train on.
    """
    wanted = bound_held_out(images * (fraction or VAL_FRACTION), images, fraction)
    most = max(wanted, np.median(sizes))
    return wanted, [number for number, size in enumerate(sizes) if size <= most]


def groups_of(images: ImageDataset, grouping: Grouping) -> list[list[int]] | None:
    """The numbers of each group's pictures, by first sight; None if each is its own group."""
    if grouping.how == FILE and images.whole_files:
        return None
    groups = defaultdict(list)
    for index in range(len(images)):
        groups[images.group(index, grouping)].append(index)
    return None if len(groups) == len(images) else list(groups.values())


def hold_out(
    images: ImageDataset, fraction: float | None = None, grouping: Grouping | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """Split into training images and, evenly spread, about ``fraction`` for validation.

    By default 5 % (:data:`VAL_FRACTION`), at least 20 images or, of fewer than 100, a fifth, and at
    most 10,000 (:data:`MAX_VAL_IMAGES`). Whole groups are held out, until they have so many images.
    """
    count = len(images)
    if count < 2:
        raise ValueError(f"{counted(count, 'image')} can't be split into training and validation")

    groups = groups_of(images, grouping or Grouping())
    if groups is None:
        held_out = evenly_spread(count, fraction)
    else:
        # As many groups as have the images on average, and more while they are too few.
        sizes = np.array([len(group) for group in groups])
        wanted, numbers = usual_groups(sizes.tolist(), count, fraction)
        if len(groups) < 2:
            raise ValueError(ONE_GROUP)
        usual = np.array(numbers)
        for taken in range(max(1, wanted * len(groups) // count), len(groups)):
            chosen = usual[np.linspace(0, len(usual) - 1, min(taken, len(usual))).astype(int)]
            if sizes[chosen].sum() >= wanted:
                break
        held_out = sorted(index for group in chosen for index in groups[group])
    return Subset(images, AllBut(count, held_out)), Subset(images, held_out)


class MappedSource(Source):
    """Images by number. The order of training depends on the seed alone, not on workers and ranks.

    Args:
        train, val: the pictures.
        transform: for training pictures; all images get its size.
        batch_size, num_workers, channels, max_unreadable, range: see
            :class:`~olvae.data.source.Source`.
        samples_per_image: number of times that a training picture counts in an epoch.
        hold_out_by: which images are never parted; see
            :class:`~olvae.data.order.groups.Grouping`. An evaluation's intervals go by it.

    Raises ValueError: a batch is larger than the training images of an epoch.
    """

    shares_evenly = True
    _listed = False  # whether an epoch of any size is listed in its order

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
        range: RangeNode | None = None,  # noqa: A002
        hold_out_by: str = FILE,
    ) -> None:
        super().__init__(transform.size, batch_size, num_workers, channels, max_unreadable, range)
        if samples_per_image < 1:
            raise ValueError(f"samples_per_image must be at least 1, got {samples_per_image}")
        self.train = train
        self.val = val
        self.grouping = Grouping(hold_out_by)
        self.transform = transform
        self.eval_transform = transform.evaluation
        self.samples_per_image = samples_per_image
        self.check_batch()

    def note_bound(self, held_out: int, fraction: float | None) -> None:
        """Say in the description that the usual share was bounded, if it was."""
        if fraction is None and held_out >= MAX_VAL_IMAGES:
            self.bound = BOUND

    def shared_groups(self) -> str | None:
        """Say which groups are on both sides; None if none is, or files are their own groups."""
        if self.grouping.how == FILE:
            return None
        sides = []
        for images in (self.train, self.val):
            sides.append({images.group(index, self.grouping) for index in range(len(images))})
        return shared_groups(*sides)

    def warn_of_shared_groups(self) -> None:
        """Warn of groups on both sides, where these are two places."""
        shared = self.shared_groups()
        if shared is not None:
            warn_once(shared)

    @property
    def samples_per_epoch(self) -> int:
        return len(self.train) * self.samples_per_image

    @property
    def val_images(self) -> int:
        return len(self.val)

    @property
    def test_set(self) -> ImageDataset:
        return self.val

    def val_identities(self) -> Iterator[str]:
        return (self.val.identity(index) for index in range(len(self.val)))

    def describe(self) -> str:
        held_out = f"{len(self.val)} validation and test images{self.bound}"
        return f"{len(self.train)} training, {held_out}"

    def limit(self, images: int) -> None:
        if images > len(self.val):
            raise ValueError(
                f"the set has {counted(len(self.val), 'image')}, fewer than the {images} asked for"
            )
        self.val = Subset(self.val, range(images))

    def stream(self, seed: int, position: int, process: LoaderProcess) -> Iterator[Sample]:
        positions = process.positions(position)
        for place, number in draws(seed, self.samples_per_epoch, positions, self._listed):
            yield self._train_sample(number % len(self.train), (seed, place))

    @property
    def order(self) -> str:
        return "listed" if self._listed else "computed"

    def keep_order(self, order: str | None) -> None:
        self._listed = order != "computed"

    def _train_sample(self, index: int, seed: tuple[int, int]) -> Sample:
        """Read an image or, if it is broken, another one, drawn and cropped with the same seed."""

        def read(index: int, _: list[ReadError]) -> Sample:
            image = self.transform(self.train[index], np.random.default_rng(seed))
            return Sample(image_to_tensor(image), self.train.key(index))

        sample, errors = read_or_replace(index, range(len(self.train)), seed, read)
        return sample._replace(errors=errors)

    def once(self, process: LoaderProcess) -> Iterator[Sample]:
        for index in takewhile(lambda i: i < len(self.val), process.positions()):
            key = self.val.key(index)
            try:
                sample = eval_sample(self.val[index], key, self.eval_transform)
            except UnreadableImageError as error:
                yield Sample(None, key, (error.read_error(),))
            else:
                if self.grouping.how != FILE or not self.val.whole_files:
                    sample = sample._replace(group=self.val.group(index, self.grouping))
                yield sample


_UNSEEN = [
    "camera",
    "chelsea",
    "coffee",
    "colosseum",
    "flower",
    "gateway-of-india",
    "picos-de-europa",
    "safe-landing",
]
_ALL = sorted((Path(__file__).parent / "photographs").glob("*.jpg"))

PHOTOGRAPHS = tuple(path for path in _ALL if path.stem not in _UNSEEN)
"""For training: JPEG files of this package; LICENCES.txt beside them has authors and licences."""

HELD_OUT = tuple(path for path in _ALL if path.stem in _UNSEEN)
"""For validation and test; never trained on."""


def sample_photographs(
    paths: Sequence[Path] = (*PHOTOGRAPHS, *HELD_OUT), channels: int = 3
) -> ImageDataset:
    """The photographs, whole; by default all sixty."""
    return InMemory([(path.name, read_picture(path)) for path in paths], channels)


class SamplePhotographs(MappedSource):
    """52 photographs to train on and 8 held out, which come with this package.

    Their shorter sides have 300 to 317 pixels. Validation and test are tiles of the held-out
    photographs: each is shrunk (bicubic) to a shorter side of 2 ``size`` and cut into tiles of
    ``size`` pixels without overlap: 42 for a ``size`` up to 150 pixels. Larger tiles are cut from
    the photographs as they are: from 229 pixels on 8, the centre of each. Above 300 pixels they
    are enlarged.

    Args:
        size, batch_size, num_workers: see :class:`~olvae.data.source.Source`.
        crops_per_photograph: crops of each photograph in an epoch.
        min_fraction, filters, flip, shuffle_channels, augment: see
            :class:`~olvae.data.image.RandomScaleCrop`.
    """

    in_memory = True

    def __init__(
        self,
        size: Size = 64,
        batch_size: int = 16,
        num_workers: int = 0,
        crops_per_photograph: int = 16,
        min_fraction: float = 0.15,
        filters: Sequence[str] = ALL_FILTERS,
        flip: bool = True,
        shuffle_channels: float = 0.5,
        augment: Augment | None = None,
    ) -> None:
        transform = RandomScaleCrop(size, min_fraction, filters, flip, shuffle_channels, augment)
        train = sample_photographs(PHOTOGRAPHS)
        tiles: list[tuple[str, Picture]] = []  # by name
        sides = Sides.of(size)
        for path in HELD_OUT:
            # Shrink the photograph; the tiles of a small one are as large as it allows.
            image = read_picture(path)
            if image.height > 2 * sides.height and image.width > 2 * sides.width:
                image = resize_shorter_side(image, [2 * side for side in sides])
            share = min(1.0, image.height / sides.height, image.width / sides.width)
            high = max(1, round(share * sides.height))
            wide = max(1, round(share * sides.width))

            # Cut the tiles, row by row; the margins on both sides are equal.
            for row in range(image.height // high):
                for column in range(image.width // wide):
                    left = image.width % wide // 2 + column * wide
                    top = image.height % high // 2 + row * high
                    tile = image.crop((left, top, left + wide, top + high))
                    tiles.append((f"{path.name}/{row}-{column}", tile))
        val = InMemory(tiles)
        super().__init__(
            train, val, transform, batch_size, num_workers, samples_per_image=crops_per_photograph
        )
        self.crops = (
            "the held-out sample photographs: bicubic resize of the shorter side to at most two "
            "tiles, all whole tiles"
        )

    def describe(self) -> str:
        tiles = f"{len(self.val)} tiles of {len(HELD_OUT)} held-out ones"
        return f"crops of {len(self.train)} photographs, {tiles}"
