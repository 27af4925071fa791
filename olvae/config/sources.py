"""Load a config whose data are named by a path alone: a folder, a list, shards or a data set."""

import contextlib
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import yaml

from olvae.config.nodes import arguments_of
from olvae.config.reading import Config, ConfigError, merge_files

OF_THIS_PACKAGE = "olvae.data."
FOLDER, SHARDS = f"{OF_THIS_PACKAGE}picture_folder.FolderSource", f"{OF_THIS_PACKAGE}shards.webdataset.WebDatasetSource"
SAMPLES = f"{OF_THIS_PACKAGE}dataset.SamplePhotographs"
PLACES = {"root", "shards", "dataset", "path"}  # arguments that name the images of a source
PARTS = ("val_root", "val_dataset", "split", "val_split", "column", "name", "data_files", "data_dir", "revision")
SUFFIXES = (".tar", ".tar.gz", ".tgz")  # of shards
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".npy", ".npz", ".exr")


def load(paths: Sequence[str | Path], overrides: Sequence[str] = (), resolve: bool = True) -> Config:
    """Merge config files and overrides, as :func:`~olvae.config.reading.merge_files`, and find the data's source.

    Where ``data.params`` has a ``root`` or ``shards`` that the source of ``data.target`` does not take, or a ``root``
    of another kind, the target becomes the source that reads it; settings that both sources take are kept, but
    for other parts of the old data, such as ``val_root``, where an override changes the ``root``.
    """
    config = merge_files(paths, overrides, resolve)
    data = config.get("data")
    if isinstance(data, dict) and resolve:
        given = {item.partition("=")[0].removeprefix("data.params.").partition(".")[0] for item in overrides}
        below = merge_files(paths, resolve=False).get("data") if "root" in given else None
        before = below.get("params") if isinstance(below, dict) else None
        config["data"] = _of_its_place(data, before if isinstance(before, dict) else {}, given)
    return config


def _of_its_place(node: Config, before: Config, given: Container[str]) -> Config:
    """The node of the source that reads what a node's params name; the node itself if that is its own.

    ``given`` are the params that overrides name; ``before`` those without overrides, if ``root`` is given.
    """
    target, params = node.get("target"), node.get("params")
    if not (isinstance(target, str) and target.startswith(OF_THIS_PACKAGE) and isinstance(params, dict)):
        return node
    try:
        old = arguments_of(target)
    except ConfigError:  # a mistake in the target, for the check
        return node
    takes = old.parameters if old is not None else {}
    if target != SAMPLES and PLACES.isdisjoint(takes):  # a mix of sources, say: a key it lacks is for the check
        return node
    key = next((key for key in ("root", "shards") if key in params and key not in takes), "root")
    place = params.get(key)
    if key == "shards":
        new, named = SHARDS, {key: place}
    elif isinstance(place, str):
        new, named = find_source(place)
    else:
        return node
    if "root" in given and before.get("root") != place and any(before.get(n) != v for n, v in named.items()):
        params = {n: v for n, v in params.items() if n in given or n not in PARTS or v != before.get(n)}
    if new == target and key in takes:
        return {**node, "params": params}
    found = arguments_of(new)
    accepted = {} if found is None else found.parameters
    dropped = {key, "shards", "val_shards", "index"} if key == "root" else {key}  # another place's parts
    kept = {n: v for n, v in params.items() if n not in dropped and (n in accepted or n not in takes)}
    return {**node, "target": new, "params": {**kept, **named}}


def find_source(src: str) -> tuple[str, Config]:
    """The target of the source that trains on SRC (see :mod:`olvae.data.opening`), and the params that name SRC.

    Raises ConfigError: SRC is a config, or its arguments are no ``key=value``.
    """
    kind, _, rest = src.partition(":")
    if Path(src).suffix in (".yaml", ".yml"):
        raise ConfigError(f"data.params.root: {src} is a config: name the folder, shards or data set to train on")
    if src == "samples":
        return SAMPLES, {}
    if kind == "torchvision":
        name, arguments = _split_arguments(rest)
        node = {"target": f"torchvision.datasets.{name}", "params": arguments}
        return f"{OF_THIS_PACKAGE}hub.TorchvisionSource", {"dataset": node}
    if kind == "hf" and "://" not in src:
        path, arguments = _split_arguments(rest)
        return f"{OF_THIS_PACKAGE}hub.HuggingFaceSource", {"path": path, **arguments}
    return (SHARDS, {"shards": src}) if holds_shards(src) else (FOLDER, {"root": src})


def holds_shards(src: str) -> bool:
    """Whether SRC names tar files: a folder of them that has no images at any depth, a pattern, a URL, a pipe."""
    if src.partition(":")[0] in ("torchvision", "hf") and "://" not in src:
        return False
    path = Path(src).expanduser()
    if path.is_dir():
        tars = False
        with contextlib.suppress(OSError), os.scandir(path) as entries:  # none if the folder can't be opened
            for entry in entries:
                if entry.name.lower().endswith(EXTENSIONS):
                    return False
                tars = tars or entry.name.endswith(SUFFIXES)
        return tars and not any(name.lower().endswith(EXTENSIONS) for *_, names in os.walk(path) for name in names)
    return not is_local(src) or src.endswith(SUFFIXES)


def is_local(url: str) -> bool:
    """Whether a shard is a local file, rather than a URL or a pipe."""
    return not (url.startswith("pipe:") or "://" in url)


def _split_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments in ``NAME,key=value,...``; values are YAML."""
    name, *pairs = re.split(r",(?![^\[{]*[\]}])", text)  # commas inside a list do not separate
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise ConfigError(f"{text}: {bad[0]} is not key=value")
    split = [pair.partition("=") for pair in pairs]
    return name, {key: yaml.safe_load(value) for key, _, value in split}
