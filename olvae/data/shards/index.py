"""Find shards by folder, pattern or URL, and look up or count their numbers of images."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from olvae.config.reading import expand_braces, is_local
from olvae.data.dataset import MAX_VAL_IMAGES, VAL_FRACTION, bound_held_out
from olvae.data.order.groups import FILE
from olvae.data.places import EXTENSIONS, is_shard
from olvae.data.shards.offsets import OFFSETS, scan
from olvae.data.shards.tar_reading import Shard, file_name, open_url
from olvae.data.source import BOUND
from olvae.files import file_state, first_line, printable, reason, warn_once, write_json
from olvae.launcher import from_first, this_process

# The folder beside shards that ``olvae data pack`` has not finished, with what it continues from.
PACKING = ".packing"
# The file beside the shards with the number of images in each; ``olvae data pack`` writes it.
INDEX = "index.json"
# Contents of indexes that the first process has read for all, by path or URL and state.
_shared: dict[tuple[str, str], bytes] = {}


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard's images, a local one's bytes, and the SHA-256 of one that was packed here."""

    images: int
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Index:
    """The content of ``index.json``."""

    # By file name.
    shards: Mapping[str, ShardRecord]
    # The options of ``olvae data pack``; None for shards from elsewhere.
    packed: Mapping[str, Any] | None = None
    # A hash of those options and of the source.
    plan: str | None = None
    # Shard, name and reason of the source's images that are in no shard.
    unreadable: Sequence[Mapping[str, str]] = ()
    # Whether a file of offsets beside it says where each image begins, and for which image key.
    offsets: bool = False
    image_key: str | None = None
    # Classes in a shard on average, and in all, by the images' ``.cls`` files; None if unknown.
    classes: tuple[float, int] | None = None

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards.values())

    @property
    def bytes(self) -> int:
        return sum(shard.bytes or 0 for shard in self.shards.values())

    def counts(self, image_key: str | None) -> bool:
        """Whether its numbers are of images of this key, and not of others in the same shards."""
        return self.image_key in (None, image_key)

    def located(self, url: str, image_key: str | None) -> dict[str, Shard]:
        """Describe the shards by file name, with where to read their offsets.

        ``url`` is this index's path or URL. Their own urls are left empty.
        """
        beside = f"{url.rpartition('/')[0]}/{OFFSETS}"
        if is_local(url):
            beside = str(Path(url).with_name(OFFSETS))
        known = self.offsets and self.image_key == image_key
        first = 0
        found = {}
        for name in sorted(self.shards):
            images = self.shards[name].images
            place = (beside, first) if known else None
            size = self.shards[name].bytes
            found[name] = Shard("", images, place, size, self.classes)
            first += images
        return found

    def write(self, path: Path) -> None:
        """Write the file atomically; the same bytes for the same index."""
        content = {
            "version": 1,
            "images": self.images,
            "bytes": self.bytes,
            "packed": self.packed,
            "plan": self.plan,
            "unreadable": self.unreadable,
            "offsets": self.offsets,
            "image_key": self.image_key,
            "classes": self.classes,
            "shards": {name: asdict(self.shards[name]) for name in sorted(self.shards)},
        }
        write_json(content, path)

    @classmethod
    def read(cls, url: str | Path) -> "Index":
        """Read an index by path or URL: a local file again if it has changed, a remote one once.

        Raises FileNotFoundError: it is missing. ValueError: it is not an index.
        """
        return read_unchanged(str(url), file_state(url))


def read_whole(url: str) -> bytes:
    """Read a file by path or URL."""
    with contextlib.closing(open_url(url)) as stream:
        return b"".join(iter(lambda: stream.read(2**20), b""))


def share_indexes(places: Any) -> None:
    """Read indexes in the first process, and give them to all others; every process has to call.

    ``places`` names shards, or is the node of a source. :meth:`Index.read` then takes what came
    from the first process, unless this one's file has another size or time.
    """
    if this_process()[1] == 1:
        return

    def read() -> dict[tuple[str, str], bytes]:
        found = {}
        for url in sorted(set(named_indexes(places))):
            key = (url, file_state(url))
            # Where this fails, reading it again says what is wrong.
            with contextlib.suppress(OSError, ValueError):
                if key not in _shared:
                    found[key] = read_whole(url)
        return found

    _shared.update(from_first(read))


def named_indexes(places: Any, name: str = "") -> Iterator[str]:
    """Find the indexes beside shards and in arguments ``index``, of nested nodes as well."""
    if isinstance(places, Mapping):
        for key, value in places.items():
            yield from named_indexes(value, key)
    elif isinstance(places, list | tuple):
        for place in places:
            yield from named_indexes(place, name)
    elif isinstance(places, str | Path):
        text = str(places)
        beside = Path(text).parent if is_shard(text) else Path(text)
        if name == "index":
            yield text
        elif is_local(text) and file_state(beside / INDEX) != "missing":
            yield str(beside / INDEX)


@lru_cache(maxsize=4)
def read_unchanged(url: str, state: str) -> Index:
    """Read an index, once for each :func:`~olvae.files.file_state` of it."""
    try:
        key = (url, state)
        content = json.loads(_shared.get(key) or read_whole(url))
        if key in _shared:
            _shared[key] = b""  # it was needed once
        shards = {
            name: ShardRecord(int(shard["images"]), shard.get("bytes"), shard.get("sha256"))
            for name, shard in content["shards"].items()
        }
        classes = content.get("classes")
        return Index(
            shards,
            content.get("packed"),
            content.get("plan"),
            content.get("unreadable", ()),
            bool(content.get("offsets", False)),
            content.get("image_key"),
            classes and (float(classes[0]), int(classes[1])),
        )
    except FileNotFoundError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(f"{url}: not a readable index of shards: {reason(error)}") from error


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """List the shards of a folder, a pattern, a URL, a pipe, or a list of these.

    A pattern has braces, as in {000..127}, or wildcards; the URL of a folder ends with a slash.
    Warns of a folder that is :func:`incomplete`.

    Raises FileNotFoundError: there are none, or they are local and none of them exists.
    """
    places = [shards] if isinstance(shards, str | Path) else shards
    given = [str(place) for place in places]
    urls: list[str] = []
    for text in given:
        urls += _expand(text)
    if not any(may_exist(url) for url in urls):
        raise FileNotFoundError(
            f"{', '.join(given) or 'shards'}: no shards: name a folder of .tar files, a pattern "
            "such as data/{000000..000127}.tar, or URLs; `olvae data pack` makes shards of images"
        )
    return urls


def _expand(text: str) -> list[str]:
    """List the shards of one folder, pattern, URL or pipe; sorted in a folder or pattern."""
    text = re.sub("^file:(//)?", "", text)
    path = Path(text).expanduser()
    if path.is_dir():
        missing = incomplete(path)
        if missing:
            warn_once(f"{path}: {missing}")
        before = "" if path == Path() else str(path / "_")[:-1]
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if is_shard(entry.name))
        return [before + name for name in names]

    # First the braces, as in {000..127}, and environment variables: webdataset raises
    # AssertionError for a variable that is not set.
    try:
        expanded = expand_braces(text)
    except AssertionError as error:
        raise ValueError(f"{text}: {error}") from error

    # Then the wildcards of paths, and remote folders. The web has neither, and a question mark
    # there begins a query.
    found: list[str] = []
    for url in expanded:
        is_folder = url.endswith("/")
        on_the_web = url.startswith(("pipe:", "http:", "https:"))
        if is_local(url):
            # A file may also have a wildcard's character in its name.
            name = str(Path(url).expanduser())
            if glob.has_magic(name) and not Path(name).exists():
                found += sorted(glob.glob(name))  # noqa: PTH207  (Path.glob needs the folder apart)
            else:
                found.append(name)
        elif on_the_web or not (is_folder or glob.has_magic(url)):
            found.append(url)
        else:
            found += _list_remote(url)
    return found


def _list_remote(url: str) -> list[str]:
    """List the shards of a remote folder, whose URL ends with a slash, or of a pattern; sorted."""
    is_folder = url.endswith("/")
    pattern = f"{url}*" if is_folder else url
    try:
        system, place = fsspec.url_to_fs(pattern, skip_instance_cache=True)
        # A shard may have a wildcard's character in its name here as well.
        if not is_folder and system.exists(place):
            return [url]
        names = sorted(system.glob(place))
    except Exception as error:  # each file system raises its own kinds
        raise OSError(f"{url}: can't be listed: {first_line(error)}") from error

    # Names lack the protocol and, in some systems, the host: these are put before them.
    if is_folder:
        names = [name for name in names if is_shard(name.rpartition("/")[2])]
    if pattern.endswith(place):
        return [pattern.removesuffix(place) + name for name in names]
    return [system.unstrip_protocol(name) for name in names]


def may_exist(url: str) -> bool:
    """Whether a shard is a file that exists or, if remote, may exist: only reading it tells."""
    return not is_local(url) or Path(url).is_file()


def split_shards(
    shards: list[str],
    val: list[str] | None,
    fraction: float | None,
    argument: str,
    index: str | Path | None = None,
    image_key: str | None = None,
) -> tuple[list[str], list[str], str]:
    """Split shards for training and validation: ``val``, or else the last ``fraction`` of them.

    At least one shard is held out; by default 5 % or, by their index, no more than have
    :data:`~olvae.data.dataset.MAX_VAL_IMAGES` images: then a note for the source's description
    comes with them. ``argument`` of the source names ``val``.

    Raises ValueError: the fraction is not between 0 and 1, or there is only one shard.
    """
    share = VAL_FRACTION if fraction is None else fraction
    held_out = bound_held_out(share * len(shards), len(shards), share)
    if val is not None:
        return shards, val, ""
    if len(shards) < 2:
        raise ValueError(
            f"{shards[0]}: one shard can't be split into training and validation: make smaller "
            "ones (`shard_size` of `olvae data pack` and `olvae encode`), or set "
            f"data.params.{argument}"
        )

    # By default the index, where there is one, bounds a share of two shards or more.
    bound = ""
    if fraction is None and held_out > 1:
        sums = np.cumsum(images_listed(shards[-held_out:], index, image_key)[::-1])
        fitting = max(1, int(np.searchsorted(sums, MAX_VAL_IMAGES, side="right")))
        if fitting < held_out:
            held_out = fitting
            bound = BOUND
    return shards[:-held_out], shards[-held_out:], bound


def check_packed(urls: Sequence[str], hold_out_by: str, index: str | Path | None = None) -> None:
    """Check that shards were packed in whole groups, so that none is on both sides.

    Raises ValueError: their index, or those beside local shards, say otherwise, or there is none.
    """
    if hold_out_by == FILE:
        return
    beside = {Path(url).with_name(INDEX) for url in urls if is_local(url)}
    places = beside if index is None else {index}
    packed = []
    for place in places:
        if index is not None or Path(place).is_file():
            packed.append(Index.read(place).packed or {})
    if not packed or any(options.get("hold_out_by", FILE) != hold_out_by for options in packed):
        raise ValueError(
            f"{urls[0]}: these shards were not packed by `hold_out_by` {hold_out_by}, so the last "
            "ones may share groups with the others: give it to `olvae data pack`, or set "
            "data.params.val_shards"
        )


def images_listed(
    urls: Sequence[str], index: str | Path | None = None, image_key: str | None = None
) -> list[int]:
    """Look up numbers of images in an index, or in those beside local shards; 0 if not listed."""
    listed: dict[str, int] = {}
    if index is not None:
        given = Index.read(index).shards
        listed = {url: given[file_name(url)].images for url in urls if file_name(url) in given}
        return [listed.get(url, 0) for url in urls]
    for folder in {Path(url).parent for url in urls if is_local(url)}:
        if not (folder / INDEX).is_file():
            continue
        beside = Index.read(folder / INDEX)
        if beside.counts(image_key):
            for name, shard in beside.shards.items():
                listed[str(folder / name)] = shard.images
    return [listed.get(str(Path(url)), 0) for url in urls]


def with_counts(
    urls: Sequence[str], index: str | Path | None = None, image_key: str | None = None
) -> list[Shard]:
    """Look up the shards' numbers of images in an index, or count them in local shards without one.

    Without ``index``, a path or URL of one, the folders of local shards are searched for
    :data:`INDEX`. A local shard that is in no index, and is missing or can't be read, counts as the
    mean of the others. A shard without images gets a warning.

    Raises ValueError: the index is not readable or lacks a shard, no shard has images, or two have
    the same name.
    """
    # Names must differ, because the keys of images begin with them.
    shards: dict[str, Shard] = {}
    for url in urls:
        shard = Shard(url)
        other = shards.setdefault(shard.name, shard)
        if other is not shard:
            raise ValueError(
                f"{other.url} and {url}: shards of the same name, whose images would have the same "
                "keys: rename one of them, take one folder after the other, or make them two "
                "sources of an olvae.data.mix.MixSource"
            )

    # What the index that is given says, which has to list all, or else what is known.
    found: dict[str, Shard]
    if index is None:
        found = known_shards(urls, image_key)
    else:
        read = Index.read(index)
        if not read.counts(image_key):
            raise ValueError(
                f"{index}: is of images of the image_key {read.image_key}, not {image_key}: repeat "
                "`olvae data index` for these"
            )
        given = read.located(str(index), image_key)
        unknown = [url for url in urls if file_name(url) not in given]
        if unknown:
            raise ValueError(
                f"{index}: does not list {unknown[0]}: remove data.params.index, "
                "or pack the shards again"
            )
        found = {url: given[file_name(url)] for url in urls}

    # Some shards may be empty, but not all.
    empty = [url for url in urls if found[url].images == 0]
    if empty:
        wanted = f".{image_key}" if image_key else ", ".join(EXTENSIONS)
        problem = (
            f"a shard without images: no file in it ends in {wanted} "
            "from the first dot of its name on"
        )
        if len(empty) == len(urls):
            raise ValueError(f"{empty[0]}: {problem}")
        for url in empty:
            warn_once(f"skipped {url}: {problem}")
    listed = []
    for url in urls:
        # A command's output has no middle to begin in.
        offsets = None if url.startswith("pipe:") else found[url].offsets
        listed.append(found[url]._replace(url=url, offsets=offsets))
    return listed


def is_begun(folder: Path) -> bool:
    """Whether ``olvae data pack`` has written only some of a folder's shards."""
    return (folder / PACKING).is_dir()


def incomplete(folder: Path) -> str | None:
    """Describe what a folder lacks, by its index or an interrupted packing; None if complete."""
    if is_begun(folder):
        return "its packing was interrupted, so shards are missing: repeat `olvae data pack`"
    try:
        listed = Index.read(folder / INDEX).shards
    except (FileNotFoundError, ValueError):
        return None
    # One listing: asking for each of 100,000 files takes a second, or minutes over a network.
    with os.scandir(folder) as entries:
        here = {entry.name for entry in entries if entry.is_file()}
    gone = sorted(listed.keys() - here)
    if not gone:
        return None
    more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
    return f"shards of {INDEX} are missing: {', '.join(map(printable, gone[:3]))}{more}"


def known_shards(urls: Sequence[str], image_key: str | None = None) -> dict[str, Shard]:
    """Look up local shards in their folders' indexes, or count their images now, by headers.

    Remote shards have no number of images.
    """
    local = {url: os.path.split(url) for url in urls if is_local(url)}
    indexed: dict[str, dict[str, Shard]] = {}
    for folder in {folder for folder, _ in local.values()}:
        place = Path(folder, INDEX)
        indexed[folder] = {}
        if not place.is_file():
            continue
        index = Index.read(place)
        if index.counts(image_key):
            indexed[folder] = index.located(str(place), image_key)

    # A damaged shard has its images before the damage, unless there is none.
    shards = {url: Shard(url) for url in urls}
    for url, (folder, name) in local.items():
        if name in indexed[folder]:
            shards[url] = indexed[folder][name]
        elif Path(url).is_file():
            scanned = scan(url, image_key)
            if len(scanned.offsets) or scanned.error is None:
                shards[url] = Shard(url, len(scanned.offsets))

    # A local shard that can't be counted is taken for one like the others.
    known = [shard.images for shard in shards.values() if shard.images is not None]
    mean = max(1, round(sum(known) / len(known))) if known else 0
    for url in local:
        if shards[url].images is None:
            shards[url] = Shard(url, mean)
    return shards
