"""What is known of a source's images once all of them have been read."""

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
    "name_dotted",
    "name_some",
    "print_audit",
    "summarise",
]


SIDES = (1, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)
"""Where the classes of the shorter side begin, in pixels."""

LONG = 2.0  # aspect ratio from which on a square leaves out half of a picture


class ImageFacts(NamedTuple):
    """An image that can be read: its size, upright; the file's format and kind of pixels; a hash of its pixels."""

    name: str
    width: int
    height: int
    kind: str
    digest: bytes


@dataclass(frozen=True)
class ShardFacts:
    """A shard that was read, as far as that was possible; ``broken`` says why no further.

    ``images`` counts those of unreadable pixels as well; ``sha256`` is None where it was not asked for.
    """

    url: str
    images: int
    bytes: int | None
    sha256: str | None
    broken: str | None


@dataclass(frozen=True)
class Spread:
    """Of a number that each image has."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class EpochShares:
    """An epoch of training, shared among loader processes; ``images`` are those of training alone.

    ``per_process`` and ``left_out`` are None where the number of images is not known, or processes take any share.
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
    """Images per second of one loader process, reading, decoding and the training transform; and what is needed.

    ``workers`` is the number of processes for ``need`` images per second; ``cores`` those of this machine.
    """

    size: int
    images_per_s: float
    cores: int
    need: float | None = None
    workers: int | None = None


@dataclass
class AuditResult:
    """The result of a check; all sizes in pixels, of images turned upright.

    Args:
        kinds: images by format and mode.
        sides: images by shorter side: from, up to (None is without limit), how many.
        aspect_ratio: width over height.
        widest, tallest: the images with the extremes of it.
        long: images with one side at least twice the other.
        smaller: images with a shorter side of less than ``size``, which training and evaluation would enlarge.
        duplicates: names of images with the same pixels, group by group.
        problems: what is to be mended before training.
        notes: what is worth knowing.
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
        """Images that could be left out without losing a picture."""
        return sum(len(group) - 1 for group in self.duplicates)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        content["unreadable"] = [{"name": fault.name, "reason": fault.reason} for fault in self.unreadable]
        content["sides"] = [{"from": low, "below": high, "images": count} for low, high, count in self.sides]
        return content


def summarise(source: str, size: int, seen: Sequence[ImageFacts], unreadable: Sequence[ReadError]) -> AuditResult:
    """The findings about the images themselves.

    Args:
        seen: all that can be read, in any order.
        size: side of the squares that are to be cut of them.
    """
    faults = sorted(unreadable)
    findings = AuditResult(source, size, len(seen) + len(faults), faults)
    if not seen:
        return findings
    seen = sorted(seen)
    width, height = (np.array([getattr(image, side) for image in seen]) for side in ("width", "height"))
    shorter, ratio = np.minimum(width, height), width / height
    findings.kinds = dict(Counter(image.kind for image in seen).most_common())
    findings.width, findings.height = _spread(width), _spread(height)
    findings.shorter_side, findings.aspect_ratio = _spread(shorter), _spread(ratio)
    findings.widest, findings.tallest = seen[int(ratio.argmax())].name, seen[int(ratio.argmin())].name
    findings.long = int((np.maximum(width, height) >= LONG * shorter).sum())
    ends = [*SIDES[1:], None]
    for low, high in zip(SIDES, ends, strict=True):
        count = int(((shorter >= low) & (True if high is None else shorter < high)).sum())
        findings.sides.append((low, high, count))
    findings.smaller = int((shorter < size).sum())
    groups: dict[bytes, list[str]] = {}
    for image in seen:
        groups.setdefault(image.digest, []).append(image.name)
    findings.duplicates = [names for names in groups.values() if len(names) > 1]
    return findings


def name_some(names: Sequence[str], at_most: int = 3) -> str:
    """The first few names."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(printable(name) for name in names[:at_most]) + more


def name_dotted(names: Sequence[str]) -> str:
    """What to do about files in shards that a second dot in their names keeps from being images."""
    example = min(names)
    extension = example.rpartition("/")[2].partition(".")[2]
    return (
        f"{len(names)} files of the shards are left out for a second dot in their names, such as {example}, of which "
        f"WebDataset takes {extension} for the extension: set data.params.image_key to that if all images have it, or "
        "make the shards with `olvae data pack`, which names the files itself"
    )


def _spread(values: "np.ndarray[Any, Any]") -> Spread:
    low, middle, high = (round(float(value), 4) for value in (values.min(), np.median(values), values.max()))
    return Spread(low, middle, high)


BAR = 30  # cells of the longest bar

NAMED = 10


def print_audit(findings: AuditResult, console: Console) -> None:
    """Tables of what there is; then what is worth knowing, and what is to be mended."""
    parts: list[RenderableType] = [_facts(findings)]
    if findings.shorter_side is not None:
        parts += ["", _sizes(findings), "", _histogram(findings)]
    console.print(Group(*parts), soft_wrap=False)
    _print_names("unreadable", [f"{printable(fault.name)}: {fault.reason}" for fault in findings.unreadable], console)
    groups = [" = ".join(printable(name) for name in group) for group in findings.duplicates]
    _print_names("same pixels", groups, console)
    for style, word, lines in (("yellow", "note", findings.notes), ("bold red", "problem", findings.problems)):
        for line in lines:
            console.print(Text(f"{word}: ", style).append(printable(line), "default"), soft_wrap=True)
    if not findings.problems:
        console.print(Text("fine: ", "green").append("nothing is in the way of training", "default"))


def _facts(findings: AuditResult) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    lost = len(findings.unreadable)
    readable = f"{lost:,} of them unreadable ({lost / findings.images:.2%})" if lost else "all readable"
    table.add_row("images", f"{findings.images:,}, {readable}")
    table.add_row("files", ", ".join(f"{count:,} {kind}" for kind, count in findings.kinds.items()) or "-")
    groups = len(findings.duplicates)
    in_groups = f", in {groups:,} group{'s' * (groups > 1)} of the same pixels" if groups else ""
    table.add_row("copies", f"{findings.copies:,}{in_groups}")
    if findings.aspect_ratio is not None:
        table.add_row("small", f"{findings.smaller:,} with a shorter side of less than {findings.size} pixels")
        table.add_row("long", f"{findings.long:,} with one side at least twice the other")
        table.add_row("widest", escape(f"{printable(findings.widest)} ({findings.aspect_ratio.max:.2f} : 1)"))
        table.add_row("tallest", escape(f"{printable(findings.tallest)} ({findings.aspect_ratio.min:.2f} : 1)"))
    if findings.shards:
        table.add_row("shards", _shards(findings.shards))
    if findings.consumers is not None:
        table.add_row("epoch", _consumers(findings.consumers))
    if findings.speed is not None:
        table.add_row("speed", _speed(findings.speed))
    return table


def _sizes(findings: AuditResult) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="dim")
    for name in ("min", "median", "max"):
        table.add_column(name, justify="right")
    rows = {
        "width": findings.width,
        "height": findings.height,
        "shorter side": findings.shorter_side,
        "width / height": findings.aspect_ratio,
    }
    for name, spread in rows.items():
        assert isinstance(spread, Spread)
        form = ".2f" if name == "width / height" else ",.0f"
        table.add_row(f"[bold]{name}[/]", *(format(value, form) for value in (spread.min, spread.median, spread.max)))
    return table


def _histogram(findings: AuditResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("shorter side", justify="right")
    table.add_column("images", justify="right")
    table.add_column("")
    most = max(count for _, _, count in findings.sides)
    filled = [i for i, (_, _, count) in enumerate(findings.sides) if count]
    for low, high, count in findings.sides[filled[0] : filled[-1] + 1]:
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


def _consumers(consumers: EpochShares) -> str:
    who = f"{consumers.workers} workers x {consumers.ranks} ranks"
    if consumers.images is None:
        return f"an unknown number of images in {consumers.shards} training shards, for {who}"
    of = "" if consumers.shards is None else f" in {consumers.shards:,} shards"
    text = f"{consumers.images:,} training images{of}: {consumers.batches:,} batches of {consumers.batch_size} per rank"
    if consumers.per_process is None:
        return text
    return f"{text}; {who}: {consumers.per_process:,} images per process, {consumers.left_out:,} left out"


def _speed(speed: Speed) -> str:
    text = f"{speed.images_per_s:,.0f} images/s per worker at {speed.size} pixels, read, decoded and cropped"
    if speed.need is None:
        return text
    return f"{text}; {speed.need:,.0f} images/s take {speed.workers} workers in all, and here are {speed.cores} cores"


def _print_names(title: str, lines: list[str], console: Console) -> None:
    if not lines:
        return
    console.print(Text(f"\n{title}:", "bold"))
    for line in lines[:NAMED]:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if len(lines) > NAMED:
        console.print(Text(f"  and {len(lines) - NAMED:,} more; --json has all"))
