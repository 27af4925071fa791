"""Where a run's data are, from any folder.

A relative path is one of the folder that the run was started in. The run's config.yaml has it absolute, and in
``run.paths`` as it was written.
"""

import glob
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from olvae.config import Config, with_paths
from olvae.data.shards.urls import is_local

__all__ = ["make_absolute", "moves", "where_it_is"]

log = logging.getLogger("olvae.data")


def make_absolute(config: Config) -> dict[str, str]:
    """Make the relative paths of a config's data absolute, in place; returns them as written, by their absolute ones.

    Only those that lead somewhere from this folder are paths here: others are URLs, commands, ids of the hub.
    """
    written: dict[str, str] = {}

    def change(text: str) -> str:
        if Path(text).expanduser().is_absolute() or not _is_there(text):
            return text
        folder = str(Path.cwd()) if Path(text).exists() else glob.escape(str(Path.cwd()))
        written[full := str(Path(folder, text))] = text
        return full

    config["data"] = with_paths(config["data"], change)
    return written


def where_it_is(config: Config) -> Config:
    """The ``data`` of a config with the places where they are now; see :func:`moves`."""
    found = moves(config)
    return with_paths(config["data"], lambda text: found.get(text, text))


def moves(config: Config) -> dict[str, str]:
    """The data that are no longer where they were when the run was started, and their places in this folder.

    Raises:
        FileNotFoundError: they are not in this folder either.
    """
    written = (config.get("run") or {}).get("paths") or {}
    downloaded = _is_downloaded(config["data"])
    found: dict[str, str] = {}

    def look(text: str) -> str:
        if text in written and not _is_there(text):
            here = str(Path.cwd() / written[text])
            if _is_there(written[text]):
                _tell(text, here)
                found[text] = here
            elif not downloaded:  # else it is fetched again
                raise FileNotFoundError(
                    f"{text}: this run's data are not there any more, nor are they {here}: name others"
                )
        return text

    with_paths(config["data"], look)
    return found


def _is_downloaded(part: Any) -> bool:
    """Whether a data set somewhere in a node is told to fetch itself, as torchvision's are."""
    if isinstance(part, Mapping):
        return bool(part.get("download")) or any(map(_is_downloaded, part.values()))
    return isinstance(part, list) and any(map(_is_downloaded, part))


@cache
def _tell(before: str, now: str) -> None:
    log.warning("%s: this run's data are not there any more: taken from %s", before, now)


def _is_there(text: str) -> bool:
    """Whether a path leads to something, or a pattern, of files or of shards, to anything."""
    if not is_local(text) or Path(text).expanduser().exists():
        return is_local(text)
    try:
        return any(True for pattern in expand_urls(text) for _ in glob.iglob(pattern, recursive=True))  # noqa: PTH207
    except (AssertionError, ValueError):  # an environment variable that is not set, braces that do not close
        return False
