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
    a compressed shard the places are of the unpacked content.
    """
    offsets: list[int] = []
    whole = False
    key = None
    begin = 0
    with contextlib.suppress(*SHARD_ERRORS), tarfile.open(path, "r:*") as archive:
        while (member := archive.next()) is not None:
            # Forget the members that were read: a large shard's headers fill the memory.
            archive.members = []  # type: ignore[attr-defined]
            if not member.isreg() or META.match(member.name):
                continue
            prefix, extension = base_plus_ext(member.name)
            if prefix is None:
                continue
            if prefix != key:
                key = prefix
                begin = member.offset // BLOCK
            if is_image(extension.lower(), image_key) and offsets[-1:] != [begin]:
                offsets.append(begin)
        whole = True
    return np.array(offsets, KIND), whole
