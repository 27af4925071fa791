"""``index.json`` beside shards: how many images are in each, their sizes and checksums."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from olvae.files import write_json

__all__ = ["Index", "ShardRecord", "Skipped", "file_sha256", "legible", "named", "printable"]

VERSION = 1


@dataclass(frozen=True)
class ShardRecord:
    """A shard's images and bytes, and the SHA-256 of its file."""

    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and the shard that it would have been in."""

    shard: str
    name: str
    reason: str


@dataclass(frozen=True)
class Index:
    """What ``index.json`` says.

    Args:
        shards: by file name.
        packed: the options of ``olvae data pack``; None where the shards were made by something else.
        plan: a hash of those options and of the source.
        unreadable: images of the source that are in no shard.
    """

    shards: Mapping[str, ShardRecord]
    packed: Mapping[str, Any] | None = None
    plan: str | None = None
    unreadable: Sequence[Skipped] = field(default=())

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards.values())

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards.values())

    def write(self, path: Path) -> None:
        """Whole or not at all; the same bytes for the same index."""
        content = {
            "version": VERSION,
            "images": self.images,
            "bytes": self.bytes,
            "packed": None if self.packed is None else dict(self.packed),
            "plan": self.plan,
            "unreadable": [asdict(skipped) for skipped in self.unreadable],
            "shards": {name: asdict(self.shards[name]) for name in sorted(self.shards)},
        }
        write_json(content, path)

    @classmethod
    def read(cls, path: Path) -> "Index":
        """Raises ValueError where the file is none, or an index of counts alone."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                {name: ShardRecord(**shard) for name, shard in content["shards"].items()},
                content.get("packed"),
                content.get("plan"),
                [Skipped(**skipped) for skipped in content.get("unreadable", ())],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an index with counts, sizes and checksums of shards: {error}") from error


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def legible(name: str) -> str:
    r"""A file's name as text that can be written anywhere: bytes of it that are not UTF-8 become ``\xe9``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def printable(name: str) -> str:
    """A file's name on one line: what can't be printed is escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in legible(name))


def named(skipped: Iterable[tuple[str, str]], at_most: int = 10) -> str:
    """Names with reasons, the first few of them."""
    texts = [f"{printable(name)} ({reason})" for name, reason in skipped]
    more = f", and {len(texts) - at_most} more" if len(texts) > at_most else ""
    return ", ".join(texts[:at_most]) + more
