"""Where shards are: folders, patterns, URLs, commands; and what they are called."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls

from olvae.files import legible

__all__ = ["SUFFIXES", "file_name", "find_shards", "is_local", "labels_of", "local_path", "may_be_there", "stem"]


SUFFIXES = (".tar", ".tar.gz", ".tgz")

TAR_NAME = re.compile(r"[^/\s'\"?&=:]+\.(?:tar\.gz|tgz|tar)(?![\w.])")

PART = re.compile(r"[^/\s'\"?&=:]+")


def find_shards(shards: str | Sequence[str]) -> list[str]:
    """Shards of a folder, a pattern with braces or wildcards, a URL, a pipe, or a list of any of these.

    Raises:
        FileNotFoundError: there are none; of local ones, none that exist.
    """
    given = [shards] if isinstance(shards, str) else list(shards)
    urls = [url for text in given for url in _expand(text)]
    if not any(may_be_there(url) for url in urls):
        raise FileNotFoundError(
            f"{', '.join(given) or 'shards'}: no shards: name a folder of .tar files, a pattern such as "
            "data/{000000..000127}.tar, or URLs; `olvae data pack` makes shards of images"
        )
    return urls


def _expand(text: str) -> list[str]:
    path = Path(text).expanduser()
    if path.is_dir():
        return [str(file) for file in sorted(path.iterdir()) if file.name.endswith(SUFFIXES)]
    try:
        expanded = expand_urls(text)
    except AssertionError as error:  # webdataset's word for an environment variable that is not set
        raise ValueError(f"{text}: {error}") from error
    urls = [str(Path(url).expanduser()) if is_local(url) else url for url in expanded]
    return [found for url in urls for found in _matches(url)]


def _matches(url: str) -> list[str]:
    if is_local(url) and glob.has_magic(url) and not Path(url).exists():
        return sorted(glob.glob(url))  # noqa: PTH207  (a Path's own needs the folder apart)
    return [url]


def is_local(url: str) -> bool:
    """Whether a shard is a file here, rather than a URL or a pipe."""
    return url.startswith("file:") or not (url.startswith("pipe:") or "://" in url or url == "-")


def may_be_there(url: str) -> bool:
    """Whether a shard is a file that exists, or remote, so that only reading it tells."""
    return not is_local(url) or Path(local_path(url)).is_file()


def local_path(url: str) -> str:
    return url.removeprefix("file:").replace("//", "/", 1) if url.startswith("file:") else url


def file_name(url: str) -> str:
    """The name of a shard's file, also where it is in the middle of a command or has a signature behind it."""
    names = [] if is_local(url) else TAR_NAME.findall(url)
    return names[-1] if names else Path(local_path(url)).name


def stem(url: str) -> str:
    """The name of a shard's file up to its first dot."""
    return legible(file_name(url).partition(".")[0])


def labels_of(urls: Sequence[str]) -> dict[str, str]:
    """For shards of one stem as much of their paths as tells them apart, else their number."""
    alike: dict[str, list[str]] = {}
    for url in dict.fromkeys(urls):
        alike.setdefault(stem(url), []).append(url)
    labels: dict[str, str] = {}
    for group in (group for group in alike.values() if len(group) > 1):
        paths = [_path(url) for url in group]
        names = [["/".join(path[-length:]) for path in paths] for length in range(1, max(map(len, paths)) + 1)]
        names.append([f"{urls.index(url)}/{path[-1]}" for url, path in zip(group, paths, strict=True)])
        chosen = next(n for n in names if len(set(n)) == len(group))
        labels.update(zip(group, map(legible, chosen), strict=True))
    return labels


def _path(url: str) -> list[str]:
    """Folders, and the file's name without its extension."""
    name = file_name(url)
    folders = [part for part in PART.findall(url.rpartition(name)[0]) if part.strip(".")]
    return [*folders, re.sub(r"\.(tar\.gz|tgz|tar)$", "", name)]
