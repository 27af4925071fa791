"""``olvae data check``: reads every image once and says what is wrong before training does."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from olvae.config import ConfigError
from olvae.data.audit.result import AuditResult, EpochShares, ImageFacts, ShardFacts, Speed, summarise
from olvae.data.errors import ReadError, UnreadableImageError
from olvae.data.image import Bands, Photo
from olvae.data.mapped.base import ImageDataset
from olvae.data.mapped.folder import Files, FolderSource
from olvae.data.open import holds_shards, open_images, open_source
from olvae.data.sampler import LoaderProcess
from olvae.data.shards.index import INDEX, Index, ShardRecord, counts_beside
from olvae.data.shards.latents import LATENT, STATS
from olvae.data.shards.pairs import PIXELS
from olvae.data.shards.read import Shard, extensions, read_shard
from olvae.data.shards.urls import find_shards, is_local, stem
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import total
from olvae.files import file_sha256, printable
from olvae.pool import OnProgress, SharedProgress, cores, ignore_progress, run_in_processes

__all__ = ["CheckOptions", "check"]


T = TypeVar("T")

AT_ONCE = 64  # images of a list in one task

MEASURE_S = 3.0  # for the estimate of a loader process's speed


@dataclass(frozen=True)
class CheckOptions:
    """What a source is checked for.

    Args:
        size: side of the training crops in pixels.
        batch_size, num_workers: of the planned training, per rank.
        ranks: of the planned training.
        need: images per second that the training step takes, all ranks of this machine together.
        channels: see :func:`~olvae.data.image.read_picture`.
        max_unreadable: share of the images that may be unreadable.
        index: write an index beside local shards without one.
    """

    size: int = 256
    batch_size: int = 16
    num_workers: int = 4
    ranks: int = 1
    need: float | None = None
    channels: int = 3
    max_unreadable: float = 0.01
    index: bool = False

    @property
    def processes(self) -> int:
        """Loader processes of all ranks."""
        return max(1, self.num_workers) * self.ranks


def check(src: str, options: CheckOptions, workers: int = 1, on_progress: OnProgress = ignore_progress) -> AuditResult:
    """Read and decode every image of a source.

    Args:
        src: a folder, pattern, list, data set or shards; see :mod:`olvae.data.open`.
        workers: processes.
        on_progress: called with the number of images that are done, and of all.

    Raises:
        ConfigError: an index is wanted, but SRC is not local shards.
        FileNotFoundError, ValueError: the source has no images, or latents.
    """
    sharded = holds_shards(src)
    if options.index and not sharded:
        raise ConfigError(f"--index: {src} is not a folder of shards")
    if sharded and LATENT in extensions(find_shards(src)):
        raise ValueError(
            f"{src}: these are latents of `olvae encode`, not images: they are left as they are, index and all; "
            f"{STATS} describes them, and `olvae decode` makes images of them"
        )
    result = (_check_shards if sharded else _check_images)(src, options, workers, on_progress)
    lost = len(result.unreadable)
    if not result.images:
        result.problems.append("no images")
    elif lost > options.max_unreadable * result.images:
        result.problems.append(
            f"{lost} of {result.images} images can't be read, more than --max-unreadable {options.max_unreadable:g}"
        )
    if result.smaller:
        result.notes.append(f"{result.smaller} images are smaller than {options.size} pixels and would be enlarged")
    if result.images > lost:
        result.speed = _speed(src, options)
    return result


@dataclass
class _Part:
    """What tasks have read."""

    seen: list[ImageFacts] = field(default_factory=list)
    unreadable: list[ReadError] = field(default_factory=list)
    shards: list[ShardFacts] = field(default_factory=list)
    dotted: list[str] = field(default_factory=list)

    def look(self, image: Callable[[], Photo], name: str) -> None:
        try:
            self.seen.append(_look(image(), name))
        except UnreadableImageError as error:
            self.unreadable.append(ReadError(name, error.reason))


def _read_images(images: ImageDataset, indices: range, progress: SharedProgress) -> _Part:
    part = _Part()
    for index in indices:
        part.look(partial(images.__getitem__, index), images.key(index))
        progress.advance()
    return part


def _read_shard(channels: int, checksums: bool, url: str, progress: SharedProgress) -> _Part:
    part = _Part()
    reasons: list[str] = []
    images = 0
    for entry in read_shard(Shard(url), dotted=part.dotted):
        if isinstance(entry, ReadError):
            reasons.append(entry.reason)
            continue
        images += 1
        part.look(partial(Photo, entry.data, entry.name, channels), entry.key)
        progress.advance()
    part.dotted = [f"{stem(url)}/{name}" for name in part.dotted if not name.endswith(f".{PIXELS}")]
    path = Path(url)
    there = is_local(url) and path.is_file()
    size, digest = path.stat().st_size if there else None, file_sha256(path) if there and checksums else None
    part.shards.append(ShardFacts(url, images, size, digest, "; ".join(reasons) or None))
    return part


def _read_all(
    read: Callable[[T, SharedProgress], _Part],
    tasks: Sequence[T],
    workers: int,
    images: int | None,
    on_progress: OnProgress,
) -> _Part:
    everything = _Part()
    with closing(run_in_processes(read, tasks, workers, lambda done: on_progress(done, images))) as parts:
        for part in parts:
            everything.seen += part.seen
            everything.unreadable += part.unreadable
            everything.shards += part.shards
            everything.dotted += part.dotted
    return everything


def _look(photo: Photo, name: str) -> ImageFacts:
    in_memory = "in memory" if isinstance(photo.content, Image.Image) else "array"
    kind = f"{photo.format or in_memory} {photo.mode or ''}".strip()
    picture = photo.read()
    bands = picture.bands if isinstance(picture, Bands) else [picture]
    digest = hashlib.blake2b(f"{picture.size} {len(bands)}".encode(), digest_size=16)
    for band in bands:
        digest.update(band.tobytes())
    return ImageFacts(name, picture.width, picture.height, kind, digest.digest())


def _check_images(src: str, options: CheckOptions, workers: int, on_progress: OnProgress) -> AuditResult:
    images = open_images(src, options.channels)
    count = len(images)
    tasks = [range(i, min(i + AT_ONCE, count)) for i in range(0, count, AT_ONCE)]
    found = _read_all(partial(_read_images, images), tasks, workers, count, on_progress)
    result = summarise(src, options.size, found.seen, found.unreadable)
    if isinstance(images, Files):
        result.problems += [f"{name}: this folder can't be opened: {reason}" for name, reason, *_ in images.closed]
        try:  # what FolderSource holds out by default is not for training
            count = len(FolderSource(src, options.size, 1, channels=options.channels).train)
        except (ValueError, FileNotFoundError) as error:
            result.problems.append(str(error))
            return result
    if 0 < count < options.batch_size * options.ranks:
        result.problems.append(f"{count} training images are fewer than a batch of {options.batch_size} on each rank")
    result.consumers = _epoch_shares(options, count, None)
    return result


def _check_shards(src: str, options: CheckOptions, workers: int, on_progress: OnProgress) -> AuditResult:
    urls = find_shards(src)
    folders = sorted({Path(url).parent for url in urls if is_local(url)})
    if options.index and not folders:
        raise ConfigError(f"--index: the shards of {src} are not on this machine")
    checksums = options.index or any((folder / INDEX).is_file() for folder in folders)
    read = partial(_read_shard, options.channels, checksums)
    found = _read_all(read, urls, workers, _expected(urls), on_progress)
    result = summarise(src, options.size, found.seen, found.unreadable)
    result.shards = sorted(found.shards, key=lambda shard: urls.index(shard.url))
    if found.dotted:
        result.problems.append(_dotted_problem(found.dotted))
    result.problems += [f"{shard.url}: {shard.broken}" for shard in result.shards if shard.broken]
    result.notes += [f"{s.url}: a shard without images" for s in result.shards if not (s.images or s.broken)]
    for folder in folders:
        _check_index(src, folder, options.index, result)
    try:
        source = WebDatasetSource(src, options.size, options.batch_size, options.num_workers, channels=options.channels)
        source.check_processes(options.ranks)
    except (ValueError, FileNotFoundError) as error:
        result.problems.append(str(error))
        return result
    result.consumers = _epoch_shares(options, source.samples_per_epoch, len(source.train))
    if source.samples_per_epoch is not None and len(source.train) < options.processes:
        result.notes.append(
            f"{len(source.train)} training shards for {options.processes} processes: some read a shard's beginning "
            "only to skip it; smaller shards avoid that"
        )
    return result


def _expected(urls: Sequence[str]) -> int | None:
    """How many images will be read, for a progress bar; None if that is unknown."""
    try:
        return total(list(counts_beside(urls).values()))
    except ValueError:  # an index is not readable, as _check_index reports
        return None


def _epoch_shares(options: CheckOptions, images: int | None, shards: int | None) -> EpochShares:
    """``shards`` is None for a list, whose epochs processes share image by image."""
    known = None if images is None else images // (options.batch_size * options.ranks)
    per_process = None if images is None or shards is None else images // options.processes
    left_out = None if images is None or per_process is None else images - per_process * options.processes
    return EpochShares(
        options.ranks, options.num_workers, options.batch_size, images, shards, per_process, left_out, known
    )


def _dotted_problem(names: Sequence[str]) -> str:
    example = min(names)
    extension = example.rpartition("/")[2].partition(".")[2]
    return (
        f"{len(names)} files of the shards are left out for a second dot in their names, such as {example}, of which "
        f"WebDataset takes {extension} for the extension: set data.params.image_key to that if all images have it, or "
        "make the shards with `olvae data pack`, which names the files itself"
    )


def _speed(src: str, options: CheckOptions) -> Speed | None:
    """Measured in this process, with files that were just read; None if the source can't be opened."""
    try:
        stream = open_source(src, options.size, 1, channels=options.channels).stream(0, 0, LoaderProcess())
        next(stream)
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < MEASURE_S:
            next(stream)
            count += 1
    except (ValueError, FileNotFoundError):  # among the problems already
        return None
    rate = count / seconds
    wanted = None if options.need is None else math.ceil(options.need / rate)
    return Speed(options.size, round(rate, 1), cores(), options.need, wanted)


def _check_index(src: str, folder: Path, write: bool, result: AuditResult) -> None:
    """Compare the shards of a folder with its index; write one if there is none or it does not know all shards."""
    here = {path.name: shard for shard in result.shards if (path := Path(shard.url)).parent == folder}
    path, index = folder / INDEX, None
    if path.is_file():
        try:
            index = Index.read(path)
        except ValueError as error:
            result.notes.append(f"{error}; --index writes it anew")
    else:
        result.notes.append(f"{folder}: has no {INDEX}: --index writes it, so that training need not count the images")
    if index is not None:
        result.problems += [problem for name in here if (problem := _compare(here[name], index.shards.get(name)))]
        if Path(src).expanduser().is_dir() and (gone := sorted(set(index.shards) - set(here))):
            more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
            missing = ", ".join(printable(name) for name in gone[:3]) + more
            result.problems.append(f"{folder}: {len(gone)} shards of {INDEX} are missing: {missing}")
    if not write:
        return
    if index is not None and set(here) <= set(index.shards):
        result.notes.append(f"{path}: exists already, and is left as it is")
    elif any(shard.broken for shard in here.values()):
        result.notes.append(f"{path}: not written, because shards are broken")
    else:
        records = {name: ShardRecord(s.images, s.bytes or 0, s.sha256 or "") for name, s in here.items()}
        Index(records).write(path)
        result.notes.append(f"{path}: written")


def _compare(shard: ShardFacts, record: ShardRecord | None) -> str | None:
    """How a shard differs from what the index says."""
    if record is None:
        return f"{shard.url}: it is not in {INDEX}: --index writes that anew"
    if shard.images != record.images:
        return f"{shard.url}: has {shard.images} images, and by {INDEX} {record.images}"
    if shard.sha256 is not None and shard.sha256 != record.sha256:
        return f"{shard.url}: its checksum is not that of {INDEX}: changed or damaged since"
    return None
