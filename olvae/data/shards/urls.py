"""Where shards are: folders, patterns, URLs, commands; and their names."""

import glob
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls

from olvae.files import legible

__all__ = ["SUFFIXES", "file_name", "find_shards", "is_local", "may_be_there", "shard_names", "split_shards", "stem"]


SUFFIXES = (".tar", ".tar.gz", ".tgz")

TAR_NAME = re.compile(r"[^/\s'\"?&=:]+\.(?:tar\.gz|tgz|tar)(?![\w.])")


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Shards of a folder, a pattern with braces or wildcards, a URL, a pipe, or a list of any of these.

    Raises:
        FileNotFoundError: there are none, or they are local and none of them exists.
    """
    given = [str(text) for text in ([shards] if isinstance(shards, str | Path) else shards)]
    urls = [url for text in given for url in _expand(text)]
    if not any(may_be_there(url) for url in urls):
        raise FileNotFoundError(
            f"{', '.join(given) or 'shards'}: no shards: name a folder of .tar files, a pattern such as "
            "data/{000000..000127}.tar, or URLs; `olvae data pack` makes shards of images"
        )
    return urls


def _expand(text: str) -> list[str]:
    text = re.sub("^file:(//)?", "", text)
    path = Path(text).expanduser()
    if path.is_dir():
        return [str(file) for file in sorted(path.iterdir()) if file.name.endswith(SUFFIXES)]
    try:
        expanded = expand_urls(text)
    except AssertionError as error:  # raised by webdataset for an environment variable that is not set
        raise ValueError(f"{text}: {error}") from error
    return [found for url in expanded for found in (_matches(Path(url).expanduser()) if is_local(url) else [url])]


def _matches(path: Path) -> list[str]:
    if glob.has_magic(str(path)) and not path.exists():
        return sorted(glob.glob(str(path)))  # noqa: PTH207  (a Path's own needs the folder apart)
    return [str(path)]


def split_shards(
    shards: list[str], val: list[str] | None, fraction: float, argument: str
) -> tuple[list[str], list[str]]:
    """The shards to train with, and those to validate with: ``val``, or the last ones of all.

    Args:
        fraction: of the shards that is held out where ``val`` is None, at least one of them.
        argument: of the source that names ``val``.

    Raises:
        ValueError: the fraction is not between 0 and 1, or a single shard is to be split.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"val_fraction must be between 0 and 1, got {fraction}")
    if val is not None:
        return shards, val
    if len(shards) < 2:
        raise ValueError(
            f"{shards[0]}: one shard can't be split into training and validation: make smaller ones (--shard-size), "
            f"or set data.params.{argument}"
        )
    held_out = max(1, round(fraction * len(shards)))
    return shards[:-held_out], shards[-held_out:]


def is_local(url: str) -> bool:
    """Whether a shard is a file here, rather than a URL or a pipe."""
    return not (url.startswith("pipe:") or "://" in url or url == "-")


def may_be_there(url: str) -> bool:
    """Whether a shard is a file that exists or, if remote, may exist: only reading it tells."""
    return not is_local(url) or Path(url).is_file()


def file_name(url: str) -> str:
    """The name of a shard's file, even inside a command or before a URL's signature."""
    names = [] if is_local(url) else TAR_NAME.findall(url)
    return names[-1] if names else Path(url).name


def stem(url: str) -> str:
    """The name of a shard's file up to its first dot."""
    return legible(file_name(url).partition(".")[0])


def shard_names(urls: Sequence[str]) -> dict[str, str]:
    """What the keys of each shard's images begin with: its stem or, if another shard has the same, its whole name.

    Raises:
        ValueError: two shards have the same name, so their images would have the same keys.
    """
    stems = {url: stem(url) for url in urls}
    shared = Counter(stems.values())
    names = {url: name if shared[name] == 1 else _whole_name(url, urls) for url, name in stems.items()}
    first: dict[str, str] = {}
    for url, name in names.items():
        if name in first:
            raise ValueError(
                f"{first[name]} and {url}: shards of the same name, whose images would have the same keys: rename "
                "one of them, take one folder after the other, or make them two sources of an olvae.data.mix.MixSource"
            )
        first[name] = url
    return names


def _whole_name(url: str, urls: Sequence[str]) -> str:
    """The name of a shard's file without its extension; of a command that names none, its place among the shards."""
    if not is_local(url) and not TAR_NAME.search(url):
        return f"{urls.index(url)}/{stem(url)}"
    return legible(re.sub(r"\.(tar\.gz|tgz|tar)$", "", file_name(url)))
