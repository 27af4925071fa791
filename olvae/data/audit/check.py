"""``olvae data check``: everything is read once, before training finds out what is wrong."""

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from olvae.config import ConfigError
from olvae.data.audit.result import (
    AuditResult,
    EpochShares,
    ImageFacts,
    ShardFacts,
    Speed,
    name_dotted,
    name_some,
    summarise,
)
from olvae.data.errors import ReadError, UnreadableImageError
from olvae.data.image import Bands, Photo, Picture
from olvae.data.mapped.base import ImageDataset
from olvae.data.mapped.folder import Files, FolderSource
from olvae.data.open import evaluation_source, holds_shards, list_images
from olvae.data.pool import OnProgress, SharedProgress, cores, ignore_progress, run_in_processes
from olvae.data.shards.index import INDEX, Index, ShardRecord, count_images
from olvae.data.shards.read import Shard, read_shard
from olvae.data.shards.urls import find_shards, is_local, local_path, stem
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import LoaderProcess
from olvae.files import file_sha256

__all__ = ["CheckOptions", "check", "compare", "count_by_indexes", "read_indexes", "write_indexes"]


AT_ONCE = 64  # images of a list in one task

MEASURE_S = 3.0  # for the estimate of a loader process's speed


@dataclass(frozen=True)
class CheckOptions:
    """What a source is checked for.

    Args:
        size: side of the training crops in pixels.
        batch_size, num_workers, ranks: of the training to come: images per rank, loader processes per rank, ranks.
        need: images per second that the training step takes, on this machine's ranks together.
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


def check(src: str, options: CheckOptions, workers: int = 1, on_progress: OnProgress = ignore_progress) -> AuditResult:
    """Read and decode every image of a source.

    Args:
        src: a folder, pattern, list, data set or shards; see :data:`~olvae.data.open.SRC`.
        workers: processes.
        on_progress: called with the number of images that are done, and of all.

    Raises:
        ConfigError: an index is asked for where there are no local shards.
        FileNotFoundError, ValueError: the source has no images.
    """
    sharded = holds_shards(src)
    if options.index and not sharded:
        raise ConfigError(f"--index: {src} is not a folder of shards")
    findings = (_check_shards if sharded else _check_list)(src, options, workers, on_progress)
    lost = len(findings.unreadable)
    if not findings.images:
        findings.problems.append("no images")
    elif lost > options.max_unreadable * findings.images:
        findings.problems.append(
            f"{lost} of {findings.images} images can't be read, more than --max-unreadable {options.max_unreadable:g}"
        )
    if findings.smaller:
        findings.notes.append(f"{findings.smaller} images are smaller than {options.size} pixels and would be enlarged")
    if findings.images > lost:
        findings.speed = _speed(src, options)
    return findings


@dataclass
class _Part:
    """What a task has read."""

    seen: list[ImageFacts] = field(default_factory=list)
    unreadable: list[ReadError] = field(default_factory=list)
    shard: ShardFacts | None = None
    dotted: list[str] = field(default_factory=list)


class _ListReader:
    def __init__(self, images: ImageDataset, channels: int) -> None:
        self.images = images
        self.channels = channels

    def __call__(self, indices: range, progress: SharedProgress) -> _Part:
        part = _Part()
        for index in indices:
            name = self.images.key(index)
            try:
                part.seen.append(_look(self.images[index], name, self.channels))
            except UnreadableImageError as error:
                part.unreadable.append(ReadError(name, error.reason))
            progress.advance()
        return part


class _ShardReader:
    def __init__(self, channels: int, checksums: bool) -> None:
        self.channels = channels
        self.checksums = checksums

    def __call__(self, url: str, progress: SharedProgress) -> _Part:
        part = _Part()
        reasons: list[str] = []
        images = 0
        for entry in read_shard(Shard(url), dotted=part.dotted):
            if isinstance(entry, ReadError):
                reasons.append(entry.reason)
                continue
            images += 1
            try:
                part.seen.append(_look(Photo(entry.data, entry.name, self.channels), entry.key, self.channels))
            except UnreadableImageError as error:
                part.unreadable.append(ReadError(entry.key, error.reason))
            progress.advance()
        path = Path(local_path(url)) if is_local(url) else None
        size = path.stat().st_size if path is not None and path.is_file() else None
        digest = file_sha256(path) if path is not None and size is not None and self.checksums else None
        part.shard = ShardFacts(url, images, size, digest, "; ".join(reasons) or None)
        return part


def _look(image: Picture | Photo, name: str, channels: int) -> ImageFacts:
    photo = image if isinstance(image, Photo) else Photo(image, name, channels)
    in_memory = "in memory" if isinstance(photo.content, Image.Image) else "array"
    kind = f"{photo.format or in_memory} {photo.mode or ''}".strip()
    picture = photo.read()
    bands = picture.bands if isinstance(picture, Bands) else [picture]
    digest = hashlib.blake2b(f"{picture.size} {len(bands)}".encode(), digest_size=16)
    for band in bands:
        digest.update(band.tobytes())
    return ImageFacts(name, picture.width, picture.height, kind, digest.digest())


def _check_list(src: str, options: CheckOptions, workers: int, on_progress: OnProgress) -> AuditResult:
    images = list_images(src, options.channels)
    count = len(images)
    tasks = [range(i, min(i + AT_ONCE, count)) for i in range(0, count, AT_ONCE)]
    seen: list[ImageFacts] = []
    unreadable: list[ReadError] = []
    reader = _ListReader(images, options.channels)
    with closing(run_in_processes(reader, tasks, workers, lambda done: on_progress(done, count))) as parts:
        for part in parts:
            seen += part.seen
            unreadable += part.unreadable
    findings = summarise(src, options.size, seen, unreadable)
    _judge_batches(src, images, options, findings)
    return findings


def _judge_batches(src: str, images: ImageDataset, options: CheckOptions, findings: AuditResult) -> None:
    """What training would have of an epoch; of files without those that FolderSource, if told nothing, holds out."""
    count = len(images)
    if isinstance(images, Files):
        findings.problems += [f"{name}: this folder can't be opened: {reason}" for name, reason, *_ in images.closed]
        try:
            count = len(FolderSource(src, options.size, 1, channels=options.channels).train)
        except (ValueError, FileNotFoundError) as error:
            findings.problems.append(str(error))
            return
    batches = count // (options.batch_size * options.ranks)
    if count and not batches:
        findings.problems.append(f"{count} training images are less than a batch of {options.batch_size} on each rank")
    findings.consumers = EpochShares(
        options.ranks, options.num_workers, options.batch_size, count, None, None, None, batches
    )


def _check_shards(src: str, options: CheckOptions, workers: int, on_progress: OnProgress) -> AuditResult:
    urls = find_shards(src)
    folders = {Path(local_path(url)).parent for url in urls if is_local(url)}
    if options.index and not folders:
        raise ConfigError(f"--index: the shards of {src} are not on this machine")
    indexes, notes = read_indexes(folders)
    total = count_by_indexes(urls, indexes)
    seen: list[ImageFacts] = []
    unreadable: list[ReadError] = []
    shards: list[ShardFacts] = []
    dotted: list[str] = []
    reader = _ShardReader(options.channels, options.index or bool(indexes))
    with closing(run_in_processes(reader, urls, workers, lambda done: on_progress(done, total))) as parts:
        for part in parts:
            assert part.shard is not None
            seen += part.seen
            unreadable += part.unreadable
            shards.append(part.shard)
            dotted += [f"{stem(part.shard.url)}/{name}" for name in part.dotted]
    findings = summarise(src, options.size, seen, unreadable)
    findings.shards = sorted(shards, key=lambda shard: urls.index(shard.url))
    findings.notes += notes
    if dotted:
        findings.problems.append(name_dotted(dotted))
    findings.problems += [f"{shard.url}: {shard.broken}" for shard in findings.shards if shard.broken]
    findings.problems += [p for folder, index in indexes.items() for p in compare(src, folder, index, findings.shards)]
    if options.index:
        write_indexes(findings, folders, indexes)
    _judge_consumers(src, options, findings)
    return findings


def _judge_consumers(src: str, options: CheckOptions, findings: AuditResult) -> None:
    """What the source itself says to so many processes."""
    try:
        source = WebDatasetSource(src, options.size, options.batch_size, options.num_workers, channels=options.channels)
        source.check_processes(options.ranks)
    except (ValueError, FileNotFoundError) as error:
        findings.problems.append(str(error))
        return
    images, shards = source.samples_per_epoch, len(source.train)
    processes = max(1, options.num_workers) * options.ranks
    share = None if images is None else images // processes
    if share == 0:
        findings.problems.append(f"{images} training images for {processes} processes: lower data.params.num_workers")
    elif shards < processes:
        findings.notes.append(
            f"{shards} training shards for {processes} processes: some read a shard's beginning only to skip it; "
            "smaller shards avoid that"
        )
    findings.consumers = EpochShares(
        options.ranks,
        options.num_workers,
        options.batch_size,
        images,
        shards,
        share,
        None if images is None or share is None else images - share * processes,
        None if images is None else images // (options.batch_size * options.ranks),
    )


def _speed(src: str, options: CheckOptions) -> Speed | None:
    """One process's, measured here and now, with files that were just read."""
    try:
        stream = evaluation_source(src, options.size, 1, channels=options.channels).stream(0, 0, LoaderProcess())
        next(stream)
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < MEASURE_S:
            next(stream)
            count += 1
    except (ValueError, FileNotFoundError):  # what is wrong has been found by reading everything
        return None
    rate = count / seconds
    wanted = None if options.need is None else math.ceil(options.need / rate)
    return Speed(options.size, round(rate, 1), cores(), options.need, wanted)


def read_indexes(folders: set[Path]) -> tuple[dict[Path, Index], list[str]]:
    """Of the folders that have one; and what there is to say of the others."""
    indexes: dict[Path, Index] = {}
    notes: list[str] = []
    for folder in sorted(folders):
        if not (folder / INDEX).is_file():
            notes.append(f"{folder}: has no {INDEX}: --index writes it, so that training need not count the images")
            continue
        try:
            indexes[folder] = Index.read(folder / INDEX)
        except ValueError as error:
            notes.append(f"{error}; --index writes it anew")
    return indexes, notes


def count_by_indexes(urls: Sequence[str], indexes: dict[Path, Index]) -> int | None:
    """Images of the shards, where they are local; for a progress bar."""
    total = 0
    for url in urls:
        if not is_local(url):
            return None
        path = Path(local_path(url))
        record = indexes[path.parent].shards.get(path.name) if path.parent in indexes else None
        total += record.images if record is not None else count_images(path) if path.is_file() else 0
    return total


def compare(src: str, folder: Path, index: Index, shards: Sequence[ShardFacts]) -> list[str]:
    """Where the shards of a folder are not what its index says."""
    problems = []
    here = {path.name: shard for shard in shards if (path := Path(local_path(shard.url))).parent == folder}
    for name, shard in here.items():
        record = index.shards.get(name)
        if record is None:
            problems.append(f"{shard.url}: {INDEX} does not know it: --index writes it anew")
        elif shard.images != record.images:
            problems.append(f"{shard.url}: has {shard.images} images, and by {INDEX} {record.images}")
        elif shard.sha256 is not None and shard.sha256 != record.sha256:
            problems.append(f"{shard.url}: its checksum is not that of {INDEX}: changed or damaged since")
    if Path(src).expanduser().is_dir() and (gone := sorted(set(index.shards) - set(here))):
        problems.append(f"{folder}: {len(gone)} shards of {INDEX} are missing: {name_some(gone)}")
    return problems


def write_indexes(findings: AuditResult, folders: set[Path], indexes: dict[Path, Index]) -> None:
    """Where there is none, or one that does not know all of a folder's shards; not for broken ones."""
    for folder in sorted(folders):
        here = [shard for shard in findings.shards if Path(local_path(shard.url)).parent == folder]
        names = {Path(local_path(shard.url)).name for shard in here}
        if folder in indexes and names <= set(indexes[folder].shards):
            findings.notes.append(f"{folder / INDEX}: is there already, and left as it is")
            continue
        if any(shard.broken for shard in here):
            findings.notes.append(f"{folder / INDEX}: not written, because shards are broken")
            continue
        records = {
            Path(local_path(shard.url)).name: ShardRecord(shard.images, shard.bytes or 0, shard.sha256 or "")
            for shard in here
        }
        Index(records).write(folder / INDEX)
        findings.notes.append(f"{folder / INDEX}: written")
