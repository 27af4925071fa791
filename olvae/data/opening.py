"""Open SRC, the data argument of commands, and the test images of a run.

It is a folder of images or of .tar shards, a pattern or URL of either, a .txt list of files,
``samples``, ``torchvision:CIFAR10,root=data,train=false``, ``hf:cifar10,split=test,column=img``,
``scenes:FOLDER,tile=256,max_nodata=0.1``, or a config.yaml.
"""

import contextlib
import glob
from dataclasses import replace
from pathlib import Path
from typing import Any

from olvae.config import Config, ConfigError, instantiate
from olvae.config.reading import YAML, is_local
from olvae.data.dataset import (
    ImageDataset,
    MappedSource,
    SamplePhotographs,
    groups_of,
    sample_photographs,
)
from olvae.data.hub import Column, Items, load_table
from olvae.data.image import RandomScaleCrop, are_for_masks
from olvae.data.order.groups import usual_grouping
from olvae.data.picture_folder import (
    Files,
    find_folder,
    find_images,
    find_parts,
    has_images,
    naming_folder,
    say_parts,
    split_folders,
)
from olvae.data.pixels.size_and_range import AS_STORED, EIGHT_BITS, PixelRange, Size
from olvae.data.places import find_source, holds_shards, holds_volumes, load
from olvae.data.read_errors import ReadError
from olvae.data.scenes.scene_source import open_tiles
from olvae.data.shards.index import share_indexes
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import Source
from olvae.data.volumes.volume_source import VolumeSlices, find_volumes, neighbours_of
from olvae.files import warn_once
from olvae.runs import present_data


def open_source(
    src: str,
    size: Size,
    batch_size: int,
    num_workers: int = 0,
    channels: int = 3,
    pixel_range: PixelRange = EIGHT_BITS,
    resized: bool = False,
) -> Source:
    """Make a source that validates on the images of SRC; for a config, its own source.

    They are all images, but of a folder with training and validation images the latter; a part
    without images gives way to the other. A config's images keep the config's size unless
    ``resized``. Unreadable images are skipped and counted, however many they are, unless a config
    says otherwise.

    Raises ConfigError: SRC is not one of these. FileNotFoundError, ValueError: it has no images.
    """
    share_indexes(src)
    if Path(src).suffix in YAML:
        config = load([src])
        if "data" not in config:
            raise ConfigError(f"{src}: has no data")
        return _build(present_data(config), f"{src}: data.target", size if resized else None)
    if src == "samples":
        return SamplePhotographs(size, min(batch_size, 64), num_workers)
    common: dict[str, Any] = {
        "channels": channels,
        "max_unreadable": 1.0,
        "range": pixel_range.as_node(),
    }
    if holds_shards(src):
        return WebDatasetSource(src, size, 1, num_workers, val_shards=src, **common)

    # The two parts of a folder; one without images gives way to the other. Else all of it.
    parts: list[ImageDataset] = []
    train, held_out = split_folders(src)
    if src.startswith("scenes:"):
        parts.append(open_images(src, channels, pixel_range, size))
    elif held_out is not None:
        rule = "{train} is evaluated, as {val} has no images"
        for part in (train, held_out):
            with contextlib.suppress(FileNotFoundError):
                parts.append(open_images(str(part), channels, pixel_range))
                if part == held_out:
                    rule = "{val} is evaluated, and {train} is for training"
        if parts:
            say_parts(src, rule)
    if not parts:
        parts.append(open_images(src, channels, pixel_range))
    crop = RandomScaleCrop(size)
    return MappedSource(parts[0], parts[-1], crop, 1, num_workers, **common)


def open_test_source(
    config: Config,
    src: str | None = None,
    size: Size | None = None,
    channels: int = 3,
    pixel_range: PixelRange = EIGHT_BITS,
    usual: Size = 256,
) -> Source:
    """Make the source to evaluate a model on: SRC if given, else the data of the model's config.

    Without ``size``, images have the size in the config's data, or else ``usual``. ``pixel_range``
    is for a SRC that is no config. SRC is resized by nearest if the config's images are masks.

    Raises ConfigError: there is neither, or the config's data are not a source.
    """
    params = dict((config.get("data") or {}).get("params") or {})
    if src is None:
        if not config.get("data"):
            raise ConfigError("the first target has no data to take images from: set `data`")
        return _build(present_data(config), "data.target", size)
    usual = size or params.get("size") or usual
    workers = params.get("num_workers", 0)
    source = open_source(src, usual, 1, workers, channels, pixel_range, resized=size is not None)
    if holds_masks(params):
        source.eval_transform = replace(source.eval_transform, resample="nearest")

    # Intervals go by the groups of training's config, where the names are of its kind.
    if isinstance(source, MappedSource) and Path(src).suffix not in YAML:
        grouping = usual_grouping(params.get("hold_out_by"))
        try:
            groups_of(source.val, grouping)
            source.grouping = grouping
        except ValueError as error:
            warn_once(f"{src}: intervals are over single images: {error}")
    return source


def evaluated_place(src: str) -> str:
    """The place whose images SRC evaluates: of a folder with both parts the validation images.

    They give way to the training images where there are none.
    """
    train, held_out = split_folders(src)
    if held_out is None:
        return src
    return str(next(filter(has_images, (held_out, train)), held_out))


def trains_on(config: Config, src: str) -> bool:
    """Whether images that SRC evaluates, a path, a pattern or a list, are a config's for training.

    Single shards of these data are not noticed.
    """
    scenes = src.startswith("scenes:")
    if scenes:
        src = find_source(src)[1]["scenes"]
    if src == "samples" or ":" in src or Path(src).suffix in YAML:
        return False
    evaluated = src if scenes else evaluated_place(src)
    given = Path(evaluated).expanduser().resolve()
    params = (config.get("data") or {}).get("params") or {}

    # All places that the config's source, or the sources that it mixes, train on.
    nodes = [params, *(node.get("params") or {} for node in _mixed(params))]
    named: list[tuple[str, str]] = []
    for node in nodes:
        if isinstance(node.get("root"), str) and _trains_on_files(node, evaluated):
            return True
        for name in ("root", "shards", "folder", "scenes"):
            places = node.get(name)
            if not isinstance(places, list):
                places = [places]
            for place in places:
                if isinstance(place, str) and is_local(place):
                    named.append((name, place))

    # A place inside SRC counts, and SRC inside a folder that is searched at any depth; of a list
    # its files alone.
    if given.suffix == ".txt" and not given.is_dir():
        return False
    for name, place in named:
        trained = Path(split_folders(place)[0]).expanduser().resolve()
        if trained.is_relative_to(given) or (
            name in ("root", "scenes") and given.is_relative_to(trained)
        ):
            return True
    return False


def _trains_on_files(node: Config, src: str) -> bool:
    """Whether a folder source trains on a file of SRC, if one of the two is a list or a pattern."""
    places = [Path(place).expanduser() for place in (node["root"], src)]
    if not any(place.suffix == ".txt" or glob.has_magic(str(place)) for place in places):
        return False
    # The files may be gone, or there may be none.
    with contextlib.suppress(OSError, ValueError):
        names = ("val_root", "val_fraction", "hold_out_by")
        given = {name: node[name] for name in names if name in node}
        parts = find_parts(node["root"], **given)
        trained = {path.resolve() for path in parts[0]}
        return any(path.resolve() in trained for path in find_images(src))
    return False


def holds_masks(params: Config) -> bool:
    """Whether a source with these arguments has masks, which evaluation resizes by nearest."""
    parts = [node.get("params") or {} for node in _mixed(params)] or [params]
    return all(are_for_masks(part.get("filters") or ()) for part in parts)


def _resized(node: Config, size: Size) -> Config:
    """A source's node with another size, also in those that it mixes."""
    params = {**(node.get("params") or {}), "size": size}
    mixed = _mixed(params)
    if mixed:
        params["sources"] = [_resized(part, size) for part in mixed]
    return {**node, "params": params}


def _mixed(params: Config) -> list[Config]:
    """The nodes that a source mixes; ``sources`` may mean something else to a user's source."""
    sources = params.get("sources")
    if isinstance(sources, list) and all(isinstance(part, dict) for part in sources):
        return sources
    return []


def open_training_images(
    src: str,
    channels: int = 3,
    pixel_range: PixelRange = EIGHT_BITS,
    size: Size | None = None,
) -> ImageDataset:
    """As :func:`open_images`, but of a folder with both parts the training images alone."""
    train, held_out = split_folders(src)
    if held_out is not None:
        say_parts(src, "takes {train}, and {val} is held out: {path} takes that")
        src = str(train)
    return open_images(src, channels, pixel_range, size)


def open_images(
    src: str,
    channels: int = 3,
    pixel_range: PixelRange = EIGHT_BITS,
    size: Size | None = None,
) -> ImageDataset:
    """All images of SRC by number, whole. SRC is anything but shards and configs.

    Tiles of scenes have ``size``, unless SRC says another.

    Raises the errors of :func:`open_source`.
    """
    kind = src.partition(":")[0]
    if src == "samples":
        if pixel_range != AS_STORED:
            pixel_range.check_data(EIGHT_BITS)
        return sample_photographs(channels=channels)
    if kind == "torchvision":
        return Items(instantiate(find_source(src)[1]["dataset"]), channels, pixel_range)
    if kind == "hf" and "://" not in src:
        arguments = {"split": "train", "column": "image", **find_source(src)[1]}
        column = str(arguments.pop("column"))
        return Column(load_table(**arguments), column, channels, pixel_range)
    if src.startswith("scenes:"):
        return open_tiles(find_source(src)[1], channels, pixel_range, size)
    if holds_shards(src):
        raise ConfigError(f"{src}: these are shards already")
    closed: list[ReadError] = []
    if holds_volumes(src):
        neighbours = neighbours_of(channels)
        return VolumeSlices(find_volumes(src, closed), pixel_range, neighbours=neighbours)
    paths = find_images(src, closed)
    return Files(paths, channels, closed, pixel_range, find_folder(src), naming_folder(src))


def _build(node: Config, where: str, size: Size | None = None) -> Source:
    share_indexes(node)
    source = instantiate(node if size is None else _resized(node, size))
    if not isinstance(source, Source):
        raise ConfigError(f"{where}: {node['target']} is not a source of images")
    return source
