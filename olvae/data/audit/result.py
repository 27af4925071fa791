"""The result of ``olvae data check``: facts about all images of a source, and how they are printed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from olvae.data.errors import ReadError
from olvae.files import printable

__all__ = [
    "AuditResult",
    "EpochShares",
    "ImageFacts",
    "ShardFacts",
    "Speed",
    "Spread",
    "print_audit",
    "summarise",
]


SIDES = (1, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)
"""Where the histogram's bins of the shorter side begin, in pixels."""

LONG = 2.0  # at this aspect ratio a square leaves out half of a picture


class ImageFacts(NamedTuple):
    """A readable image: its size, upright; its format and mode; a hash of its pixels."""

    name: str
    width: int
    height: int
    kind: str
    digest: bytes


@dataclass(frozen=True)
class ShardFacts:
    """A shard that was read; ``broken`` says what ended it early.

    ``images`` counts those with unreadable pixels as well; ``sha256`` is None where it was not computed.
    """

    url: str
    images: int
    bytes: int | None
    sha256: str | None
    broken: str | None


@dataclass(frozen=True)
class Spread:
    """The distribution of a number over the images."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class EpochShares:
    """How the training images of an epoch are shared among loader processes.

    ``per_process`` and ``left_out`` are None where the number of images is unknown, and for lists, whose epochs are
    shared image by image.
    """

    ranks: int
    workers: int
    batch_size: int
    images: int | None
    shards: int | None
    per_process: int | None
    left_out: int | None
    batches: int | None


@dataclass(frozen=True)
class Speed:
    """Images per second of one loader process: reading, decoding and the training transform.

    ``workers`` is the number of processes that give ``need`` images per second; ``cores`` is what this machine has.
    """

    size: int
    images_per_s: float
    cores: int
    need: float | None = None
    workers: int | None = None


@dataclass
class AuditResult:
    """All sizes are in pixels, of images turned upright.

    Args:
        kinds: images by format and mode.
        sides: histogram of the shorter side: from, below (None: no limit), number of images.
        aspect_ratio: width over height.
        widest, tallest: names of the images with the largest and smallest one.
        long: images with one side at least twice the other.
        smaller: images with a shorter side below ``size``, which training and evaluation would enlarge.
        duplicates: names of images with the same pixels, group by group.
        problems: to fix before training.
        notes: worth knowing.
    """

    source: str
    size: int
    images: int
    unreadable: list[ReadError]
    kinds: dict[str, int] = field(default_factory=dict)
    width: Spread | None = None
    height: Spread | None = None
    shorter_side: Spread | None = None
    aspect_ratio: Spread | None = None
    widest: str = ""
    tallest: str = ""
    long: int = 0
    sides: list[tuple[int, int | None, int]] = field(default_factory=list)
    smaller: int = 0
    duplicates: list[list[str]] = field(default_factory=list)
    shards: list[ShardFacts] = field(default_factory=list)
    consumers: EpochShares | None = None
    speed: Speed | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def copies(self) -> int:
        """Images that are the same as another one."""
        return sum(len(group) - 1 for group in self.duplicates)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        content["unreadable"] = [{"name": error.name, "reason": error.reason} for error in self.unreadable]
        content["sides"] = [{"from": low, "below": high, "images": count} for low, high, count in self.sides]
        return content


def summarise(source: str, size: int, seen: Sequence[ImageFacts], unreadable: Sequence[ReadError]) -> AuditResult:
    """The result for the images themselves.

    Args:
        size: side of the training crops in pixels.
        seen: all readable images, in any order.
    """
    result = AuditResult(source, size, len(seen) + len(unreadable), sorted(unreadable))
    if not seen:
        return result
    seen = sorted(seen)
    width, height = (np.array([getattr(image, side) for image in seen]) for side in ("width", "height"))
    shorter, ratio = np.minimum(width, height), width / height
    result.kinds = dict(Counter(image.kind for image in seen).most_common())
    result.width, result.height = _spread(width), _spread(height)
    result.shorter_side, result.aspect_ratio = _spread(shorter), _spread(ratio)
    result.widest, result.tallest = seen[int(ratio.argmax())].name, seen[int(ratio.argmin())].name
    result.long = int((np.maximum(width, height) >= LONG * shorter).sum())
    counts = np.histogram(shorter, [*SIDES, np.inf])[0].tolist()
    result.sides = list(zip(SIDES, [*SIDES[1:], None], counts, strict=True))
    result.smaller = int((shorter < size).sum())
    groups: dict[bytes, list[str]] = {}
    for image in seen:
        groups.setdefault(image.digest, []).append(image.name)
    result.duplicates = [names for names in groups.values() if len(names) > 1]
    return result


def _spread(values: "np.ndarray[Any, Any]") -> Spread:
    low, middle, high = (round(float(value), 4) for value in (values.min(), np.median(values), values.max()))
    return Spread(low, middle, high)


BAR = 30  # cells of the longest bar

NAMED = 10


def print_audit(result: AuditResult, console: Console) -> None:
    """Print tables of the images, then notes and problems."""
    parts: list[RenderableType] = [_facts(result)]
    if result.shorter_side is not None:
        parts += ["", _sizes(result), "", _histogram(result)]
    console.print(Group(*parts), soft_wrap=False)
    _print_names("unreadable", [f"{printable(error.name)}: {error.reason}" for error in result.unreadable], console)
    groups = [" = ".join(printable(name) for name in group) for group in result.duplicates]
    _print_names("same pixels", groups, console)
    for style, word, lines in (("yellow", "note", result.notes), ("bold red", "problem", result.problems)):
        for line in lines:
            console.print(Text(f"{word}: ", style).append(printable(line), "default"), soft_wrap=True)
    if not result.problems:
        console.print(Text("fine: ", "green").append("nothing is in the way of training", "default"))


def _facts(result: AuditResult) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    lost = len(result.unreadable)
    readable = f"{lost:,} of them unreadable ({lost / result.images:.2%})" if lost else "all readable"
    table.add_row("images", f"{result.images:,}, {readable}")
    table.add_row("files", ", ".join(f"{count:,} {kind}" for kind, count in result.kinds.items()) or "-")
    groups = len(result.duplicates)
    in_groups = f", in {groups:,} group{'s' * (groups > 1)} of the same pixels" if groups else ""
    table.add_row("copies", f"{result.copies:,}{in_groups}")
    if result.aspect_ratio is not None:
        table.add_row("small", f"{result.smaller:,} with a shorter side of less than {result.size} pixels")
        table.add_row("long", f"{result.long:,} with one side at least twice the other")
        table.add_row("widest", escape(f"{printable(result.widest)} ({result.aspect_ratio.max:.2f} : 1)"))
        table.add_row("tallest", escape(f"{printable(result.tallest)} ({result.aspect_ratio.min:.2f} : 1)"))
    if result.shards:
        table.add_row("shards", _shards(result.shards))
    if result.consumers is not None:
        table.add_row("epoch", _epoch(result.consumers))
    if result.speed is not None:
        table.add_row("speed", _speed(result.speed))
    return table


def _sizes(result: AuditResult) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="dim")
    for name in ("min", "median", "max"):
        table.add_column(name, justify="right")
    rows = {
        "width": result.width,
        "height": result.height,
        "shorter side": result.shorter_side,
        "width / height": result.aspect_ratio,
    }
    for name, spread in rows.items():
        assert isinstance(spread, Spread)
        form = ".2f" if name == "width / height" else ",.0f"
        table.add_row(f"[bold]{name}[/]", *(format(value, form) for value in (spread.min, spread.median, spread.max)))
    return table


def _histogram(result: AuditResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("shorter side", justify="right")
    table.add_column("images", justify="right")
    table.add_column("")
    most = max(count for _, _, count in result.sides)
    filled = [i for i, (_, _, count) in enumerate(result.sides) if count]
    for low, high, count in result.sides[filled[0] : filled[-1] + 1]:
        label = f"{low:,} and more" if high is None else f"{low:,} to {high - 1:,}"
        cells = max(1, round(BAR * count / most)) if count else 0
        table.add_row(label, f"{count:,}", f"[cyan]{'█' * cells}[/]")
    return table


def _shards(shards: list[ShardFacts]) -> str:
    counts = sorted(shard.images for shard in shards)
    low, middle, high = counts[0], counts[len(counts) // 2], counts[-1]
    each = f"{low:,} images each" if low == high else f"{low:,} to {high:,} images each, median {middle:,}"
    broken = sum(shard.broken is not None for shard in shards)
    return f"{len(shards):,}, {each}{f'; {broken:,} broken' if broken else ''}"


def _epoch(shares: EpochShares) -> str:
    who = f"{shares.workers} workers x {shares.ranks} ranks"
    if shares.images is None:
        return f"an unknown number of images in {shares.shards} training shards, for {who}"
    of = "" if shares.shards is None else f" in {shares.shards:,} shards"
    text = f"{shares.images:,} training images{of}: {shares.batches:,} batches of {shares.batch_size} per rank"
    if shares.per_process is None:
        return text
    return f"{text}; {who}: {shares.per_process:,} images per process, {shares.left_out:,} left out"


def _speed(speed: Speed) -> str:
    text = f"{speed.images_per_s:,.0f} images/s per worker at {speed.size} pixels, read, decoded and cropped"
    if speed.need is None:
        return text
    return (
        f"{text}; {speed.need:,.0f} images/s need {speed.workers} workers in all; this machine has {speed.cores} cores"
    )


def _print_names(title: str, lines: list[str], console: Console) -> None:
    if not lines:
        return
    console.print(Text(f"\n{title}:", "bold"))
    for line in lines[:NAMED]:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if len(lines) > NAMED:
        console.print(Text(f"  and {len(lines) - NAMED:,} more; --json has all"))
