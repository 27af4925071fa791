"""Tell from a path what holds images: a folder, shards, a list, a data set on the hub."""

import contextlib
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import yaml

from olvae.config.nodes import Config, ConfigError, arguments_of
from olvae.config.reading import YAML, is_local, merge_files

OF_THIS_PACKAGE = "olvae.data."

FOLDER = f"{OF_THIS_PACKAGE}picture_folder.FolderSource"

SHARDS = f"{OF_THIS_PACKAGE}shards.webdataset.WebDatasetSource"

SAMPLES = f"{OF_THIS_PACKAGE}dataset.SamplePhotographs"

VOLUMES = f"{OF_THIS_PACKAGE}volumes.volume_source.VolumeSource"
SCENE = f"{OF_THIS_PACKAGE}scenes.scene_source.SceneSource"

# Arguments that name the images of a source.
PLACE_KEYS = {"root", "shards", "dataset", "path", "scenes"}

# Arguments that belong to one set of images, and are dropped with it.
DATA_KEYS = (
    "val_root",
    "val_scenes",
    "val_dataset",
    "split",
    "val_split",
    "column",
    "name",
    "data_files",
    "data_dir",
    "revision",
)

# Extensions of shards, and of configs.
SUFFIXES = (".tar", ".tar.gz", ".tgz")

PICTURES = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".webp",
    ".avif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".gif",
)

EXTENSIONS = (*PICTURES, ".npy", ".npz", ".exr")

# Volumes. Files of DICOM often have no extension, or end with a number: byte 128 tells.
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".dcm", ".dicom", ".ima")
DICOM_MARK = (128, b"DICM")


def load(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), resolve: bool = True
) -> Config:
    """Merge config files and overrides, as :func:`merge_files`, and find the data's source.

    If ``data.params`` has a ``root`` or ``shards`` that the source in ``data.target`` does not
    take, or a ``root`` of another kind, the target becomes the source that reads it. Settings that
    both sources take are kept. But if an override changes the ``root``, other parts of the old
    data, such as ``val_root``, are dropped.
    """
    config = merge_files(paths, overrides, resolve)
    data = config.get("data")
    if isinstance(data, dict) and resolve:
        # The params of the data that overrides set: "data.params.root=x" sets "root".
        given = set()
        for item in overrides:
            key = item.partition("=")[0].removeprefix("data.params.")
            given.add(key.partition(".")[0])

        # What the files alone say, to see whether an override of the root names other data.
        before: Config = {}
        if "root" in given:
            below = merge_files(paths, resolve=False).get("data")
            if isinstance(below, dict) and isinstance(below.get("params"), dict):
                before = below["params"]
        config["data"] = _with_matching_source(data, before, given)
    return config


def with_source(config: Config) -> Config:
    """Copy a config that was read from a file, with the source that reads its data."""
    data = config.get("data")
    if not isinstance(data, dict):
        return config
    return {**config, "data": _with_matching_source(data, {}, ())}


def _with_matching_source(node: Config, before: Config, given: Container[str]) -> Config:
    """Switch ``data.target`` to the source that reads the ``root`` or ``shards`` in its params.

    ``given``: params that overrides set. ``before``: params of the files alone, if ``root`` is
    given.
    """
    # Nodes that stay as they are: other packages' sources, mistakes for the check to report, and
    # sources that name no images themselves, such as a mix.
    target = node.get("target")
    params = node.get("params")
    if (
        not isinstance(target, str)
        or not target.startswith(OF_THIS_PACKAGE)
        or not isinstance(params, dict)
    ):
        return node
    try:
        takes = arguments_of(target).parameters
    except ConfigError:
        return node
    if target != SAMPLES and PLACE_KEYS.isdisjoint(takes):
        return node

    # The key that names the images: one that the target does not take, or else the root.
    foreign = [key for key in ("root", "shards") if key in params and key not in takes]
    key = foreign[0] if foreign else "root"
    place = params.get(key)

    # The source that reads this place, and the params that name the place to it.
    if key == "shards":
        source = SHARDS
        naming = {"shards": place}
    elif isinstance(place, str):
        source, naming = find_source(place, volumes=target == VOLUMES)
    else:
        return node

    # If an override names other data than the files, drop what the files say of the old data.
    overridden = "root" in given and before.get("root") != place
    if overridden and any(before.get(name) != value for name, value in naming.items()):
        params = dict(params)
        for name in DATA_KEYS:
            if name in params and name not in given and params[name] == before.get(name):
                del params[name]

    if source == target and key in takes:
        return {**node, "params": params}

    # Another source: keep what it takes too, and unknown keys, which the check should report.
    accepted = arguments_of(source).parameters
    dropped = {"root", "shards", "val_shards", "index"} if key == "root" else {"shards"}
    kept = {}
    for name, value in params.items():
        if name not in dropped and (name in accepted or name not in takes):
            kept[name] = value
    return {**node, "target": source, "params": {**kept, **naming}}


def place_of(data: Config) -> str:
    """Return where a data node's held-out images are: the path it names, or else its target."""
    params = data.get("params") or {}
    for key in (
        "val_root",
        "val_shards",
        "val_scenes",
        "root",
        "shards",
        "scenes",
        "path",
        "folder",
    ):
        if params.get(key):
            return str(params[key])
    return str(data.get("target"))


def find_source(src: str, volumes: bool = False) -> tuple[str, Config]:
    """Return the target of the source that trains on SRC, and the params that name SRC to it.

    ``volumes`` are taken even if there are pictures beside them, or nothing yet.
    See :mod:`olvae.data.opening` for what SRC can be.
    """
    kind, _, rest = src.partition(":")
    if Path(src).suffix in YAML:
        raise ConfigError(
            f"data.params.root: {src} is a config: name the folder, shards or data set to train on"
        )
    if src == "samples":
        return SAMPLES, {}
    if kind == "torchvision":
        name, arguments = _split_arguments(rest)
        node = {"target": f"torchvision.datasets.{name}", "params": arguments}
        return f"{OF_THIS_PACKAGE}hub.TorchvisionSource", {"dataset": node}
    if src.startswith("scenes:"):
        path, arguments = _split_arguments(rest)
        return SCENE, {"scenes": path, **arguments}
    if kind == "hf" and "://" not in src:
        path, arguments = _split_arguments(rest)
        return f"{OF_THIS_PACKAGE}hub.HuggingFaceSource", {"path": path, **arguments}
    if holds_shards(src):
        return SHARDS, {"shards": src}
    if volumes:
        pictures = holds_pictures(Path(src).expanduser())
        volumes = holds_volumes(src, beside_pictures=True) or not pictures
    return VOLUMES if volumes or holds_volumes(src) else FOLDER, {"root": src}


def holds_shards(src: str) -> bool:
    """Whether SRC is tar files: a pattern, a URL, a pipe, or a folder of them.

    A folder that has images at any depth is not one of shards.
    """
    if src.partition(":")[0] in ("torchvision", "hf") and "://" not in src:
        return False
    if src.startswith("scenes:"):
        return False
    path = Path(src).expanduser()
    if not path.is_dir():
        return not is_local(src) or src.endswith(SUFFIXES)

    # The folder itself first, because a walk through a large tree is slow. A folder that can't be
    # opened has no shards.
    tars = False
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if is_image_file(entry.name):
                return False
            tars = tars or is_shard(entry.name)
    return tars and not holds_pictures(path)


def holds_pictures(folder: Path) -> bool:
    """Whether a folder has a picture, at any depth."""
    for *_, names in os.walk(folder):
        for name in names:
            if is_image_file(name):
                return True
    return False


def holds_volumes(src: str, beside_pictures: bool = False) -> bool:
    """Whether SRC is volumes: a file or pattern of them, a list, or a folder that has any.

    A folder that has pictures at any depth is not one of volumes, unless they are allowed.
    """
    path = Path(src).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = (line.strip() for line in file)
            first = next((line for line in lines if line and not line.startswith("#")), "")
        return is_volume_file(str(path.parent / first))
    if not path.is_dir():
        return is_local(src) and is_volume_file(str(path))
    if not beside_pictures and holds_pictures(path):
        return False
    for folder, _, names in os.walk(path):
        for name in names:
            if is_volume_file(os.path.join(folder, name)):  # noqa: PTH118
                return True
    return False


def check_outside(out: Path, src: str) -> None:
    """Raise ConfigError if results would be among the images of a folder, or in one of shards.

    A folder of shards with pictures inside is one of images: see :func:`holds_shards`.
    """
    folder = Path(src).expanduser().resolve()
    if folder.is_dir() and out.resolve().is_relative_to(folder):
        raise ConfigError(
            f"`out` {out}: is inside the images' folder {src}, whose next use would take the "
            "results' pictures for images: choose one beside it"
        )


def is_shard(name: str) -> bool:
    """Whether a file is a shard by its name; not ``._x.tar``, which macOS puts beside x.tar."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


def is_image_file(path: str) -> bool:
    """Whether a file is an image by its name; hidden files are not."""
    return path.lower().endswith(EXTENSIONS) and os.path.basename(path)[0] != "."  # noqa: PTH119


def names_volume(name: str) -> bool:
    """Whether a name is of a volume: a file's by its extension, or a DICOM series' UID."""
    last = name.rpartition("/")[2]
    is_uid = last.count(".") > 1 and last.replace(".", "").isdigit()
    return is_uid or last.lower().endswith(VOLUME_SUFFIXES)


def is_volume_file(path: str) -> bool:
    """Whether a file is a volume, or a slice of one: by its name or, of DICOM, its first bytes."""
    place = Path(path)
    if place.name.startswith(".") or place.name.upper() == "DICOMDIR":
        return False
    if place.name.lower().endswith(VOLUME_SUFFIXES):
        return True
    if place.suffix and not place.suffix[1:].isdigit():
        return False
    start, mark = DICOM_MARK
    with contextlib.suppress(OSError, ValueError), place.open("rb") as file:
        file.seek(start)
        return file.read(len(mark)) == mark
    return False


def _split_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``NAME,key=value,...`` into the name and the arguments; values are YAML."""
    # Commas inside brackets do not separate.
    name, *pairs = re.split(r",(?![^\[{]*[\]}])", text)
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"{text}: {pair} is not key=value")
    arguments = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        arguments[key] = yaml.safe_load(value)
    return name, arguments
