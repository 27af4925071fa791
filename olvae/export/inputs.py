"""Find the images to encode, divide them into output shards, and read them ahead in batches of one size."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from olvae.config import ConfigError
from olvae.data.dataset import ImageDataset, MappedSource
from olvae.data.image import Photo, image_to_tensor
from olvae.data.opening import holds_shards, open_images, open_source
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.shards.index import find_shards, with_counts
from olvae.data.shards.pairs import PIXELS, pixel_bytes
from olvae.data.shards.tar_reading import Shard, is_local, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import total
from olvae.data.transforms import EvalTransform

T = TypeVar("T")
R = TypeVar("R")


class Item(NamedTuple):
    """An image to encode: the name of its files in the shard, its key, how to open it, and files to keep with it."""

    name: str
    key: str
    open: Callable[[], Photo]
    files: Mapping[str, bytes] = {}


@dataclass(frozen=True)
class DatasetInputs:
    """Images by number: output shard i holds those from i * shard_size on, and files are named by the number.

    If ``classes`` names folders, a file ``.cls`` holds the number of the folder that the image lies in.
    """

    images: ImageDataset
    shard_size: int
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return -(-len(self.images) // self.shard_size)

    def _range(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.images)))

    def count(self, shards: range) -> int:
        return sum(len(self._range(shard)) for shard in shards)

    def read(self, shard: int) -> Iterator[Item]:
        numbers = {name: str(n).encode() for n, name in enumerate(self.classes)}
        for i in self._range(shard):
            key = self.images.key(i)
            files = {"cls": numbers[_folder(key)]} if numbers else {}
            yield Item(f"{i:08d}", key, partial(self.images.__getitem__, i), files)

    def plan(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Collect what the shards' bytes depend on, together with the options."""
        images = _digest(self.images.key(i) for i in range(len(self.images)))
        return {"options": {**options, "shard_size": self.shard_size}, "images": images, "classes": list(self.classes)}


@dataclass(frozen=True)
class ShardInputs:
    """One output shard for each input shard; files keep their names, and other files of an image are kept."""

    shards: Sequence[Shard]
    channels: int
    image_key: str | None = None
    classes: ClassVar[Sequence[str]] = ()  # the .cls files of the shards are kept

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
                yield Item(name, entry.key, partial(Photo, entry.data, entry.name, self.channels), entry.files)
            elif is_local(source.url):
                yield entry
            else:  # the network may have failed, so this need not be the end of the shard
                raise OSError(f"{entry.name}: {entry.reason}; run the same command again to continue")

    def plan(self, options: Mapping[str, Any]) -> dict[str, Any]:
        names = [f"{Path(shard.url).name}:{shard.images}" for shard in self.shards]
        return {"options": dict(options), "images": _digest(names)}


Inputs = DatasetInputs | ShardInputs
"""Images by output shard."""


def find_inputs(src: str, channels: int, shard_size: int, classes: bool = False) -> Inputs:
    """Find the images of SRC, those that :func:`~olvae.data.opening.open_source` would give.

    Args:
        shard_size: images in an output shard, unless SRC is made of shards.
        classes: whether the folders of SRC are classes; shards keep their own .cls files.

    Raises:
        ConfigError: SRC is not a source, or has no folders for classes.
        FileNotFoundError, ValueError: it has no images.
    """
    if Path(src).suffix in (".yaml", ".yml"):
        source = open_source(src, 1, 1)
        if isinstance(source, WebDatasetSource):
            return ShardInputs(source.val, source.channels, source.image_key)
        if not isinstance(source, MappedSource):
            raise ConfigError(f"{src}: {type(source).__name__} can't be encoded: encode its sources one by one")
        images = source.val
    elif holds_shards(src):
        if classes:
            raise ConfigError("`classes` is for folders: the .cls files of shards are kept anyway")
        return ShardInputs(with_counts(find_shards(src)), channels)
    else:
        images = open_images(src, channels)
    return DatasetInputs(images, shard_size, _classes(images) if classes else ())


def _classes(images: ImageDataset) -> list[str]:
    """List the folders that the images lie in, sorted."""
    keys = [images.key(i) for i in range(len(images))]
    if loose := [key for key in keys if "/" not in key]:
        raise ConfigError(f"`classes`: {loose[0]} is not in a folder that could be its class")
    return sorted({_folder(key) for key in keys})


def _folder(key: str) -> str:
    return key.partition("/")[0]


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


class ReadImage(NamedTuple):
    """An image ready to be encoded, uint8 (C, H, W), and its original width and height."""

    item: Item
    pixels: Tensor
    size: tuple[int, int]


Numbered = tuple[int, T]
"""Something, and its number in the shard."""

Batch = list[Numbered[ReadImage | ReadError]]

GROUPED_BATCHES, GROUPED_BYTES = 8, 2**28
"""Limits of the images that wait for others of their size, and of their pixels."""


def read_batches(
    items: Iterable[Item | ReadError], size: int, multiple: int, batch_size: int, threads: int, keep_pixels: bool
) -> Iterator[Batch]:
    """Yield batches of up to ``batch_size`` images that have one size once they are padded; read errors come alone.

    Images wait in memory for others of their size, up to :data:`GROUPED_BATCHES` batches and :data:`GROUPED_BYTES`;
    then those that have waited longest make a smaller batch. :func:`in_order` restores the order. The batches depend on
    the items' order and the batch size alone.

    Args:
        size: pixels after the evaluation's resize and crop; 0 leaves the images as they are.
        multiple: that height and width are padded to.
        threads: that read ahead; 0 reads an image when it is needed.
        keep_pixels: add the pixels as PNG to an image's files.
    """
    groups: dict[tuple[int, ...], Batch] = {}  # the one that waits longest is first
    waiting = 0
    for number, image in enumerate(_ahead(items, partial(_read, size, keep_pixels), threads, 2 * batch_size)):
        if isinstance(image, ReadError):
            yield [(number, image)]
            continue
        shape = tuple(-(-side // multiple) for side in image.pixels.shape[1:])
        groups.setdefault(shape, []).append((number, image))
        waiting += image.pixels.nbytes
        while groups:
            full = len(groups.get(shape, ())) == batch_size
            oldest, group = next(iter(groups.items()))
            if not full and waiting <= GROUPED_BYTES and number - group[0][0] < GROUPED_BATCHES * batch_size:
                break
            batch = groups.pop(shape if full else oldest)
            waiting -= sum(one.pixels.nbytes for _, one in batch if isinstance(one, ReadImage))
            yield batch
    yield from groups.values()


def in_order(numbered: Iterable[Numbered[T]]) -> Iterator[T]:
    """Sort numbered values as they come; the numbers start at 0 and have no gaps."""
    early, following = dict[int, T](), 0
    for number, one in numbered:
        early[number] = one
        while following in early:
            yield early.pop(following)
            following += 1


def _ahead(items: Iterable[T], read: Callable[[T], R], threads: int, depth: int) -> Iterator[R]:
    """Yield ``read(item)`` in order, up to ``depth`` of them computed ahead in threads."""
    if not threads:
        yield from map(read, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(size: int, keep_pixels: bool, item: Item | ReadError) -> ReadImage | ReadError:
    if isinstance(item, ReadError):
        return item
    try:
        picture = item.open().read()
        pixels = image_to_tensor(EvalTransform(size)(picture) if size else picture)
        if keep_pixels:
            item = item._replace(files={**item.files, PIXELS: pixel_bytes(pixels)})
        return ReadImage(item, pixels, picture.size)
    except UnreadableImageError as error:
        return ReadError(item.key, error.reason)
