"""How images are stored in a shard, and how a shard is written: the same bytes whoever writes it."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset import TarWriter

from olvae.config import ConfigError
from olvae.data.index import ShardRecord, Skipped, file_sha256
from olvae.data.lists import ImageList
from olvae.data.parallel import Ticker
from olvae.data.pixels import Bands, Picture
from olvae.data.reading import Photo, UnreadableImageError
from olvae.data.shards import INDEX
from olvae.data.torchvision import Items
from olvae.data.transforms import resize_shorter_side
from olvae.files import write_json

__all__ = ["FORMATS", "STATE", "Finished", "PackOptions", "ShardMaker", "shard_count", "shard_name"]

STATE = ".packing"
"""A folder in the one of the shards while they are made: the plan, a record of each finished shard, unfinished ones."""

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats, by Pillow's name, whose files go into shards as they are, and under which extension."""

LONGEST = {"jpg": 65_500, "webp": 16_383}
"""The longest side in pixels that a format can store."""

FORMATS = ("jpg", "png", "webp")
"""What images that are made smaller can be stored as."""


@dataclass(frozen=True)
class PackOptions:
    """What decides the shards' content, together with the source.

    Args:
        shard_size: the most images in a shard, those included that turn out to be unreadable; 0 for
            :func:`usual_shard_size`.
        seed: of the order of the images; None keeps the source's.
        resize: pixels of the shorter side, of images in which it is longer.
        format: one of :data:`FORMATS`, of images that are made smaller.
        quality: of JPEG and WebP, 1 to 100.
        channels: of images in memory, arrays and images that are made smaller, see
            :func:`~olvae.data.reading.read_picture`.
    """

    shard_size: int = 0
    seed: int | None = 0
    resize: int | None = None
    format: str = "jpg"
    quality: int = 95
    channels: int = 3

    def __post_init__(self) -> None:
        if self.shard_size < 0:
            raise ConfigError(f"--shard-size must be at least 1, got {self.shard_size}")
        if self.resize is not None and self.resize < 1:
            raise ConfigError(f"--resize must be at least 1, got {self.resize}")
        if self.format not in FORMATS:
            raise ConfigError(f"--format {self.format}: choose from {', '.join(FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality must be between 1 and 100, got {self.quality}")
        if self.resize is not None and self.channels == 4 and self.format == "jpg":
            raise ConfigError("--format jpg has no fourth channel: choose png or webp")


@dataclass(frozen=True)
class Finished:
    """A shard; without images where none of its images can be read, and then without a file."""

    number: int
    record: ShardRecord
    unreadable: list[Skipped] = field(default_factory=list)
    found: bool = False


class ShardMaker:
    """Makes shards by number, in any process.

    Args:
        images: of the source, all.
        out: the folder of the shards, with :data:`STATE` in it.
        known: shards that an earlier run has finished; those that are still whole are not made again.
    """

    def __init__(self, images: ImageList, options: PackOptions, out: Path, known: Mapping[int, Finished]) -> None:
        self.images = images
        self.options = options
        self.out = out
        self.known = known
        self.order: NDArray[np.int64] = np.arange(len(images))
        if options.seed is not None:
            self.order = np.random.default_rng(options.seed).permutation(len(images))

    def __call__(self, number: int, ticker: Ticker) -> Finished:
        places = shard_places(number, len(self.images), self.options.shard_size)
        if number in self.known and self._is_whole(self.known[number]):
            ticker.tick(len(places))
            return self.known[number]
        (self.out / INDEX).unlink(missing_ok=True)  # of a finished run, one of whose shards is damaged
        name = shard_name(number)
        partial = self.out / STATE / f"{name}.{os.getpid()}"
        try:
            finished = self._write(number, places, partial, ticker)
            if finished.record.images:
                partial.replace(self.out / name)
        finally:
            partial.unlink(missing_ok=True)
        record = {"record": asdict(finished.record), "unreadable": [asdict(skipped) for skipped in finished.unreadable]}
        write_json(record, self.out / STATE / f"{number:06d}.json")
        return finished

    def _is_whole(self, shard: Finished) -> bool:
        path = self.out / shard_name(shard.number)
        if not shard.record.images:
            return True
        return path.is_file() and path.stat().st_size == shard.record.bytes and file_sha256(path) == shard.record.sha256

    def _write(self, number: int, places: range, path: Path, ticker: Ticker) -> Finished:
        unreadable: list[Skipped] = []
        with path.open("wb") as file:
            hashed = _Hashed(file)
            with TarWriter(hashed, user="", group="", mode=0o644, mtime=0, encoder=False) as shard:
                for place in places:
                    index = int(self.order[place])
                    try:
                        extension, data, details = self._image(index)
                        shard.write({"__key__": f"{place:08d}", extension: data, "json": details})
                    except UnreadableImageError as error:
                        unreadable.append(Skipped(shard_name(number), self.images.key(index), error.reason))
                    ticker.tick()
        record = ShardRecord(len(places) - len(unreadable), hashed.bytes, hashed.digest.hexdigest())
        return Finished(number, record, unreadable)

    def _image(self, index: int) -> tuple[str, bytes, bytes]:
        """Extension, file, and what is known about it."""
        given = self.images[index]
        name = self.images.key(index)
        photo = given if isinstance(given, Photo) else Photo(given, name, self.options.channels)
        if isinstance(photo.content, Path):
            try:
                data = photo.content.read_bytes()
            except OSError as error:
                raise UnreadableImageError(photo.name, error.strerror or str(error)) from error
            photo = Photo(data, photo.name, photo.channels)
        extension, data, (width, height) = _stored(photo, self.options)
        details = {"name": name, "width": width, "height": height}
        label = self.images.label(index) if isinstance(self.images, Items) else None
        if label is not None:
            details["label"] = label
        return extension, data, json.dumps(details).encode()


def _stored(photo: Photo, options: PackOptions) -> tuple[str, bytes, tuple[int, int]]:
    """The file in which a photograph is stored: extension, bytes, width and height."""
    picture = photo.read()  # whatever is stored can be read
    smaller = options.resize is not None and min(picture.size) > options.resize
    if isinstance(photo.content, bytes) and not smaller:
        if photo.format is None:
            return "npy", photo.content, picture.size
        if photo.format in KEPT:
            return KEPT[photo.format], photo.content, picture.size
    if smaller:
        assert options.resize is not None
        picture = resize_shorter_side(picture, options.resize)
    extension = "npy" if isinstance(picture, Bands) else options.format if smaller else "png"
    longer = max(picture.size)
    if longer > LONGEST.get(extension, longer):
        reason = f"its longer side becomes {longer} pixels, more than {extension} stores: choose --format png"
        raise UnreadableImageError(photo.name, reason)
    return extension, _encoded(picture, extension, options.quality), picture.size


def _encoded(picture: Picture, extension: str, quality: int) -> bytes:
    stream = io.BytesIO()
    if isinstance(picture, Bands):
        np.save(stream, np.stack([np.asarray(band) for band in picture.bands], axis=-1))
        return stream.getvalue()
    bare = Image.frombytes(picture.mode, picture.size, picture.tobytes())  # without the first file's metadata
    if extension == "jpg":
        bare.save(stream, "JPEG", quality=quality, subsampling="4:4:4")
    elif extension == "webp":
        bare.save(stream, "WEBP", quality=quality)
    else:
        bare.save(stream, "PNG")
    return stream.getvalue()


class _Hashed:
    """A file that is written once, from front to back, and its checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def usual_shard_size(images: int) -> int:
    """1000, or fewer where that would be less than 20 shards: the last one is held out, and each loader process
    should have some."""
    return min(1000, max(1, -(-images // 20)))


def shard_count(images: int, at_most: int) -> int:
    return -(-images // at_most)


def shard_places(number: int, images: int, at_most: int) -> range:
    """The places in the order that belong to a shard: shards differ by one image at most."""
    count = shard_count(images, at_most)
    return range(number * images // count, (number + 1) * images // count)


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"
