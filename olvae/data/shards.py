"""Shards: tar files of images, as WebDataset has them; what is in them, reading through faults."""

import contextlib
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from olvae.data.faults import Fault
from olvae.data.index import legible
from olvae.data.opening import failure, open_url
from olvae.data.reading import EXTENSIONS
from olvae.data.shard_urls import file_name, is_local, labels_of, local_path, stem

__all__ = ["INDEX", "Entry", "Shard", "count_images", "read_shard", "with_counts"]

INDEX = "index.json"
"""The name of a file beside the shards with the number of images in each; ``olvae data pack`` writes it."""

SHARD_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, struct.error, ValueError, OverflowError, IndexError)
"""What reading a broken tar file raises."""

TAR_BLOCK = 512  # bytes; two blocks of zeros end an archive
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # first bytes; these formats notice themselves that they are cut off


class Shard(NamedTuple):
    """A tar file, by path or URL, and how many images are in it, if that is known.

    ``label`` is what its images' keys begin with, if that is not its stem.
    """

    url: str
    images: int | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or stem(self.url)


class Entry(NamedTuple):
    """An image of a shard, undecoded; with faults that were met on the way to it.

    ``files`` are the group's other files by extension, as bytes.
    """

    key: str
    name: str
    data: bytes
    files: Mapping[str, bytes]
    faults: tuple[Fault, ...] = ()


def with_counts(urls: Sequence[str], index: str | None = None, image_key: str | None = None) -> list[Shard]:
    """Shards with their numbers of images: from an index, or for local ones without, counted now.

    Without ``index``, a path or URL of one, local shards' folders are looked at for :data:`INDEX`. A missing local
    shard that no index knows is taken to have as many images as the others have on average.

    Raises:
        ValueError: the index is none, or does not know a shard; or a shard has no images.
    """
    if index is not None:
        counts = _read_index(index)
        if unknown := [url for url in urls if file_name(url) not in counts]:
            raise ValueError(f"{index}: does not know {unknown[0]}: make it anew with `olvae data check --index`")
        shards = [Shard(url, counts[file_name(url)]) for url in urls]
    else:
        indexes = _indexes_beside(urls)
        shards = [Shard(url, _local_count(url, indexes, image_key)) if is_local(url) else Shard(url) for url in urls]
        known = [shard.images for shard in shards if shard.images is not None]
        usual = round(sum(known) / len(known)) if known else 0
        shards = [Shard(s.url, max(1, usual)) if is_local(s.url) and s.images is None else s for s in shards]
    if empty := [shard.url for shard in shards if shard.images == 0]:
        wanted = f"named .{image_key}" if image_key else f"with an extension of {', '.join(EXTENSIONS)}"
        raise ValueError(f"{empty[0]}: a shard without images: no file in it is {wanted}")
    labels = labels_of(urls)
    return [shard._replace(label=labels.get(shard.url, "")) for shard in shards]


def _indexes_beside(urls: Sequence[str]) -> dict[Path, dict[str, int]]:
    """Of the folders of local shards, those that have one."""
    folders = dict.fromkeys(Path(local_path(url)).parent for url in urls if is_local(url))
    return {folder: _read_index(str(folder / INDEX)) for folder in folders if (folder / INDEX).is_file()}


def _local_count(url: str, indexes: Mapping[Path, Mapping[str, int]], image_key: str | None) -> int | None:
    path = Path(local_path(url))
    known = indexes.get(path.parent, {}).get(path.name)
    if known is not None:
        return known
    return count_images(path, image_key) if path.is_file() else None


def _read_index(url: str) -> dict[str, int]:
    try:
        with open_url(url) as stream:
            text = stream.read()
            if why := failure(stream):
                raise OSError(why)
        content = json.loads(text)
        return {name: int(shard["images"]) for name, shard in content["shards"].items()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{url}: not a readable index of shards: {error}") from error


def count_images(path: Path, image_key: str | None = None) -> int:
    """Images of a local shard, from the headers alone; up to where it is broken."""
    groups: dict[str, bool] = {}
    count, last = 0, None
    with contextlib.suppress(*SHARD_ERRORS), tarfile.open(path) as archive:
        for member in archive:
            key, extension = base_plus_ext(member.name)
            if key is None or not member.isreg():
                continue
            if key != last:
                count += bool(groups) and any(groups.values())
                groups, last = {}, key
            groups[extension.lower()] = _is_image(extension.lower(), image_key)
    return count + (bool(groups) and any(groups.values()))


def read_shard(
    shard: Shard, image_key: str | None = None, sidecars: bool = True, dotted: list[str] | None = None
) -> Iterator[Entry | Fault]:
    """The images of a shard in order, undecoded; a fault last where it can't be opened or ends early.

    A group of files of one name without an image is left out.

    Args:
        sidecars: whether the other files of a group are wanted; without them it is less work.
        dotted: gets the names of files in groups without an image that would be images without a second dot in their
            names: WebDataset splits ``a.b.jpg`` at the first, which makes ``b.jpg`` the extension. Needs the sidecars.
    """
    faults: list[Fault] = []
    wanted = None if sidecars else lambda name: _is_image((base_plus_ext(name)[1] or "").lower(), image_key)
    groups = group_by_keys(_files(shard.url, faults, wanted), handler=lambda error: _take(error, shard.url, faults))
    name, url = shard.name, legible(shard.url)
    for group in groups:
        extension = next((ext for ext in group if _is_image(ext, image_key)), None)
        key = legible(group["__key__"])
        if extension is None:
            if dotted is not None:
                dotted += [f"{key}.{ext}" for ext in group if _is_image(ext.rpartition(".")[2], None)]
            continue
        others = {ext: group[ext] for ext in group if ext != extension and not ext.startswith("__")}
        yield Entry(f"{name}/{key}", f"{url}/{key}.{extension}", group[extension], others)
    yield from faults


def _files(url: str, faults: list[Fault], wanted: Callable[[str], bool] | None) -> Iterator[dict[str, Any]]:
    """The files of a tar file; what ends it early becomes a fault, so that what came before is kept."""
    stream: Any = None
    tail: _Tail | None = None
    try:
        stream = open_url(url)
        tail = _Tail(stream)
        for file in tar_file_iterator(tail, select_files=wanted):
            yield {**file, "__url__": url}
        ended = tail.ended
        tail.read(TAR_BLOCK)
        if tail.exhausted and (why := failure(stream)):
            faults.append(Fault(url, why))
        elif not ended:
            faults.append(Fault(url, "no end mark: cut off, or damaged on the way", lost=False))
    except SHARD_ERRORS as error:
        # A command that is left before its end may complain of that, which is not what went wrong.
        why = failure(stream) if tail is not None and tail.exhausted else None
        faults.append(Fault(url, why or _reason(error)))
    finally:
        if stream is not None:
            with contextlib.suppress(OSError):  # a command that is not read to its end complains
                stream.close()


class _Tail:
    """A stream that knows whether what was read of it last is zeros, as the end of an archive is.

    ``exhausted`` says whether it was read to its end.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.exhausted = False
        self._first = self._last = b""

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        if data:
            self._first = self._first or data[:6]
            self._last = data[-TAR_BLOCK:]
        self.exhausted = not data
        return data

    @property
    def ended(self) -> bool:
        return self._first.startswith(COMPRESSED) or not any(self._last)


def _take(error: Exception, url: str, faults: list[Fault]) -> bool:
    faults.append(Fault(url, _reason(error), lost=False))
    return True


def _is_image(extension: str, image_key: str | None) -> bool:
    return extension == image_key if image_key else f".{extension}" in EXTENSIONS


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.partition(" @ ")[0].split())
