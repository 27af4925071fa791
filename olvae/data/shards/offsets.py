"""Where each image begins in a shard, so that a process can start in the middle of one.

``index.offsets`` beside ``index.json`` has the places of all images, in blocks of 512 bytes, as
little-endian 32-bit integers: shard after shard, in the order of their names.
"""

import contextlib
import tarfile
from collections.abc import Set
from contextlib import ExitStack, closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from olvae.config.reading import is_local
from olvae.data.shards.tar_reading import (
    META,
    SHARD_ERRORS,
    Shard,
    StrictTarInfo,
    Unpacked,
    is_image,
    open_url,
)
from olvae.files import warn_once

OFFSETS = "index.offsets"
TAR_BLOCK = tarfile.BLOCKSIZE  # bytes
KIND = np.dtype("<u4")
LABEL_BYTES = 1024  # a .cls file is smaller
NO_OFFSET = 2**32 - 1  # of images in a compressed shard, which can't be read from its middle

Offsets = NDArray[np.uint32]

# Files of offsets that could not be read, which are not tried again.
_unread: set[str] = set()


@lru_cache(maxsize=256)
def offsets_of(shard: Shard, image_key: str | None = None) -> Offsets | None:
    """Look up where a shard's images begin or, without an index of it, find them by its headers.

    None where both are impossible: it is compressed, or remote. A damaged shard has those before
    the damage.
    """
    found = listed_offsets(shard)
    if found is None and is_local(shard.url):
        found = scan(shard.url, image_key).offsets
    packed = found is not None and len(found) > 0 and found[0] == NO_OFFSET
    return None if packed else found


def listed_offsets(shard: Shard) -> Offsets | None:
    """Read a shard's part of its index's file of offsets; None if there is none that fits."""
    if shard.offsets is None or not shard.images or shard.offsets[0] in _unread:
        return None
    # A file that was replaced since has its images elsewhere.
    if shard.bytes is not None and is_local(shard.url):
        with contextlib.suppress(OSError):
            if Path(shard.url).stat().st_size != shard.bytes:
                warn_once(f"{shard.url}: changed since it was indexed: its headers are read anew")
                return None

    # Tried again as shards are.
    file, first = shard.offsets
    length = shard.images * KIND.itemsize
    content = b""
    with (
        contextlib.suppress(OSError, ValueError),
        closing(open_url(file, first * KIND.itemsize)) as stream,
    ):
        while len(content) < length and (data := stream.read(length - len(content))):
            content += data
    if len(content) < length:
        _unread.add(file)
        warn_once(f"{file}: can't be read whole: training reads shards from their beginnings")
        return None
    return np.frombuffer(content, KIND)


class Scanned(NamedTuple):
    """Where a shard's images begin, what kept it from its end, and its classes, if asked for."""

    offsets: Offsets
    error: Exception | None
    classes: Set[bytes] = frozenset()


def scan(url: str | Path, image_key: str | None = None, classes: bool = False) -> Scanned:
    """Read the headers of a shard, and its ``.cls`` files if ``classes`` are asked for.

    An image begins with the first file of its group, which are the files in a row with one key. In
    a compressed shard all are :data:`NO_OFFSET`. A local shard's contents are skipped, a remote one
    is read whole. Pictures that nothing reads get a warning, one for a folder: links, and without
    an ``image_key`` those whose names have several dots.
    """
    offsets: list[int] = []
    error: Exception | None = None
    packed = False
    left_out: set[str] = set()  # keys of such pictures
    labels: set[bytes] = set()
    key = None
    begin = 0
    try:
        with ExitStack() as opened:
            stream = opened.enter_context(closing(open_url(str(url))))
            unpacked: Any = Unpacked(stream)
            packed = unpacked.packed
            source: dict[str, Any] = {"fileobj": unpacked, "mode": "r|"}
            if is_local(str(url)):
                stream.seek(0)
                source = {"fileobj": stream, "mode": "r:*"}
            archive = opened.enter_context(tarfile.open(**source, tarinfo=StrictTarInfo))
            while (member := archive.next()) is not None:
                # Forget the members that were read: a large shard's headers fill the memory.
                archive.members = []  # type: ignore[attr-defined]
                prefix, extension = base_plus_ext(member.name)
                if prefix is None or member.isdir() or META.match(member.name):
                    continue
                if member.isreg() and prefix != key:
                    key = prefix
                    begin = member.offset // TAR_BLOCK
                if classes and extension == "cls" and member.isreg() and member.size < LABEL_BYTES:
                    content = archive.extractfile(member)
                    labels.add(content.read() if content else b"")
                if prefix == key and offsets[-1:] == [begin]:
                    continue  # another file of an image that was found
                extension = extension.lower()
                if member.isreg() and is_image(extension, image_key):
                    left_out.discard(prefix)
                    offsets.append(begin)
                elif not image_key and is_image(extension.split(".")[-1], None):
                    left_out.add(prefix)
    except SHARD_ERRORS as raised:
        error = raised
    if left_out:
        warn_once(
            f"{str(url).rpartition('/')[0]}: pictures of its shards are left out: links, or names "
            "with several dots, as a.b.jpg, whose extension begins at the first dot: "
            "store files, and rename them or set data.params.image_key"
        )
    found = np.array(offsets, KIND)
    if packed:
        found[:] = NO_OFFSET
    return Scanned(found, error, labels)
