"""Look at a source of images before training: unreadable files, sizes, damaged shards, reading speed; its values."""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from olvae.config import instantiate
from olvae.config.reading import SAMPLES, find_source, holds_shards, is_local
from olvae.data.dataset import ImageDataset
from olvae.data.image import Bands, Photo, image_to_tensor
from olvae.data.opening import open_images
from olvae.data.picture_folder import Files
from olvae.data.pixels.size_and_range import (
    AS_STORED,
    EIGHT_BIT_FILE,
    EIGHT_BITS,
    PixelRange,
    Sides,
    Size,
)
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.shards.index import INDEX, Index, ShardRecord, find_shards, incomplete
from olvae.data.shards.latent_source import STATS
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.source import LoaderProcess, Source
from olvae.devices import seconds_per_image
from olvae.files import file_sha256, printable
from olvae.pool import OnProgress, SharedProgress, run_in_processes

MEASURE_S = 3.0  # seconds for which the reading speed is measured
IMAGES_PER_TASK, PRINTED_NAMES = 64, 10

PERCENTILES = (0.0, 0.1, 1.0, 50.0, 99.0, 99.9, 100.0)
LOW, HIGH = 1, 5  # of these, the ends of the range that is proposed
VALUES_PER_IMAGE = 2**14  # of a channel


@dataclass(frozen=True)
class ShardFacts:
    """A shard, and the reason if it ended early; ``images`` counts those with unreadable pixels as well."""

    url: str
    images: int
    sha256: str | None
    broken: str | None


@dataclass
class AuditResult:
    """Facts about all images of a source; sizes are in pixels, of images turned upright."""

    source: str
    size: Size  # of the training crops
    images: int
    unreadable: list[ReadError]
    kinds: dict[str, int] = field(default_factory=dict)  # images by format and mode
    spreads: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # min, median and max of sides and their ratios
    smaller: int = 0  # images smaller than ``size``, which training and evaluation would enlarge
    shards: list[ShardFacts] = field(default_factory=list)
    images_per_s: float | None = (
        None  # of one loader process: reading, decoding and the training transform
    )
    problems: list[str] = field(default_factory=list)  # to fix before training
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        content: dict[str, Any] = asdict(self)
        unreadable = [{"name": error.name, "reason": error.reason} for error in self.unreadable]
        return {**content.pop("spreads"), **content, "unreadable": unreadable}


def check(
    src: str,
    size: Size = 256,
    channels: int = 3,
    max_unreadable: float = 0.01,
    workers: int = 1,
    on_progress: OnProgress = lambda *_: None,
    pixel_range: PixelRange = EIGHT_BITS,
) -> AuditResult:
    """Read and decode every image of SRC, for training on crops of ``size`` pixels with values of this range.

    Raises FileNotFoundError, ValueError: the source has no images, or latents.
    """
    urls = find_shards(src) if holds_shards(src) else []
    folders = sorted({Path(url).parent for url in urls if is_local(url)})
    if any((folder / STATS).is_file() for folder in folders):
        raise ValueError(
            f"{src}: these are latents of `olvae encode`, not images: {STATS} describes them, and `olvae decode` makes "
            "images of them"
        )
    images = None if urls else open_images(src, channels, pixel_range)
    source, reasons = _train_source(src, size, channels, pixel_range)
    read: Callable[[Any, SharedProgress], _Found] = partial(_read_shard, channels, pixel_range)
    count, tasks = None if source is None else source.images, list[Any](urls)
    if images is not None:
        read, count = partial(_read_images, images), len(images)
        tasks = [
            range(i, min(i + IMAGES_PER_TASK, count)) for i in range(0, count, IMAGES_PER_TASK)
        ]
    found = _Found()
    with closing(
        run_in_processes(read, tasks, workers, lambda done: on_progress(done, count))
    ) as parts:
        for part in parts:
            for name, facts in vars(part).items():
                getattr(found, name).extend(facts)
    result = _summarise(src, size, found)
    result.shards = sorted(found.shards, key=lambda shard: urls.index(shard.url))
    _check_shards(result, folders)
    if channels < 4 and (
        alpha := sum(count for kind, count in result.kinds.items() if kind.endswith("A"))
    ):
        result.notes.append(f"images with alpha, laid over white: {alpha}; `channels` 4 keeps it")
    closed = images.closed if isinstance(images, Files) else ()
    result.problems += [
        f"{name}: this folder can't be opened: {reason}" for name, reason, *_ in closed
    ]
    result.problems += reasons
    lost = len(result.unreadable)
    if not result.images:
        result.problems.append("no images")
    elif lost > max_unreadable * result.images:
        result.problems.append(
            f"{lost} of {result.images} images can't be read, more than `max_unreadable` {max_unreadable:g}"
        )
    if not pixel_range.eight_bits and len(result.kinds) > 1:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result.kinds.items())
        result.problems.append(f"several kinds of pixels, which can't share a batch: {kinds}")
    if source is not None and result.images > lost:
        with contextlib.suppress(ValueError):  # too many are unreadable
            stream = source.stream(0, 0, LoaderProcess())
            next(stream)
            result.images_per_s = round(
                1.0 / seconds_per_image(lambda: next(stream), 1, MEASURE_S), 1
            )
    return result


def _train_source(
    src: str, size: Size, channels: int, pixel_range: PixelRange
) -> tuple[Source | None, list[str]]:
    """The source that would train on SRC, or the reason why it can't."""
    target, named = find_source(src)
    values = {} if target == SAMPLES else {"channels": channels, "range": pixel_range.as_node()}
    try:
        return instantiate(
            {"target": target, "params": {**named, **values, "size": size, "batch_size": 1}}
        ), []
    except (ValueError, FileNotFoundError) as error:
        return None, [str(error)]


@dataclass
class _Found:
    """Facts from one or more tasks; of readable images the width, the height and the kind of file."""

    images: list[tuple[int, int, str]] = field(default_factory=list)
    unreadable: list[ReadError] = field(default_factory=list)
    shards: list[ShardFacts] = field(default_factory=list)

    def decode(self, open_photo: Callable[[], Photo], name: str) -> None:
        try:
            photo = open_photo()
            in_memory = "in memory" if isinstance(photo.content, Image.Image) else "array"
            picture = photo.read()
            values = (
                picture.dtype if isinstance(picture, Bands) and picture.dtype != "uint8" else ""
            )
            kind = f"{photo.format or in_memory} {photo.mode or values}".strip()
            self.images.append((*picture.size, kind))
        except UnreadableImageError as error:
            self.unreadable.append(ReadError(name, error.reason))


def _read_images(images: ImageDataset, indices: range, progress: SharedProgress) -> _Found:
    found = _Found()
    for index in indices:
        found.decode(partial(images.__getitem__, index), images.key(index))
        progress.advance()
    return found


def _read_shard(
    channels: int, pixel_range: PixelRange, url: str, progress: SharedProgress
) -> _Found:
    found = _Found()
    reasons: list[str] = []
    for entry in read_shard(Shard(url)):
        if isinstance(entry, ReadError):
            reasons.append(entry.reason)
        else:
            found.decode(partial(Photo, entry.data, entry.name, channels, pixel_range), entry.key)
            progress.advance()
    has_index = is_local(url) and Path(url).is_file() and Path(url).with_name(INDEX).is_file()
    digest = file_sha256(Path(url)) if has_index else None
    images = len(found.images) + len(found.unreadable)
    found.shards.append(ShardFacts(url, images, digest, "; ".join(reasons) or None))
    return found


def _summarise(source: str, size: Size, found: _Found) -> AuditResult:
    result = AuditResult(
        source, size, len(found.images) + len(found.unreadable), sorted(found.unreadable)
    )
    if not found.images:
        return result
    widths, heights, kinds = zip(*found.images, strict=True)
    width, height = np.array(widths), np.array(heights)
    shorter = np.minimum(width, height)
    result.kinds = dict(Counter(kinds).most_common())
    high, wide = Sides.of(size)
    result.smaller = int(((height < high) | (width < wide)).sum())
    if result.smaller:
        crops = f"{Sides.of(size).short} pixels"
        result.notes.append(
            f"{result.smaller} images are smaller than {crops} and would be enlarged"
        )
    sizes = {
        "width": width,
        "height": height,
        "shorter_side": shorter,
        "aspect_ratio": width / height,
    }
    for name, v in sizes.items():
        spread = {"min": v.min(), "median": np.median(v), "max": v.max()}
        result.spreads[name] = {key: round(float(value), 4) for key, value in spread.items()}
    return result


def _check_shards(result: AuditResult, folders: Sequence[Path]) -> None:
    """Add broken shards, and differences between shards and the index beside them, to the problems."""
    result.problems += [f"{shard.url}: {shard.broken}" for shard in result.shards if shard.broken]
    result.notes += [
        f"{s.url}: a shard without images" for s in result.shards if not (s.images or s.broken)
    ]
    for folder in folders:
        if Path(result.source).expanduser().is_dir() and (missing := incomplete(folder)):
            result.problems.append(f"{folder}: {missing}")
        if not (folder / INDEX).is_file():
            result.notes.append(
                f"{folder}: has no {INDEX}: training counts the images of these shards when it starts"
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
        here = {
            path.name: shard
            for shard in result.shards
            if (path := Path(shard.url)).parent == folder
        }
        result.problems += [
            problem for name in here if (problem := _difference(here[name], records.get(name)))
        ]


def _difference(shard: ShardFacts, record: ShardRecord | None) -> str | None:
    if record is None:
        return f"{shard.url}: is not in {INDEX}: remove that file, and training counts the images instead"
    if shard.images != record.images:
        return f"{shard.url}: has {shard.images} images, but {record.images} by {INDEX}"
    if record.sha256 is not None and shard.sha256 not in (None, record.sha256):
        return f"{shard.url}: its checksum is not that of {INDEX}: changed or damaged since"
    return None


def audit_lines(result: AuditResult) -> Iterator[str]:
    """Describe a source in lines: facts, then the unreadable images, notes and problems."""
    facts = _facts(result)
    width = max(map(len, facts))
    yield from (f"{name:<{width}}  {fact}" for name, fact in facts.items())
    for error in result.unreadable[:PRINTED_NAMES]:
        yield f"unreadable: {printable(error.name)}: {error.reason}"
    if len(result.unreadable) > PRINTED_NAMES:
        yield f"and {len(result.unreadable) - PRINTED_NAMES:,} more; the JSON has all"
    yield from (f"note: {printable(line)}" for line in result.notes)
    yield from (f"problem: {printable(line)}" for line in result.problems)
    if not result.problems:
        yield "fine: ready for training"


def _facts(result: AuditResult) -> dict[str, str]:
    lost = len(result.unreadable)
    readable = (
        f"{lost:,} of them unreadable ({lost / result.images:.2%})" if lost else "all readable"
    )
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in result.kinds.items())
    facts = {"images": f"{result.images:,}, {readable}", "files": kinds or "-"}
    for name, spread in result.spreads.items():
        low, middle, high = (
            format(value, ".2f" if name == "aspect_ratio" else ",.0f") for value in spread.values()
        )
        facts[name.replace("_", " ")] = f"{low} to {high}, median {middle}"
    crops = f"{Sides.of(result.size).short} pixels"
    facts["small"] = f"{result.smaller:,} smaller than {crops}"
    if result.images_per_s is not None:
        facts["speed"] = f"{result.images_per_s:,.0f} images/s per loader process at {crops}"
    if result.shards:
        counts = sorted(shard.images for shard in result.shards)
        each = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
        broken = sum(shard.broken is not None for shard in result.shards)
        facts["shards"] = (
            f"{len(counts):,}, {each} images each{f'; {broken:,} broken' if broken else ''}"
        )
    return facts


@dataclass
class Measured:
    """Values of a source."""

    images: int  # that were read
    kinds: Mapping[str, int]  # images by dtype
    percentiles: NDArray[np.float64]  # (channels, 7), those of PERCENTILES over finite values
    missing: float  # share of the values that are not finite, or that their file names as missing
    unreadable: list[ReadError] = field(default_factory=list)
    nodata: float | None = None  # the value that the files name as missing, if it is one

    def line(self) -> str:
        """``range: ...`` for a config: from the percentile .1 to 99.9, for all channels or each."""
        pairs = []
        for row in self.percentiles:
            low = float(max(_rounded(row[LOW], math.floor), row[0]))
            high = float(min(_rounded(row[HIGH], math.ceil), row[-1]))
            pairs.append([low, high if high > low else low + 1.0])
        nodata = (
            "" if self.nodata is None else f", {yaml.safe_dump({'nodata': self.nodata}).strip()}"
        )
        return f"range: {{pairs: {json.dumps(pairs if len(pairs) > 1 else pairs[0])}, outside: clip{nodata}}}"

    def table(self) -> Table:
        table = Table("channel", *(f"{p:g} %" for p in PERCENTILES), box=None)
        for number, row in enumerate(self.percentiles):
            table.add_row(str(number), *(f"{value:.5g}" for value in row))
        return table


def measure(src: str, images: int = 200) -> Measured:
    """Read up to ``images`` images, evenly spread or the first of shards, and some values of each.

    Raises ValueError: none can be read, all have 8 bits, or they differ in their number of channels.
    """
    kinds: Counter[str] = Counter()
    parts: list[NDArray[np.float64]] = []
    unreadable: list[ReadError] = []
    nodata: set[float] = set()
    for open_photo in _openers(src, images):
        if len(parts) == images:
            break
        try:
            photo = open_photo()
            values = image_to_tensor(photo.read())  # (C, H, W)
        except UnreadableImageError as error:
            unreadable.append(error.read_error())
            continue
        kinds[str(values.dtype).removeprefix("torch.")] += 1
        step = max(1, values[0].numel() // VALUES_PER_IMAGE)
        while math.gcd(step, values.shape[-1]) > 1:  # or it would see the same columns in every row
            step += 1
        part = values.flatten(1)[:, ::step].double().numpy()
        part[photo.missing(part)] = np.nan
        nodata |= {value for value in (photo.nodata,) if value is not None and math.isfinite(value)}
        if parts and len(part) != len(parts[0]):
            raise ValueError(
                f"{photo.name}: {len(part)} channels, but those before it have {len(parts[0])}"
            )
        parts.append(part)
    if not parts:
        reasons = "; ".join(f"{error.name}: {error.reason}" for error in unreadable[:1])
        raise ValueError(f"{src}: no images can be read{': ' if reasons else ''}{reasons}")
    if set(kinds) == {"uint8"}:
        raise ValueError(f"{src}: {EIGHT_BIT_FILE}")
    together = np.concatenate(parts, axis=1)
    finite = np.isfinite(together)
    if not finite.any(1).all():
        raise ValueError(f"{src}: channel {int(np.argmin(finite.any(1)))} has no finite values")
    rows = np.stack(
        [np.percentile(row[good], PERCENTILES) for row, good in zip(together, finite, strict=True)]
    )
    named = nodata.pop() if len(nodata) == 1 else None
    return Measured(len(parts), dict(kinds), rows, float(1.0 - finite.mean()), unreadable, named)


def _openers(src: str, count: int) -> Iterator[Callable[[], Photo]]:
    if holds_shards(src):
        entries = (entry for url in find_shards(src) for entry in read_shard(Shard(url)))
        return (
            partial(Photo, e.data, e.name, 0, AS_STORED)
            for e in entries
            if not isinstance(e, ReadError)
        )
    found = open_images(src, 0, AS_STORED)
    numbers = {int(i) for i in np.linspace(0, len(found) - 1, min(count, len(found)))}
    return (partial(found.__getitem__, number) for number in sorted(numbers))


def _rounded(value: float, to: Any) -> float:
    """To four digits, outwards."""
    if value == 0.0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 3)
    return float(f"{to(value / step) * step:.6g}")
