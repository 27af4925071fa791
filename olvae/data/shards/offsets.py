"""Where each image begins in a shard, so that a process can start in the middle of one.

``index.offsets`` beside ``index.json`` has the places of all images, in blocks of 512 bytes, as
little-endian 32-bit integers: shard after shard, in the order of their names.
"""

import contextlib
import tarfile
from functools import lru_cache
from pathlib import Path

import fsspec
import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from olvae.config.reading import is_local
from olvae.data.shards.tar_reading import COMPRESSED, META, SHARD_ERRORS, Shard, is_image
from olvae.files import warn_once

OFFSETS = "index.offsets"
BLOCK = tarfile.BLOCKSIZE  # bytes
KIND = np.dtype("<u4")

Offsets = NDArray[np.uint32]


@lru_cache(maxsize=256)
def offsets_of(shard: Shard, image_key: str | None = None) -> Offsets | None:
    """Look up where a shard's images begin or, without an index of it, find them by its headers.

    None where both are impossible: it is compressed, or remote. A damaged shard has those before
    the damage.
    """
    if shard.offsets is not None and shard.images:
        file, first = shard.offsets
        length = shard.images * KIND.itemsize
        content = b""
        with contextlib.suppress(OSError, ValueError), fsspec.open(file, "rb") as stream:
            stream.seek(first * KIND.itemsize)
            content = stream.read(length)
        if len(content) == length:
            return np.frombuffer(content, KIND)
    if not is_local(shard.url):
        return None
    with contextlib.suppress(OSError), Path(shard.url).open("rb") as stream:
        start = stream.read(6)
        if not any(start.startswith(first) for first in COMPRESSED):
            return scan(shard.url, image_key)[0]
    return None


def scan(path: str | Path, image_key: str | None = None) -> tuple[Offsets, bool]:
    """Read the headers of a local shard; return where its images begin, and whether it is whole.

    An image begins with the first file of its group, which are the files in a row with one key. In
    a compressed shard the places are of the unpacked content. Pictures that nothing reads get a
    warning, one for a folder: links, and without an ``image_key`` those whose names have several
    dots.
    """
    offsets: list[int] = []
    whole = False
    left_out: set[str] = set()  # keys of such pictures
    key = None
    begin = 0
    with contextlib.suppress(*SHARD_ERRORS), tarfile.open(path, "r:*") as archive:
        while (member := archive.next()) is not None:
            # Forget the members that were read: a large shard's headers fill the memory.
            archive.members = []  # type: ignore[attr-defined]
            prefix, extension = base_plus_ext(member.name)
            if prefix is None or member.isdir() or META.match(member.name):
                continue
            if member.isreg() and prefix != key:
                key = prefix
                begin = member.offset // BLOCK
            extension = extension.lower()
            if prefix == key and offsets[-1:] == [begin]:
                continue  # another file of an image that was found
            if member.isreg() and is_image(extension, image_key):
                left_out.discard(prefix)
                offsets.append(begin)
            elif not image_key and is_image(extension.split(".")[-1], None):
                left_out.add(prefix)
        whole = True
    if left_out:
        warn_once(
            f"{Path(path).parent}: pictures of its shards are left out: links, or names with "
            "several dots, as a.b.jpg, of which all from the first dot on is the extension: store "
            "files, and rename them or set data.params.image_key"
        )
    return np.array(offsets, KIND), whole
