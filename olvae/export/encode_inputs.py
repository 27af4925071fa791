"""Inputs of an encoding: which images go into which shard of latents, how, and their readers."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from olvae.config import Config, ConfigError
from olvae.config.reading import YAML, is_local
from olvae.data.dataset import ImageDataset, groups_of
from olvae.data.image import MODES, EvalTransform, Photo, image_to_tensor
from olvae.data.opening import holds_masks, open_source, open_training_images
from olvae.data.order.groups import Grouping, fill_with_groups, usual_grouping
from olvae.data.packing import usual_shard_size
from olvae.data.picture_folder import Files
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides, Size
from olvae.data.places import holds_shards, load
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.shards.index import find_shards, share_indexes, with_counts
from olvae.data.shards.latent_files import LATENT_PIXELS, pixel_bytes
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.source import total
from olvae.devices import FULL
from olvae.files import counted, file_state, lines_sha256
from olvae.models.autoencoder import Autoencoder
from olvae.runs import entry_of

# Pixels that a reader process sends at a time, unless one image has more; it reads two such units
# ahead.
UNIT_PIXELS = 2**19

# Images are collected in windows, which are shorter where their pixels exceed this many bytes.
WINDOW_BYTES = 2**28


class Item(NamedTuple):
    """An image to encode: the name of its files in the shard, its key, and what to open.

    ``files`` are kept beside its latent.
    """

    name: str
    key: str
    # Its number in a data set; or, from a shard, its file's content and name.
    image: int | tuple[bytes, str]
    files: Mapping[str, bytes] = {}
    # The name of its group, if it is not its own.
    group: str | None = None


@dataclass(frozen=True)
class DatasetInputs:
    """Images by number: output shard i holds ``shard_size`` of them from i * shard_size on.

    Groups are whole in a shard, if there are some. Files are named by the number.
    """

    images: ImageDataset
    shard_size: int
    # Names of folders; a file ``.cls`` has the number of the image's folder.
    classes: Sequence[str] = ()
    # SRC, for images whose states do not say where they are from, as a data set's.
    source: Sequence[str] = ()
    # The evaluation's resizing, if SRC is a config.
    transform: EvalTransform | None = None
    # Which images are never parted, and the numbers of each shard's, if groups have several.
    grouping: Grouping = Grouping()  # noqa: RUF009  (it does not change)
    grouped: Sequence[Sequence[int]] | None = None

    def __len__(self) -> int:
        if self.grouped is not None:
            return len(self.grouped)
        return -(-len(self.images) // self.shard_size)

    def _numbers(self, shard: int) -> Sequence[int]:
        if self.grouped is not None:
            return self.grouped[shard]
        return range(len(self.images))[shard * self.shard_size : (shard + 1) * self.shard_size]

    def count(self, shards: range) -> int:
        return sum(len(self._numbers(shard)) for shard in shards)

    def read(self, shard: int) -> Iterator[Item]:
        numbers = {name: str(n).encode() for n, name in enumerate(self.classes)}
        for i in self._numbers(shard):
            key = self.images.key(i)
            files = dict(self.images.files(i))
            if numbers:
                files["cls"] = numbers[key.split("/")[0]]
            group = None if self.grouped is None else self.images.group(i, self.grouping)
            yield Item(f"{i:08d}", key, i, files, group)

    def open(self, image: Any) -> Photo:
        """Open an item's image. Raises UnreadableImageError: it can't be read."""
        return self.images[image]

    def plan(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Collect what the shards' bytes depend on, together with the options."""
        states = [self.images.state(i) for i in range(len(self.images))]
        planned = {**options, "shard_size": self.shard_size}
        if self.grouped is not None:
            planned["hold_out_by"] = self.grouping.how
        return {
            "options": planned,
            "images": lines_sha256([*self.source, *states]),
            "classes": list(self.classes),
        }


@dataclass(frozen=True)
class ShardInputs:
    """One output shard for each input shard; files keep their names, and an image's others stay."""

    shards: Sequence[Shard]
    channels: int
    image_key: str | None = None
    pixel_range: PixelRange = EIGHT_BITS
    # The evaluation's resizing, if SRC is a config.
    transform: EvalTransform | None = None
    # None here: the .cls files of the shards are kept.
    classes: ClassVar[Sequence[str]] = ()

    def __len__(self) -> int:
        return len(self.shards)

    def count(self, shards: range) -> int | None:
        """Count the images of output shards; None if that is unknown before reading."""
        return total([self.shards[shard].images for shard in shards])

    def read(self, shard: int) -> Iterator[Item | ReadError]:
        source = self.shards[shard]
        for entry in read_shard(source, self.image_key):
            if not isinstance(entry, ReadError):
                name = entry.key.removeprefix(f"{source.name}/")
                yield Item(name, entry.key, (entry.data, entry.name), entry.files)
            elif is_local(source.url):
                yield entry
            else:
                # The network may have failed, so this need not be the end of the shard.
                raise OSError(
                    f"{entry.name}: {entry.reason}; run the same command again to continue"
                )

    def open(self, image: Any) -> Photo:
        """Open an item's image. Raises UnreadableImageError: it can't be read."""
        content, name = image
        return Photo(content, name, self.channels, self.pixel_range)

    def plan(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Collect what the shards' bytes depend on, together with the options."""
        lines = []
        for shard in self.shards:
            if is_local(shard.url):
                lines.append(f"{Path(shard.url).name}:{shard.images}:{file_state(shard.url)}")
            else:
                lines.append(f"{shard.url}:{shard.images}:")
        if self.image_key:
            lines.append(self.image_key)
        return {"options": dict(options), "images": lines_sha256(lines)}


Inputs = DatasetInputs | ShardInputs


def find_inputs(
    src: str,
    channels: int,
    shard_size: int,
    classes: bool = False,
    pixel_range: PixelRange = EIGHT_BITS,
    size: Size | None = None,
    hold_out_by: str | None = None,
    trained_by: str | None = None,
) -> Inputs:
    """Find the images of SRC: a config's test images, cut for ``size`` if given, else all, whole.

    ``shard_size`` is the number of images in an output shard, 0 for the size that packing takes; an
    SRC of shards ignores it. With ``classes``, the folders of SRC are classes. ``hold_out_by`` says
    which images stay together in a shard: by default what SRC's config says or, for images without
    one, ``trained_by``, what the training's config says. Raise ConfigError if SRC can't be encoded,
    also for a config whose data have another range of values.
    """
    # The images, their resizing if SRC is a config, and what the plan calls SRC.
    images: ImageDataset | ShardInputs
    transform = None
    grouping = Grouping(hold_out_by) if hold_out_by else usual_grouping(trained_by)
    name = src
    if Path(src).suffix in YAML:
        source = open_source(src, size or 1, 1, resized=size is not None)
        name = json.dumps(load([src]).get("data"), sort_keys=True, default=str)
        pixel_range.check_data(source.pixel_range)
        if source.channels != channels:
            raise ConfigError(
                f"{src}: images of {counted(source.channels, 'channel')}, "
                f"and the model takes {channels}"
            )
        transform = source.eval_transform
        if hold_out_by is None:
            grouping = source.grouping
        images = source.test_set
        if isinstance(images, Sequence):
            images = ShardInputs(
                images, source.channels, source.image_key, source.pixel_range, transform
            )
        elif images is None:
            raise ConfigError(
                f"{src}: {type(source).__name__} can't be encoded: name folders or shards, one by "
                "one"
            )
    elif holds_shards(src):
        share_indexes(src)
        images = ShardInputs(with_counts(find_shards(src)), channels, None, pixel_range)
    else:
        images = open_training_images(src, channels, pixel_range, size)
        transform = images.eval_transform()

    # Shards become one output shard each, and keep the classes that are in them.
    if isinstance(images, ShardInputs):
        if classes:
            raise ConfigError(
                "`classes` is for folders: encode those; shards keep their .cls files, if they "
                "have any"
            )
        if hold_out_by is not None:
            raise ConfigError(
                "`hold_out_by`: each of these shards becomes one of latents: `olvae data pack` "
                "takes it"
            )
        return images

    # Other images are divided into shards by number. Only the state of a file says which it is; a
    # class is a first folder.
    named = () if isinstance(images, Files) else (name,)
    shard_size = shard_size or usual_shard_size(len(images))
    folders: list[str] = []
    if classes:
        keys = [images.key(i) for i in range(len(images))]
        loose = [key for key in keys if "/" not in key]
        if loose:
            raise ConfigError(f"`classes`: {loose[0]} is not in a folder that could be its class")
        folders = sorted({key.split("/")[0] for key in keys})
    groups = groups_of(images, grouping)
    grouped = None if groups is None else fill_with_groups(groups, shard_size)
    return DatasetInputs(images, shard_size, folders, named, transform, grouping, grouped)


def usual_transform(inputs: Inputs, config: Config, model: Autoencoder) -> EvalTransform:
    """Choose the resizing as evaluation does: SRC's own if it is a config, else by training's size.

    Masks are resized by nearest, also where only ``config``, the training's, says that they are.
    """
    trained = entry_of(config, "data.params") or {}
    usual = inputs.transform or EvalTransform(trained.get("size") or model.image_size)
    if holds_masks(trained):
        return replace(usual, resample="nearest")
    return usual


@dataclass(frozen=True)
class EncodeOptions:
    """Settings of encoding."""

    # In pixels after resizing and cropping the centre; 0 keeps images' sizes, padded to multiples
    # of f.
    size: Size
    # Store the posterior's mean and standard deviation, else one sample, with noise by the seed.
    moments: bool = True
    seed: int = 0
    # Of the latents, a name of olvae.devices.DTYPES.
    dtype: str = "float16"
    # Store the mirrored image's latent as well.
    flip: bool = False
    # Store the pixels that are encoded as well, as PNG.
    images: bool = False
    # That the encoder computes in, a name of olvae.devices.PRECISIONS.
    precision: str = FULL
    # The filter of resizing, a name of olvae.data.image.FILTERS.
    resample: str = "bicubic"

    def check(self, model: Autoencoder) -> None:
        """Raise ValueError unless images of a model can be stored like this."""
        if self.size:
            sides = Sides.of(self.size)
            factor = model.downscale
            if not sides.fits(factor):
                raise ValueError(
                    f"`size` {sides.short}: choose a multiple of {factor}, the model's downscaling "
                    "factor"
                )
        if self.images and not self.size:
            raise ValueError(
                "`images`: images that are stored beside latents have one size: give `size`"
            )
        if self.images and model.in_channels not in MODES:
            raise ValueError(
                f"`images`: PNG stores 1, 3 or 4 channels, but the images have {model.in_channels}"
            )
        if self.images and not model.pixel_range.eight_bits:
            raise ValueError(
                f"`images`: they are stored with 8 bits, but have values of {model.pixel_range}"
            )


# Reading: images in order, some of them ahead


class ReadImage(NamedTuple):
    """An image ready to be encoded, (C, H, W), and its original width and height."""

    item: Item
    pixels: Tensor
    size: tuple[int, int]


Window = Sequence[ReadImage | ReadError]


class _Read(NamedTuple):
    """What a reader sends of an item but for the pixels: the original size, files beside it."""

    size: tuple[int, int]
    files: Mapping[str, bytes]


# Of images: arrays go through a pipe; shared memory, which tensors take, is scarce in containers.
Arrays = NDArray[np.generic] | Sequence[NDArray[np.generic]]


class Reader(Dataset[Any]):
    """Read units of images, in a process of its own."""

    def __init__(self, inputs: Inputs, options: EncodeOptions) -> None:
        self.inputs = inputs
        self.options = options

    def __getitem__(self, items: Sequence[Item]) -> tuple[Arrays, list[_Read | ReadError]]:
        """Return the pixels of those images that can be read, and an entry for each image."""
        pixels = []
        read: list[_Read | ReadError] = []
        for item in items:
            try:
                image, entry = self._read(item)
            except UnreadableImageError as error:
                read.append(ReadError(item.key, error.reason))
            else:
                pixels.append(image)
                read.append(entry)

        # Those of one kind in one array.
        if len({(image.dtype, image.shape) for image in pixels}) == 1:
            return torch.stack(pixels).numpy(), read
        return [image.numpy() for image in pixels], read

    def _read(self, item: Item) -> tuple[Tensor, _Read]:
        options = self.options
        picture = self.inputs.open(item.image).read(masks=options.resample == "nearest")
        resized = picture
        if options.size:
            resized = EvalTransform(options.size, resample=options.resample)(picture)
        pixels = image_to_tensor(resized)
        files = {LATENT_PIXELS: pixel_bytes(pixels)} if options.images else {}
        return pixels, _Read(picture.size, files)


class Units:
    """What the readers are sent: the images of shards in order, a few at a time.

    A shard has at least one unit, which may be empty. ``waiting`` has what was sent and not yet
    taken up; ``error``, what ended the images early.
    """

    def __init__(
        self, inputs: Inputs, options: EncodeOptions, shards: Sequence[int], batch_size: int
    ) -> None:
        self.inputs = inputs
        self.shards = shards
        self.waiting: deque[tuple[int, Sequence[Item | ReadError]]] = deque()
        self.error: Exception | None = None
        # Images of their own sizes, which may be large, come one by one.
        self.length = 1
        if options.size:
            height, width = Sides.of(options.size)
            self.length = max(1, min(batch_size, UNIT_PIXELS // (height * width)))

    def __iter__(self) -> Iterator[list[Item]]:
        try:
            for shard in self.shards:
                items = iter(self.inputs.read(shard))
                unit = list(islice(items, self.length))
                while True:
                    self.waiting.append((shard, unit))
                    # Files that are stored as they are stay here.
                    yield [item._replace(files={}) for item in unit if isinstance(item, Item)]
                    unit = list(islice(items, self.length))
                    if not unit:
                        break
        except Exception as error:
            # It is met far ahead of the images before it, which come first.
            self.error = error

    def images(
        self, read: Iterable[tuple[Arrays, list[_Read | ReadError]]]
    ) -> Iterator[tuple[int, list[ReadImage | ReadError]]]:
        """Join what the readers return with what stayed here: units, each with its shard."""
        for pixels, answers in read:
            shard, items = self.waiting.popleft()
            images: list[ReadImage | ReadError] = []
            answer = iter(answers)
            image = iter(pixels)
            for item in items:
                if isinstance(item, ReadError):
                    images.append(item)
                    continue
                found = next(answer)
                if isinstance(found, ReadError):
                    images.append(found)
                    continue
                kept = item._replace(files={**item.files, **found.files})
                images.append(ReadImage(kept, torch.from_numpy(next(image)), found.size))
            yield shard, images
        if self.error is not None:
            raise self.error


def windows_of(
    images: Iterable[ReadImage | ReadError], length: int
) -> Iterator[list[ReadImage | ReadError]]:
    """Divide images into lists of this length, shorter where they exceed :data:`WINDOW_BYTES`."""
    window: list[ReadImage | ReadError] = []
    pixels = 0
    for image in images:
        window.append(image)
        if isinstance(image, ReadImage):
            pixels += image.pixels.nbytes
        if len(window) == length or pixels > WINDOW_BYTES:
            yield window
            window = []
            pixels = 0
    if window:
        yield window
