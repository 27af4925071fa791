"""Check a source of images before training, by many processes: files, sizes, shards, speed."""

import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from olvae.config import ConfigError, instantiate
from olvae.config.reading import is_local
from olvae.data.dataset import ImageDataset, MappedSource
from olvae.data.image import MultiBand, Photo, image_to_tensor
from olvae.data.opening import open_images
from olvae.data.order.groups import FILE, Grouping, shared_groups
from olvae.data.picture_folder import Files
from olvae.data.pixels.size_and_range import (
    EIGHT_BITS,
    PixelRange,
    Sides,
    Size,
)
from olvae.data.places import SAMPLES, SHARDS, VOLUMES, find_source, holds_shards
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.shards.index import INDEX, Index, ShardRecord, find_shards, incomplete
from olvae.data.shards.latent_files import STATS
from olvae.data.shards.offsets import LABEL_BYTES
from olvae.data.shards.order import describe_sorted
from olvae.data.shards.shard_source import INTERLEAVE, ShardSource
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.source import LoaderProcess, Source
from olvae.data.volumes.volume_source import VolumeSlices, VolumeSource, neighbours_of
from olvae.devices import seconds_per_image
from olvae.files import counted, file_sha256, lines_sha256, list_skipped, printable
from olvae.launcher import of_each, this_process
from olvae.pool import OnProgress, SharedProgress, run_in_processes

MEASURE_S = 3.0  # seconds for which the reading speed is measured
IMAGES_PER_TASK = 64
PRINTED_NAMES = 10
ROWS_AT_A_TIME = 256  # of a picture that is hashed
BATCH = 16  # images for which the classes in a batch are counted


@dataclass(frozen=True)
class ShardFacts:
    """Facts about a shard; ``broken`` is the reason if it ended early.

    ``images`` counts those with unreadable pixels as well.
    """

    url: str
    images: int
    sha256: str | None
    broken: str | None
    classes: Set[bytes] = frozenset()  # of its images, by their .cls files


@dataclass
class AuditResult:
    """Facts about all images of a source; sizes are in pixels, of images turned upright."""

    source: str
    size: Size  # of the training crops
    images: int
    unreadable: list[ReadError]
    kinds: dict[str, int] = field(default_factory=dict)  # images by format and mode
    # images by colour profile, of those whose profile is not sRGB
    profiles: dict[str, int] = field(default_factory=dict)
    # min, median and max of sides and their ratios
    spreads: dict[str, dict[str, float]] = field(default_factory=dict)
    smaller: int = 0  # images smaller than ``size``, which training and evaluation would enlarge
    shards: list[ShardFacts] = field(default_factory=list)
    # of one loader process: reading, decoding and the training transform
    images_per_s: float | None = None
    problems: list[str] = field(default_factory=list)  # to fix before training
    notes: list[str] = field(default_factory=list)

    def note_sorted_classes(self) -> None:
        """Note that shards are sorted by class, for a usual batch, as training reads them."""
        everything = {label for shard in self.shards for label in shard.classes}
        if everything:
            own = sum(len(shard.classes) for shard in self.shards) / len(self.shards)
            line = describe_sorted(BATCH, own, len(everything), INTERLEAVE)
            self.notes += filter(None, [line])

    def note_images(self, images: ImageDataset | None) -> None:
        """Note folders that could not be opened, and what volumes there are."""
        if isinstance(images, Files):
            for error in images.closed:
                self.problems.append(f"{error.name}: this folder can't be opened: {error.reason}")
        elif isinstance(images, VolumeSlices):
            self.notes.append(images.describe())

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        content: dict[str, Any] = asdict(self)
        for shard in content["shards"]:
            shard["classes"] = len(shard["classes"])
        unreadable = [{"name": error.name, "reason": error.reason} for error in self.unreadable]
        return {**content.pop("spreads"), **content, "unreadable": unreadable}


def audit_source(
    src: str,
    size: Size = 256,
    channels: int = 3,
    max_unreadable: float = 0.01,
    workers: int = 1,
    on_progress: OnProgress = lambda *_: None,
    pixel_range: PixelRange = EIGHT_BITS,
    hold_out_by: str = FILE,
) -> AuditResult | None:
    """Read and decode every image of SRC, for training on crops of ``size`` pixels in this range.

    No group by ``hold_out_by`` should have images of training and of validation.

    Of several ranks (:func:`olvae.launcher.join`), each reads its share by ``workers`` processes,
    and the first one returns the result, the others None.

    Raises FileNotFoundError, ValueError: the source has no images, or latents.
    """
    # What SRC holds: shards, or numbered images.
    grouping = Grouping(hold_out_by)
    urls = find_shards(src) if holds_shards(src) else []
    folders = sorted({Path(url).parent for url in urls if is_local(url)})
    if any((folder / STATS).is_file() for folder in folders):
        raise ValueError(
            f"{src}: these are latents of `olvae encode`, not images: {STATS} describes them, "
            "and `olvae decode` makes images of them"
        )
    images = None if urls else open_images(src, channels, pixel_range, size)
    source: Source | None = None
    reasons: list[str] = []
    if this_process()[0] == 0:
        source, reasons = _train_source(src, size, channels, pixel_range, hold_out_by)

    # The tasks for processes: a shard each, or some images.
    read: Callable[[Any, SharedProgress], _Found]
    tasks: list[Any] = [*urls]
    if images is None:
        read = partial(_read_shard, channels, pixel_range, grouping)
        count = None if source is None else source.images
    else:
        read = partial(_read_images, images)
        count = len(images)
        for first in range(0, count, IMAGES_PER_TASK):
            tasks.append(range(first, min(first + IMAGES_PER_TASK, count)))
    if len(set(of_each(lines_sha256(map(str, tasks))))) > 1:
        raise ConfigError(f"{src}: the processes see different files there")

    # Read everything; the first rank gets what all have found, in the order of the tasks.
    parts = run_in_processes(read, tasks, workers, lambda done: on_progress(done, count))
    if parts is None:
        return None
    found = _Found()
    for part in parts:
        found.add(part)

    # Facts, notes and problems.
    result = _summarise(src, size, found)
    result.shards = found.shards
    _check_shards(result, folders)
    result.note_sorted_classes()
    result.note_images(images)
    result.problems += reasons
    _check_images(result, channels, max_unreadable, pixel_range)
    _check_held_out(result, source, found)

    # Reading speed; too many unreadable images raise a ValueError.
    if source is not None and result.images > len(result.unreadable):
        with contextlib.suppress(ValueError):
            stream = source.stream(0, 0, LoaderProcess())
            next(stream)
            seconds = seconds_per_image(lambda: next(stream), 1, MEASURE_S)
            result.images_per_s = round(1.0 / seconds, 1)
    return result


def _train_source(
    src: str, size: Size, channels: int, pixel_range: PixelRange, hold_out_by: str
) -> tuple[Source | None, list[str]]:
    """The source that would train on SRC, or the reason why it can't."""
    target, named = find_source(src)
    params = dict(named)
    if target == VOLUMES:
        window = replace(pixel_range, outside="clip")
        params |= {"neighbours": neighbours_of(channels), "range": window.as_node()}
    elif target != SAMPLES:
        params |= {"channels": channels, "range": pixel_range.as_node()}
    # What shards were packed by is seen in their images.
    if target not in (SAMPLES, SHARDS):
        params["hold_out_by"] = hold_out_by
    params |= {"size": size, "batch_size": 1}
    try:
        return instantiate({"target": target, "params": params}), []
    except (ValueError, FileNotFoundError) as error:
        return None, [str(error)]


@dataclass
class _Found:
    """Facts from one or more tasks; for readable images width, height and kind of file."""

    images: list[tuple[int, int, str]] = field(default_factory=list)
    unreadable: list[ReadError] = field(default_factory=list)
    shards: list[ShardFacts] = field(default_factory=list)
    # A path or, in a shard, its URL; the image's name; a hash of its pixels.
    pixels: list[tuple[str, str, str]] = field(default_factory=list)
    # images of shards by URL and a group in it
    groups: Counter[tuple[str, str]] = field(default_factory=Counter)
    profiles: Counter[str] = field(default_factory=Counter)  # names of those that are not sRGB
    profile_errors: Counter[str] = field(default_factory=Counter)  # why they can't be used

    def add(self, part: "_Found") -> None:
        for name, values in vars(part).items():
            vars(self)[name] += values

    def decode(self, open_photo: Callable[[], Photo], name: str, place: str) -> None:
        try:
            photo = open_photo()
            picture = photo.read()
        except UnreadableImageError as error:
            # A part is named by its file, which may have many.
            self.unreadable.append(ReadError(error.name if error.image else name, error.reason))
            return
        in_memory = "in memory" if isinstance(photo.content, Image.Image) else "array"
        values = ""
        if isinstance(picture, MultiBand) and picture.dtype != "uint8":
            values = picture.dtype
        kind = f"{photo.format or in_memory} {photo.mode or values}".strip()
        self.images.append((*picture.size, kind))

        # The pixels, some rows at a time.
        digest = hashlib.sha256(f"{picture.size}".encode())
        for top in range(0, picture.height, ROWS_AT_A_TIME):
            box = (0, top, picture.width, min(top + ROWS_AT_A_TIME, picture.height))
            digest.update(image_to_tensor(picture.crop(box)).numpy().data)
        self.pixels.append((place, name, digest.hexdigest()))
        self.profiles.update(filter(None, [photo.profile]))
        self.profile_errors.update(filter(None, [photo.profile_error]))


def _read_images(images: ImageDataset, indices: range, progress: SharedProgress) -> _Found:
    found = _Found()
    for index in indices:
        key = images.key(index)
        place = str(images.paths[index]) if isinstance(images, Files) else key
        if isinstance(images, VolumeSlices):
            place = str(images.place(index)[0].path)
        found.decode(partial(images.__getitem__, index), key, place)
        progress.advance()
    return found


def _read_shard(
    channels: int, pixel_range: PixelRange, grouping: Grouping, url: str, progress: SharedProgress
) -> _Found:
    found = _Found()
    reasons: list[str] = []
    classes: set[bytes] = set()
    for entry in read_shard(Shard(url)):
        if isinstance(entry, ReadError):
            reasons.append(entry.reason)
        else:
            if "cls" in entry.files:
                classes.add(entry.files["cls"][:LABEL_BYTES])
            # By the names in the source, or as the shards were packed.
            group = entry.group
            if grouping.how != FILE:
                group = grouping.of(str(entry.details.get("name", entry.key)))
            if group is not None:
                found.groups[url, group] += 1
            photo = partial(Photo, entry.data, entry.name, channels, pixel_range)
            found.decode(photo, entry.key, url)
            progress.advance()
    has_index = is_local(url) and Path(url).is_file() and Path(url).with_name(INDEX).is_file()
    digest = file_sha256(Path(url)) if has_index else None
    images = len(found.images) + len(found.unreadable)
    found.shards.append(ShardFacts(url, images, digest, "; ".join(reasons) or None, classes))
    return found


def _summarise(source: str, size: Size, found: _Found) -> AuditResult:
    images = len(found.images) + len(found.unreadable)
    result = AuditResult(source, size, images, sorted(found.unreadable))
    if not found.images:
        return result
    widths, heights, kinds = zip(*found.images, strict=True)
    result.kinds = dict(Counter(kinds).most_common())

    # Images smaller than the crops.
    width = np.array(widths)
    height = np.array(heights)
    high, wide = Sides.of(size)
    result.smaller = int(((height < high) | (width < wide)).sum())
    if result.smaller:
        crops = f"{Sides.of(size).short} pixels"
        result.notes.append(
            f"{counted(result.smaller, 'image')} would be enlarged, being smaller than {crops}"
        )

    # Colours: profiles that change them, and some that can't.
    result.profiles = dict(found.profiles.most_common())
    if result.profiles:
        result.notes.append(
            f"converted to sRGB by their colour profile: {_counts(result.profiles)}"
        )
    if found.profile_errors:
        result.notes.append(
            "left as they are, because their colour profile can't be used: "
            f"{_counts(found.profile_errors)}"
        )

    # How sizes and shapes spread.
    sizes = {
        "width": width,
        "height": height,
        "shorter_side": np.minimum(width, height),
        "aspect_ratio": width / height,
    }
    for name, v in sizes.items():
        spread = {"min": v.min(), "median": np.median(v), "max": v.max()}
        result.spreads[name] = {key: round(float(value), 4) for key, value in spread.items()}
    return result


def _counts(kinds: Mapping[str, int]) -> str:
    """List the ten most common kinds with their counts, and count the others."""
    common = [f"{count:,} {kind}" for kind, count in Counter(kinds).most_common(10)]
    more = f", and {len(kinds) - 10:,} more" if len(kinds) > 10 else ""
    return ", ".join(common) + more


def _check_images(
    result: AuditResult, channels: int, max_unreadable: float, pixel_range: PixelRange
) -> None:
    """Note images with alpha; add unreadable images, and kinds that do not mix, to the problems."""
    alpha = sum(count for kind, count in result.kinds.items() if kind.endswith("A"))
    if channels < 4 and alpha:
        result.notes.append(f"images with alpha, laid over white: {alpha}; `channels` 4 keeps it")
    lost = len(result.unreadable)
    if not result.images:
        result.problems.append("no images")
    elif lost > max_unreadable * result.images:
        result.problems.append(
            f"{lost} of {result.images} images can't be read, "
            f"more than `max_unreadable` {max_unreadable:g}"
        )
    if not pixel_range.eight_bits and len(result.kinds) > 1:
        result.problems.append(
            f"several kinds of pixels, which can't share a batch: {_counts(result.kinds)}"
        )


def _check_held_out(result: AuditResult, source: Source | None, found: _Found) -> None:
    """Add groups on both sides, and validation images that are training images, to the problems."""
    parts: list[set[str]] = []  # places of training, and of validation
    pixels = found.pixels
    shared = None
    if isinstance(source, ShardSource):
        parts = [{shard.url for shard in shards} for shards in (source.train, source.val)]
        groups = [{group for url, group in found.groups if url in urls} for urls in parts]
        shared = shared_groups(*groups)
    elif isinstance(source, MappedSource):
        shared = source.shared_groups()
        files = [part for part in (source.train, source.val) if isinstance(part, Files)]
        parts = [{str(path) for path in part.paths} for part in files]

        # Volumes as wholes: empty slices are alike.
        if isinstance(source, VolumeSource):
            parts = [{str(volume.path) for volume in part} for part in source.parts]
            slices: dict[tuple[str, str], list[str]] = defaultdict(list)
            for place, name, digest in sorted(pixels):
                slices[place, name.rpartition("/")[0]].append(digest)
            pixels = [(*names, lines_sha256(each)) for names, each in slices.items()]
    result.problems += filter(None, [shared])
    if len(parts) < 2:
        return
    trained, held_out = parts

    # A training image by its pixels, then the validation images that are one.
    names = {digest: name for place, name, digest in pixels if place in trained}
    copies = []
    for place, name, digest in sorted(pixels):
        if place in held_out and digest in names:
            copies.append((name, f"the pixels of {names[digest]}"))
    if copies:
        result.problems.append(
            f"{len(copies)} of the validation images are training images as well: "
            f"{list_skipped(copies)}: keep one of each"
        )


def _check_shards(result: AuditResult, folders: Sequence[Path]) -> None:
    """Add broken shards, and those that differ from the index beside them, to the problems."""
    for shard in result.shards:
        if shard.broken:
            result.problems.append(f"{shard.url}: {shard.broken}")
        elif not shard.images:
            result.notes.append(f"{shard.url}: a shard without images")

    for folder in folders:
        if Path(result.source).expanduser().is_dir():
            missing = incomplete(folder)
            if missing:
                result.problems.append(f"{folder}: {missing}")

        # The index, where there is one.
        if not (folder / INDEX).is_file():
            result.notes.append(
                f"{folder}: has no {INDEX}: training counts the images of these shards "
                "when it starts"
            )
            continue
        try:
            records = Index.read(folder / INDEX).shards
        except ValueError as error:
            result.notes.append(str(error))
            continue
        if any(record.sha256 is None for record in records.values()):
            result.notes.append(
                f"{folder}: {INDEX} has no checksums: damage inside a shard can't be seen"
            )

        # This folder's shards by name, compared with their records.
        here = {}
        for shard in result.shards:
            path = Path(shard.url)
            if path.parent == folder:
                here[path.name] = shard
        differences = [_difference(shard, records.get(name)) for name, shard in here.items()]
        result.problems += filter(None, differences)


def _difference(shard: ShardFacts, record: ShardRecord | None) -> str | None:
    if record is None:
        return (
            f"{shard.url}: is not in {INDEX}: remove that file, "
            "and training counts the images instead"
        )
    if shard.images != record.images:
        return f"{shard.url}: has {counted(shard.images, 'image')}, but {record.images} by {INDEX}"
    if record.sha256 is not None and shard.sha256 not in (None, record.sha256):
        return f"{shard.url}: its checksum differs from {INDEX}: changed or damaged since"
    return None


def audit_lines(result: AuditResult) -> Iterator[str]:
    """Describe a source in lines: facts, then the unreadable images, notes and problems."""
    facts = _facts(result)
    width = max(map(len, facts))
    for name, fact in facts.items():
        yield f"{name:<{width}}  {fact}"
    # A line for each file, though each slice of a volume has a reason.
    broken = Counter(error.name for error in result.unreadable)
    reasons = {error.name: error.reason for error in reversed(result.unreadable)}
    for name, count in [*broken.items()][:PRINTED_NAMES]:
        more = f" ({count} images of it)" if count > 1 else ""
        yield f"unreadable: {printable(name)}: {reasons[name]}{more}"
    if len(broken) > PRINTED_NAMES:
        yield f"and {len(broken) - PRINTED_NAMES:,} more; the JSON has all"
    for line in result.notes:
        yield f"note: {printable(line)}"
    for line in result.problems:
        yield f"problem: {printable(line)}"
    if not result.problems:
        yield "fine: ready for training"


def _facts(result: AuditResult) -> dict[str, str]:
    # Numbers and kinds of files.
    lost = len(result.unreadable)
    readable = "all readable"
    if lost:
        readable = f"{lost:,} of them unreadable ({lost / result.images:.2%})"
    kinds = _counts(result.kinds) or "-"
    facts = {"images": f"{result.images:,}, {readable}", "files": kinds}

    # Sizes, and what they mean for crops.
    for name, spread in result.spreads.items():
        form = ".2f" if name == "aspect_ratio" else ",.0f"
        low, middle, high = [format(value, form) for value in spread.values()]
        facts[name.replace("_", " ")] = f"{low} to {high}, median {middle}"
    crops = f"{Sides.of(result.size).short} pixels"
    facts["small"] = f"{result.smaller:,} smaller than {crops}"
    if result.images_per_s is not None:
        facts["speed"] = f"{result.images_per_s:,.0f} images/s per loader process at {crops}"

    # Shards.
    if result.shards:
        counts = sorted(shard.images for shard in result.shards)
        each = f"{counts[0]:,}"
        if counts[-1] != counts[0]:
            each += f" to {counts[-1]:,}"
        broken = sum(shard.broken is not None for shard in result.shards)
        facts["shards"] = f"{len(counts):,}, {each} image{'s' * (each != '1')} each"
        if broken:
            facts["shards"] += f"; {broken:,} broken"
    return facts
