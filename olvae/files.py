"""Files that are there whole or not at all: written under another name, then renamed; and folders for them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

__all__ = ["check_folder", "file_sha256", "legible", "named", "nearest", "printable", "whole", "write_json"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file beside its place; it is moved there if nothing goes wrong, and removed if something does.

    The name is another one each time, so that processes may write the same file at once.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """A file of JSON.

    Raises:
        ValueError: a number in it is not finite, for which JSON has no word.
    """
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_folder(folder: Path) -> Path:
    """A folder that is there or could be made, and in which files can be written: told before the work, not after it.

    Raises:
        OSError: it is not so.
    """
    place = nearest(folder)
    if not place.is_dir():
        raise NotADirectoryError(f"{folder}: results need a folder, and {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: {place} can't be written: name another folder")
    return folder


def nearest(folder: Path) -> Path:
    """The folder itself if it is there, else what is there of the path to it; which may be a file."""
    place = folder.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


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
