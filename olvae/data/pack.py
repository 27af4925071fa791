"""``olvae data pack``: images to shards, in parallel; the same bytes however often it is stopped on the way."""

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset import TarWriter

from olvae.config import ConfigError
from olvae.data.errors import TooManyUnreadableError, UnreadableImageError
from olvae.data.image import Bands, Photo, Picture
from olvae.data.mapped.base import ImageDataset
from olvae.data.mapped.folder import Files
from olvae.data.mapped.torchvision import Items
from olvae.data.open import open_images
from olvae.data.pool import OnProgress, Ticker, in_processes, unseen
from olvae.data.shards.index import INDEX, Index, ShardRecord, Skipped
from olvae.data.transforms import resize_shorter_side
from olvae.files import file_sha256, named, write_json

__all__ = ["FORMATS", "STATE", "Finished", "PackOptions", "Packed", "ShardMaker", "pack", "shard_count", "shard_name"]


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
            :func:`~olvae.data.image.read_picture`.
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


PLAN = "plan.json"

LOCK_S = 5.0  # processes of a run that was killed need a moment to notice


@dataclass(frozen=True)
class Packed:
    """The result: the index that was written, and how many of the shards were there from an earlier run."""

    index: Index
    found: int


def pack(
    src: str,
    out: Path,
    options: PackOptions,
    workers: int = 1,
    max_unreadable: float = 0.01,
    on_progress: OnProgress = unseen,
) -> Packed:
    """Write the images of a source to ``out/000000.tar``, ``000001.tar``, ... and last an ``index.json``.

    In a shard there are for each image ``KEY.jpg`` (or .png, .webp, .npy) and ``KEY.json`` with its name in the
    source, its width and height, upright, and its class where a data set gives one; KEY is its place in the order.
    Shards and index depend on the source and the options alone. Finished shards of an earlier run are verified and
    kept.

    Args:
        src: a folder, pattern, list or data set; see :data:`~olvae.data.open.SRC`.
        workers: processes.
        max_unreadable: share of the images that may be unreadable; these are left out.
        on_progress: called with the number of images that are done, and of all.

    Raises:
        ConfigError: the folder holds something else, or what other options made; it is inside the source or around it.
        TooManyUnreadableError: too many images can't be read. No index is written then.
        ValueError: the source has changed since the earlier run, or none of its images can be read.
        OSError: a shard could not be written.
    """
    _keep_apart(src, out)
    images = open_images(src, options.channels)
    if not options.shard_size:
        options = replace(options, shard_size=usual_shard_size(len(images)))
    plan = _plan(src, images, options)
    state = out / STATE
    known = _earlier(out, plan, options)
    try:
        state.mkdir(parents=True, exist_ok=True)
        with _alone(state, out):
            _remove_unfinished(state)
            write_json({"plan": plan, "packed": asdict(options)}, state / PLAN)
            count = shard_count(len(images), options.shard_size)
            finished: dict[int, Finished] = {}
            maker = ShardMaker(images, options, out, known)
            running = in_processes(maker, range(count), workers, lambda done: on_progress(done, len(images)))
            with closing(running):
                for shard in running:
                    finished[shard.number] = shard
                    _check_unreadable(finished, len(images), max_unreadable)
            index = _index(finished, plan, options)
            if not index.shards:
                raise ValueError(f"{src}: none of its {len(images)} images can be read: {_names(index.unreadable)}")
            index.write(out / INDEX)
            shutil.rmtree(state)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{out}: {reason}; finished shards stay, and the same command goes on from there") from error
    return Packed(index, sum(shard.found for shard in finished.values()))


def _keep_apart(src: str, out: Path) -> None:
    source, target = Path(src).expanduser(), out.resolve()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--out {out}: is a file")
    if not source.is_dir():
        return
    source = source.resolve()
    if target.is_relative_to(source):
        raise ConfigError(f"--out {out}: is inside the images' folder {src}: choose one beside it")
    if source.is_relative_to(target):
        raise ConfigError(f"--out {out}: holds the images' folder {src}: choose one beside it")


def _plan(src: str, images: ImageDataset, options: PackOptions) -> str:
    """A hash of what the shards depend on: the options, and names, sizes and times of files."""
    digest = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode())
    if not isinstance(images, Files):
        digest.update(src.encode())
    for index in range(len(images)):
        line = images.key(index)
        if isinstance(images, Files):
            try:
                state = images.paths[index].stat()
                line += f"\0{state.st_size} {state.st_mtime_ns}"
            except (OSError, ValueError):  # ValueError: a name that no file can have
                line += "\0missing"
        digest.update(f"{line}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _earlier(out: Path, plan: str, options: PackOptions) -> dict[int, Finished]:
    """The shards that earlier runs of the same plan have finished.

    Raises:
        ConfigError, ValueError: the folder holds something else, or shards of another plan.
    """
    finished: dict[int, Finished] = {}
    if (out / INDEX).is_file():
        index = Index.read(out / INDEX)
        if index.plan is None or index.packed is None:
            raise ConfigError(f"--out {out}: holds shards that this command has not made: choose another folder")
        _compare(out, index.plan, index.packed, plan, options)
        finished.update(_indexed(index))
    if (out / STATE / PLAN).is_file():
        head = json.loads((out / STATE / PLAN).read_text(encoding="utf-8"))
        _compare(out, head["plan"], head["packed"], plan, options)
        finished.update(_recorded(out / STATE))
    elif not (out / INDEX).is_file() and out.exists() and any(path.name != STATE for path in out.iterdir()):
        raise ConfigError(f"--out {out}: is not empty, and nothing that this command began: choose another folder")
    return finished


def _indexed(index: Index) -> dict[int, Finished]:
    skipped: dict[str, list[Skipped]] = {}
    for image in index.unreadable:
        skipped.setdefault(image.shard, []).append(image)
    shards = ((name, int(Path(name).stem), record) for name, record in index.shards.items())
    return {number: Finished(number, record, skipped.get(name, []), found=True) for name, number, record in shards}


def _recorded(state: Path) -> dict[int, Finished]:
    finished = {}
    for path in sorted(state.glob("[0-9]*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        unreadable = [Skipped(**skipped) for skipped in content["unreadable"]]
        finished[int(path.stem)] = Finished(int(path.stem), ShardRecord(**content["record"]), unreadable, found=True)
    return finished


def _compare(out: Path, old_plan: str, old: Mapping[str, object], plan: str, options: PackOptions) -> None:
    if old_plan == plan:
        return
    now = asdict(options)
    others = [f"{name} {old.get(name)}, now {now[name]}" for name in now if old.get(name) != now[name]]
    remedy = "choose another --out, or remove the folder to pack anew"
    if others:
        raise ConfigError(f"--out {out}: was begun with other options ({'; '.join(others)}): {remedy}")
    raise ValueError(f"--out {out}: the images have changed since it was begun: {remedy}")


@contextmanager
def _alone(state: Path, out: Path) -> Iterator[None]:
    """Two runs that write the same shards would take each other's unfinished files away."""
    with (state / "lock").open("w") as file:
        end = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise ConfigError(f"--out {out}: another `olvae data pack` is at work there") from error
                time.sleep(0.1)
        yield


def _remove_unfinished(state: Path) -> None:
    for path in [*state.glob("*.tar.*"), *state.glob(".*.partial")]:
        path.unlink(missing_ok=True)


def _check_unreadable(finished: Mapping[int, Finished], images: int, limit: float) -> None:
    unreadable = [skipped for number in sorted(finished) for skipped in finished[number].unreadable]
    if len(unreadable) > limit * images:
        raise TooManyUnreadableError(
            f"{len(unreadable)} of {images} images can't be read, more than --max-unreadable {limit:g}: "
            f"{_names(unreadable)}"
        )


def _names(unreadable: Sequence[Skipped]) -> str:
    return named((skipped.name, skipped.reason) for skipped in unreadable)


def _index(finished: Mapping[int, Finished], plan: str, options: PackOptions) -> Index:
    shards = [finished[number] for number in sorted(finished)]
    records = {shard_name(shard.number): shard.record for shard in shards if shard.record.images}
    unreadable = [skipped for shard in shards for skipped in shard.unreadable]
    return Index(records, asdict(options), plan, unreadable)


STATE = ".packing"
"""A folder in the one of the shards while they are made: the plan, a record of each finished shard, unfinished ones."""

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats, by Pillow's name, whose files go into shards as they are, and under which extension."""

LONGEST = {"jpg": 65_500, "webp": 16_383}
"""The longest side in pixels that a format can store."""

FORMATS = ("jpg", "png", "webp")
"""What images that are made smaller can be stored as."""


class ShardMaker:
    """Makes shards by number, in any process.

    Args:
        images: of the source, all.
        out: the folder of the shards, with :data:`STATE` in it.
        known: shards that an earlier run has finished; those that are still whole are not made again.
    """

    def __init__(self, images: ImageDataset, options: PackOptions, out: Path, known: Mapping[int, Finished]) -> None:
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
