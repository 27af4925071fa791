"""What is known of a source's images once all of them have been read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from olvae.data.faults import Fault
from olvae.data.index import printable

__all__ = ["Consumers", "Findings", "Seen", "SeenShard", "Speed", "Spread", "name_dotted", "name_some", "summarise"]

SIDES = (1, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)
"""Where the classes of the shorter side begin, in pixels."""

LONG = 2.0  # aspect ratio from which on a square leaves out half of a picture


class Seen(NamedTuple):
    """An image that can be read: its size, upright; the file's format and kind of pixels; a hash of its pixels."""

    name: str
    width: int
    height: int
    kind: str
    digest: bytes


@dataclass(frozen=True)
class SeenShard:
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
class Consumers:
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
class Findings:
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
    unreadable: list[Fault]
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
    shards: list[SeenShard] = field(default_factory=list)
    consumers: Consumers | None = None
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


def summarise(source: str, size: int, seen: Sequence[Seen], unreadable: Sequence[Fault]) -> Findings:
    """The findings about the images themselves.

    Args:
        seen: all that can be read, in any order.
        size: side of the squares that are to be cut of them.
    """
    faults = sorted(unreadable)
    findings = Findings(source, size, len(seen) + len(faults), faults)
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
