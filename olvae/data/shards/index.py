"""Find shards by folder, pattern or URL, and their numbers of images from ``index.json`` or by counting."""

import contextlib
import glob
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from olvae.config.reading import EXTENSIONS, is_local, is_shard
from olvae.data.dataset import bound_held_out
from olvae.data.shards.tar_reading import SHARD_ERRORS, Shard, file_name, is_image, open_url
from olvae.files import printable, reason, warn_once, write_json

PACKING = ".packing"  # the folder beside shards that ``olvae data pack`` has not finished, with what it continues from
INDEX = "index.json"  # the file beside the shards with the number of images in each; ``olvae data pack`` writes it


@dataclass(frozen=True)
class ShardRecord:
    """A shard's images and, unless it is from elsewhere, the bytes and the SHA-256 of its file."""

    images: int
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Index:
    """The content of ``index.json``."""

    shards: Mapping[str, ShardRecord]  # by file name
    packed: Mapping[str, Any] | None = (
        None  # the options of ``olvae data pack``; None for shards from elsewhere
    )
    plan: str | None = None  # a hash of those options and of the source
    unreadable: Sequence[
        Mapping[str, str]
    ] = ()  # shard, name and reason of the source's images that are in no shard

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards.values())

    @property
    def bytes(self) -> int:
        return sum(shard.bytes or 0 for shard in self.shards.values())

    def write(self, path: Path) -> None:
        """Write the file atomically; the same bytes for the same index."""
        content = {
            "version": 1,
            "images": self.images,
            "bytes": self.bytes,
            "packed": self.packed,
            "plan": self.plan,
        }
        shards = {name: asdict(self.shards[name]) for name in sorted(self.shards)}
        write_json({**content, "unreadable": self.unreadable, "shards": shards}, path)

    @classmethod
    def read(cls, url: str | Path) -> "Index":
        """Read an index by path or URL; raises FileNotFoundError if it is missing, ValueError if it is none."""
        try:
            with contextlib.closing(open_url(str(url))) as stream:
                content = json.loads(b"".join(iter(lambda: stream.read(2**20), b"")))
            shards = {
                name: ShardRecord(int(shard["images"]), shard.get("bytes"), shard.get("sha256"))
                for name, shard in content["shards"].items()
            }
            return cls(
                shards, content.get("packed"), content.get("plan"), content.get("unreadable", ())
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
    """List the shards of a folder, a pattern with braces or wildcards, a URL, a pipe, or a list of any of these.

    Warns of a folder that is :func:`incomplete`.

    Raises FileNotFoundError: there are none, or they are local and none of them exists.
    """
    given = [str(text) for text in ([shards] if isinstance(shards, str | Path) else shards)]
    urls = [url for text in given for url in _expand(text)]
    if not any(may_exist(url) for url in urls):
        raise FileNotFoundError(
            f"{', '.join(given) or 'shards'}: no shards: name a folder of .tar files, a pattern such as "
            "data/{000000..000127}.tar, or URLs; `olvae data pack` makes shards of images"
        )
    return urls


def _expand(text: str) -> list[str]:
    text = re.sub("^file:(//)?", "", text)
    path = Path(text).expanduser()
    if path.is_dir():
        if missing := incomplete(path):
            warn_once(f"{path}: {missing}")
        return [str(file) for file in sorted(path.iterdir()) if is_shard(file.name)]
    try:
        expanded = expand_urls(text)
    except (
        AssertionError
    ) as error:  # raised by webdataset for an environment variable that is not set
        raise ValueError(f"{text}: {error}") from error
    found: list[str] = []
    for url in expanded:
        name = str(Path(url).expanduser()) if is_local(url) else url
        pattern = is_local(url) and glob.has_magic(name) and not Path(name).exists()
        found += sorted(glob.glob(name)) if pattern else [name]  # noqa: PTH207  (a Path's own needs the folder apart)
    return found


def may_exist(url: str) -> bool:
    """Whether a shard is a file that exists or, if remote, may exist: only reading it tells."""
    return not is_local(url) or Path(url).is_file()


def split_shards(
    shards: list[str], val: list[str] | None, fraction: float, argument: str
) -> tuple[list[str], list[str]]:
    """Split shards for training and validation: ``val``, or else the last ones, a ``fraction`` but at least one.

    ``argument`` of the source names ``val``. ValueError if the fraction is not between 0 and 1, or there is one shard.
    """
    held_out = bound_held_out(fraction * len(shards), len(shards), fraction)
    if val is not None:
        return shards, val
    if len(shards) < 2:
        raise ValueError(
            f"{shards[0]}: one shard can't be split into training and validation: make smaller ones (`shard_size` "
            f"of `olvae data pack` and `olvae encode`), or set data.params.{argument}"
        )
    return shards[:-held_out], shards[-held_out:]


def with_counts(
    urls: Sequence[str], index: str | Path | None = None, image_key: str | None = None
) -> list[Shard]:
    """Look up the numbers of images of shards in an index, or count them in local shards that have none.

    Without ``index``, a path or URL of one, the folders of local shards are searched for :data:`INDEX`. A local shard
    that is in no index, and is missing or can't be read, counts as the mean of the others. One without images is named
    in a warning. ValueError if the index is not readable or lacks a shard, no shard has images, or two have one name.
    """
    shards: dict[str, Shard] = {}
    for url in urls:
        other = shards.setdefault((shard := Shard(url)).name, shard)
        if other is not shard:
            raise ValueError(
                f"{other.url} and {url}: shards of the same name, whose images would have the same keys: rename one of "
                "them, take one folder after the other, or make them two sources of an olvae.data.mix.MixSource"
            )
    counts: dict[str, int | None]
    if index is not None:
        given = Index.read(index).shards
        if unknown := [url for url in urls if file_name(url) not in given]:
            raise ValueError(
                f"{index}: does not list {unknown[0]}: remove data.params.index, or pack the shards again"
            )
        counts = {url: given[file_name(url)].images for url in urls}
    else:
        counts = counts_beside(urls, image_key)
    if empty := [url for url in urls if counts[url] == 0]:
        wanted = f".{image_key}" if image_key else ", ".join(EXTENSIONS)
        problem = f"a shard without images: no file in it ends in {wanted} from the first dot of its name on"
        if len(empty) == len(urls):
            raise ValueError(f"{empty[0]}: {problem}")
        for url in empty:
            warn_once(f"skipped {url}: {problem}")
    return [Shard(url, counts[url]) for url in urls]


def is_begun(folder: Path) -> bool:
    """Whether ``olvae data pack`` has written only some of a folder's shards."""
    return (folder / PACKING).is_dir()


def incomplete(folder: Path) -> str | None:
    """Say what a folder of shards lacks: those of its index, or of a packing that was interrupted; None if nothing."""
    if is_begun(folder):
        return "its packing was interrupted, so shards are missing: repeat `olvae data pack`"
    try:
        gone = sorted(
            name for name in Index.read(folder / INDEX).shards if not (folder / name).is_file()
        )
    except (FileNotFoundError, ValueError):
        return None
    more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
    return (
        f"shards of {INDEX} are missing: {', '.join(map(printable, gone[:3]))}{more}"
        if gone
        else None
    )


def counts_beside(urls: Sequence[str], image_key: str | None = None) -> dict[str, int | None]:
    """Numbers of images in local shards by the indexes in their folders, or counted now; None for remote shards."""
    local = {url: Path(url) for url in urls if is_local(url)}
    folders = [
        folder for folder in {path.parent for path in local.values()} if (folder / INDEX).is_file()
    ]
    indexed = {
        folder / name: shard
        for folder in folders
        for name, shard in Index.read(folder / INDEX).shards.items()
    }
    counts: dict[str, int | None] = dict.fromkeys(urls)
    for url, path in local.items():
        if path in indexed:
            counts[url] = indexed[path].images
        elif path.is_file():
            counts[url] = count_images(path, image_key)
    known = [count for count in counts.values() if count is not None]
    mean = max(1, round(sum(known) / len(known))) if known else 0
    return {url: mean if url in local and n is None else n for url, n in counts.items()}


def count_images(path: Path, image_key: str | None = None) -> int | None:
    """Count a local shard's images by its headers, up to where it is damaged; None if that is at its beginning."""
    count, last, whole = 0, None, False
    with contextlib.suppress(*SHARD_ERRORS), tarfile.open(path, "r:*") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # which would hold the headers of all
            key, extension = base_plus_ext(member.name)
            if (
                key not in (None, last)
                and member.isreg()
                and is_image(extension.lower(), image_key)
            ):
                count, last = count + 1, key
        whole = True
    return count if count or whole else None
