"""Pack the images of any source into WebDataset shards, by many processes (``olvae data pack``)."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from olvae.config import ConfigError
from olvae.data.dataset import ImageDataset, groups_of
from olvae.data.hub import Items
from olvae.data.image import MODES, MultiBand, Photo, image_to_tensor, resize_shorter_side
from olvae.data.opening import open_training_images
from olvae.data.order.groups import FILE, GROUP, Grouping, fill_with_groups
from olvae.data.picture_folder import Files, warn_of_slices
from olvae.data.pixels.size_and_range import AS_STORED
from olvae.data.places import check_outside
from olvae.data.read_errors import ReadError, TooManyUnreadableError, UnreadableImageError
from olvae.data.scenes.scene_tiles import SceneTiles
from olvae.data.shards.index import INDEX, PACKING, Index, ShardRecord, is_begun
from olvae.data.shards.write import FinishedShard, ResumableShards, WebDatasetSample, shard_name
from olvae.files import list_skipped, no_empty_folders, reason
from olvae.launcher import of_each, this_process
from olvae.pool import OnProgress, SharedProgress, run_in_processes

# Formats of images that are made smaller, with Pillow's names.
PACKED_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}

STORED_AS_IS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", None: "npy"}
"""Formats, by Pillow's name, whose files go into shards unchanged, and their extension there."""


@dataclass(frozen=True)
class PackOptions:
    """Settings that the shards' content depends on, besides the source."""

    # the most images in a shard, unreadable ones included; 0 for usual_shard_size()
    shard_size: int = 0
    seed: int | None = 0  # of the shuffled order of the images; None keeps the source's order
    resize: int | None = None  # pixels of the shorter side to which larger images are made smaller
    format: str = "jpg"  # of images that are made smaller, one of FORMATS
    quality: int = 95  # of JPEG and WebP, 1 to 100
    # of arrays, images in memory and resized images; see olvae.data.image.read_picture
    channels: int = 3
    # which images are never parted: all of a group are in one shard
    hold_out_by: str = FILE

    def __post_init__(self) -> None:
        Grouping(self.hold_out_by)
        if self.format not in PACKED_FORMATS:
            raise ConfigError(f"`format` {self.format}: choose from {', '.join(PACKED_FORMATS)}")
        if self.resize is not None and self.channels == 4 and self.format == "jpg":
            raise ConfigError("`format` jpg has no fourth channel: choose png or webp")

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values; without a grouping where each file is its own."""
        options = asdict(self)
        if self.hold_out_by == FILE:
            del options["hold_out_by"]
        return options


@dataclass(frozen=True)
class Packed:
    """The index that was written, and the number of shards that an earlier run had finished."""

    index: Index
    found: int


def pack(
    src: str,
    out: Path,
    options: PackOptions,
    workers: int = 1,
    max_unreadable: float = 0.01,
    on_progress: OnProgress = lambda *_: None,
) -> Packed | None:
    """Write the images of SRC to ``out/000000.tar``, ``000001.tar``, ... then an ``index.json``.

    A shard holds for each image ``KEY.jpg`` (or .png, .webp, .npy) and ``KEY.json`` with its name
    in the source, its width and height, upright, and its class if it has one, also in ``KEY.cls``;
    KEY is its position in the order. A group of several images is whole in one shard, and named in
    ``KEY.json``: a large group makes a large shard. They depend on source and options alone. An
    earlier run's are kept. A share of ``max_unreadable`` of the images may be left out, unreadable.

    Of several ranks (:func:`olvae.launcher.join`), each writes its share of the shards by
    ``workers`` processes, and the first one the index; the others return None.

    Raises ConfigError: the folder holds something else, shards of other options or images, or lies
    inside the source; values may be missing. TooManyUnreadableError, ValueError: more images than
    allowed can't be read, or none. OSError: a shard could not be written.
    """
    # What to pack.
    check_outside(out, src)
    images = open_training_images(src, options.channels, AS_STORED)
    if not options.shard_size:
        options = replace(options, shard_size=usual_shard_size(len(images)))
    if isinstance(images, SceneTiles) and images.max_nodata > 0.0:
        raise ConfigError(
            f"{src}: max_nodata {images.max_nodata:g}: leave it out, or train on the scenes "
            "themselves: shards can't say which values are missing"
        )
    if isinstance(images, Files) and options.hold_out_by == FILE:
        warn_of_slices([images])
    digest = hash_of(src, images, options)
    shards = ResumableShards(out, PACKING)

    # Perhaps an earlier run has packed all of it, as the first rank sees it.
    seen = of_each((digest, (out / INDEX).is_file()))
    if any(other != seen[0][0] for other, _ in seen):
        raise ConfigError(f"{src}: processes see different names, sizes or times of files there")
    if seen[0][1]:
        index = _read_index(out, digest)
        shards.remove_state()  # of a run that was killed while it removed it
        return Packed(index, len(index.shards)) if this_process()[0] == 0 else None

    # The plan of a run; shards that an earlier one left must have the same.
    plan = {"options": options.as_dict(), "images": digest}
    shards.check(plan)
    packer = _Packer(images, options, shards)
    tasks = list(enumerate(packer.positions))

    # Write the shards, then the index: it tells that the folder is complete.
    try:
        with no_empty_folders(out), shards.locked("olvae data pack"):
            shards.begin(plan)
            packed = run_in_processes(
                packer, tasks, workers, lambda done: on_progress(done, len(images))
            )
            if packed is None:
                return None
            index = make_index(packed, options, digest)
            _check_unreadable(src, index.unreadable, len(images), max_unreadable)
            missing = [name for name in index.shards if not shards.folder.joinpath(name).is_file()]
            if missing:
                raise FileNotFoundError(f"no {missing[0]}: all machines have to share this folder")
            shards.remove_partials()
            stored = [number for number, shard, _ in packed if shard.record.images]
            index = replace(index, offsets=shards.write_offsets(stored))
            index.write(out / INDEX)
            shards.remove_state()
    except OSError as error:
        why = f"{out}: {reason(error)}"
        if is_begun(out):
            why += "; finished shards stay, and the same command continues from there"
        raise OSError(why) from error
    return Packed(index, sum(found for _, shard, found in packed if shard.record.images))


def make_index(
    packed: Sequence[tuple[int, FinishedShard, bool]], options: PackOptions, digest: str
) -> Index:
    """Make the index of all shards, sorted."""
    records: dict[str, ShardRecord] = {}
    unreadable: list[dict[str, str]] = []
    for number, shard, _ in packed:
        name = shard_name(number)
        if shard.record.images:
            records[name] = shard.record
        for lost in shard.unreadable:
            unreadable.append({"shard": name, "name": lost.name, "reason": lost.reason})
    return Index(records, options.as_dict(), digest, unreadable)


def hash_of(src: str, images: ImageDataset, options: PackOptions) -> str:
    """Hash all that the shards depend on: the options, and names, sizes and times of files."""
    hashed = hashlib.sha256(json.dumps(options.as_dict(), sort_keys=True).encode())
    if not isinstance(images, Files):
        hashed.update(src.encode())
    for position in range(len(images)):
        hashed.update(f"{images.state(position)}\0".encode(errors="surrogateescape"))
    return hashed.hexdigest()


def _read_index(out: Path, digest: str) -> Index:
    """Read the index of a complete run.

    Raises ConfigError: it belongs to another source or other options, or lacks a shard.
    """
    index = Index.read(out / INDEX)
    if index.plan != digest:
        raise ConfigError(
            f"`out` {out}: holds shards of other images or options: name another folder, "
            "or remove this one to start again"
        )
    for name, record in index.shards.items():
        shard = out / name
        if not (shard.is_file() and shard.stat().st_size == record.bytes):
            raise ConfigError(
                f"`out` {out}: {name} is missing or not of its size: "
                "remove the folder to start again"
            )
    return index


def _check_unreadable(
    src: str, unreadable: Sequence[Mapping[str, str]], images: int, max_unreadable: float
) -> None:
    """Raise ValueError or TooManyUnreadableError, with the names of the unreadable images."""
    lost = len(unreadable)
    names = list_skipped((skipped["name"], skipped["reason"]) for skipped in unreadable)
    if lost == images:
        raise ValueError(f"{src}: none of its {images} images can be read: {names}")
    if lost > max_unreadable * images:
        raise TooManyUnreadableError(
            f"{lost} of {images} images can't be read, "
            f"more than `max_unreadable` {max_unreadable:g}: {names}"
        )


class _Packer:
    """Writes shards by number, in any process, or finds that they are finished."""

    def __init__(self, images: ImageDataset, options: PackOptions, shards: ResumableShards) -> None:
        self.images = images
        self.options = options
        self.shards = shards
        self.order = np.arange(len(images))
        self.positions = shard_positions(len(images), options.shard_size)
        rng = None if options.seed is None else np.random.default_rng(options.seed)
        self.grouping = Grouping(options.hold_out_by)
        groups = groups_of(images, self.grouping)
        self.grouped = groups is not None
        if groups is None and rng is not None:
            self.order = rng.permutation(len(images))
        elif groups is not None:
            # Whole groups fill the shards, in any order, and then the images of a shard are mixed.
            if rng is not None:
                groups = [groups[place] for place in rng.permutation(len(groups))]
            filled = fill_with_groups(groups, options.shard_size)
            if rng is not None:
                filled = [rng.permutation(shard).tolist() for shard in filled]
            self.order = np.concatenate(filled)
            ends = list(accumulate(map(len, filled), initial=0))
            self.positions = [range(*pair) for pair in pairwise(ends)]

    def __call__(
        self, task: tuple[int, range], progress: SharedProgress
    ) -> tuple[int, FinishedShard, bool]:
        number, positions = task
        finished = self.shards.finished(number)
        if finished:
            progress.advance(len(positions))
            return number, finished, True
        return number, self.shards.write(number, self._samples(positions, progress)), False

    def _samples(
        self, positions: range, progress: SharedProgress
    ) -> Iterator[WebDatasetSample | ReadError]:
        for position in positions:
            index = int(self.order[position])
            try:
                yield WebDatasetSample(f"{position:08d}", self._files(index))
            except UnreadableImageError as error:
                yield ReadError(self.images.key(index), error.reason)
            progress.advance()

    def _files(self, index: int) -> dict[str, bytes]:
        """The image and its description, by extension, sorted."""
        # Read the bytes once, so that those that are checked are those that are stored.
        photo = self.images[index]
        photo = Photo(photo.undecoded(), photo.name, photo.channels, photo.pixel_range)
        extension, data, (width, height) = _encode(photo, self.options)
        files = {extension: data}
        details = {"name": self.images.key(index), "width": width, "height": height}
        if self.grouped:
            details[GROUP] = self.images.group(index, self.grouping)
        if isinstance(self.images, Items):
            label = self.images.label(index)
            if label is not None:
                details["label"] = label
                files["cls"] = str(label).encode()
        files["json"] = json.dumps(details).encode()
        return dict(sorted(files.items()))


def _encode(photo: Photo, options: PackOptions) -> tuple[str, bytes, tuple[int, int]]:
    """Extension, bytes and (width, height) of an image's file."""
    # Keep a file as it is, unless it has to be made smaller; also decode it, to see if it is whole.
    picture = photo.read()
    size = options.resize or min(picture.size)
    smaller = min(picture.size) > size
    if isinstance(photo.content, bytes) and not smaller and photo.format in STORED_AS_IS:
        extension = STORED_AS_IS[photo.format] if photo.format else photo.suffix
        return extension, photo.content, picture.size

    # Make the picture smaller.
    if smaller:
        if isinstance(picture, MultiBand):
            lost = photo.missing(image_to_tensor(picture).numpy()).sum()
            if lost:
                raise UnreadableImageError(
                    photo.name, f"{lost} values are missing, which a resize would mix into others"
                )
        picture = resize_shorter_side(picture, size)

    # Keep pixels that a colour profile changes as they are, with the profile: they may be masks.
    profile = None
    own = [channels for channels, mode in MODES.items() if mode == photo.mode]
    if photo.profile and own and not smaller:
        picture = Photo(photo.content, photo.name, own[0]).read(masks=True)
        profile = photo.icc_profile

    # Encode it: arrays for .npy; others without the other metadata of their file.
    extension = "npy"
    stream = io.BytesIO()
    try:
        if isinstance(picture, MultiBand):
            np.save(stream, image_to_tensor(picture).permute(1, 2, 0).numpy())
        else:
            extension = options.format if smaller else "png"
            bare = Image.frombytes(picture.mode, picture.size, picture.tobytes())
            # Formats ignore the settings that they do not have.
            bare.save(
                stream,
                PACKED_FORMATS[extension],
                quality=options.quality,
                subsampling="4:4:4",
                icc_profile=profile,
            )
    except (OSError, ValueError) as error:  # a side that is longer than the format allows
        pixels = f"{picture.width}x{picture.height} pixels"
        why = f"{pixels} can't be stored as {extension}: {reason(error)}"
        raise UnreadableImageError(photo.name, f"{why}: choose `format` png") from error
    return extension, stream.getvalue(), picture.size


def usual_shard_size(images: int) -> int:
    """1000 images, or fewer for 20 shards: one is held out, and every loader process needs some."""
    return min(1000, max(1, -(-images // 20)))


def shard_positions(images: int, at_most: int) -> list[range]:
    """The positions of each shard in the order; the sizes of shards differ by at most one."""
    count = -(-images // at_most)
    return [
        range(number * images // count, (number + 1) * images // count) for number in range(count)
    ]
