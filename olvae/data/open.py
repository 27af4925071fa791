"""SRC, as commands take it: a folder, shards, a list, a data set, a config; all the images in it."""

import re
from pathlib import Path
from typing import Any

import yaml

from olvae.config import Config, ConfigError, instantiate, load
from olvae.data.errors import ReadError
from olvae.data.mapped.base import ImageDataset, MappedSource
from olvae.data.mapped.folder import Files, find_images
from olvae.data.mapped.samples import SamplePhotographs, sample_photographs
from olvae.data.shards.urls import SUFFIXES, is_local
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import Source
from olvae.data.transforms import RandomScaleCrop

__all__ = ["SRC", "evaluation_source", "holds_shards", "list_images", "source_of"]


SRC = (
    "a folder of images or of .tar shards, a pattern or URL of either, a .txt list of files, samples, "
    "torchvision:CIFAR10,root=data,train=false, hf:cifar10,split=test,column=img, or a config.yaml"
)
"""What may stand for SRC, for help texts and errors."""


def evaluation_source(src: str, size: int, batch_size: int, num_workers: int = 0, channels: int = 3) -> Source:
    """A source whose test images are all the images of SRC; of a config, those that it tests with.

    Images that can't be read are skipped and counted, however many they are.

    Raises:
        ConfigError: SRC is none of :data:`SRC`.
        FileNotFoundError, ValueError: it has no images.
    """
    if Path(src).suffix in (".yaml", ".yml"):
        return _of_config(src)
    if src == "samples":
        return SamplePhotographs(size, min(batch_size, 64), num_workers)
    if holds_shards(src):
        return WebDatasetSource(src, size, 1, num_workers, val_shards=src, channels=channels, max_unreadable=1.0)
    images = list_images(src, channels)
    crop = RandomScaleCrop(size)
    return MappedSource(images, images, images, crop, size, 1, num_workers, channels=channels, max_unreadable=1.0)


def source_of(config: Config, src: str | None = None, size: int | None = None, channels: int = 3) -> Source:
    """The images to evaluate a model on: those of SRC if it is given, else the test images of the model's config.

    Args:
        size: of the images; by default the config's, else 256.

    Raises:
        ConfigError: there is neither, or the config's data are no source.
    """
    node = dict(config.get("data") or {})
    params = dict(node.get("params") or {})
    if src is not None:
        return evaluation_source(src, size or params.get("size") or 256, 1, params.get("num_workers", 0), channels)
    if not node:
        raise ConfigError("its config has no data to take images from: add --data SRC")
    if size is not None:
        params["size"] = size
    return _source({**node, "params": params}, "data.target")


def list_images(src: str, channels: int = 3) -> ImageDataset:
    """The images of a SRC whose images can be asked for by number: of any but shards and configs.

    Raises:
        ConfigError: SRC is none of them.
        FileNotFoundError, ValueError: it has no images.
    """
    kind, _, rest = src.partition(":")
    if src == "samples":
        return sample_photographs()
    if kind == "torchvision":
        from olvae.data.mapped.torchvision import Items

        name, arguments = _arguments(rest)
        return Items(instantiate({"target": f"torchvision.datasets.{name}", "params": arguments}), None, channels)
    if kind == "hf":
        from olvae.data.mapped.huggingface import Column, load_table

        path, arguments = _arguments(rest)
        column = str(arguments.pop("column", "image"))
        return Column(load_table(path, **{"split": "train", **arguments}), column, None, channels)
    if holds_shards(src):
        raise ConfigError(f"{src}: these are shards already")
    closed: list[ReadError] = []
    return Files(find_images(src, closed), channels, closed)


def holds_shards(src: str) -> bool:
    """Whether SRC names tar files: a folder of them, a pattern, a URL, a pipe."""
    if src.partition(":")[0] in ("torchvision", "hf") and "://" not in src:
        return False
    path = Path(src).expanduser()
    if path.is_dir():
        try:
            return any(file.name.endswith(SUFFIXES) for file in path.iterdir())
        except OSError:  # told when its images are looked for
            return False
    return not is_local(src) or src.endswith(SUFFIXES)


def _of_config(path: str) -> Source:
    config = load([path])
    if "data" not in config:
        raise ConfigError(f"{path}: has no data")
    return _source(config["data"], f"{path}: data.target")


def _source(node: Config, where: str) -> Source:
    source = instantiate(node)
    if not isinstance(source, Source):
        raise ConfigError(f"{where}: {node['target']} is not a source of images")
    return source


def _arguments(text: str) -> tuple[str, dict[str, Any]]:
    """``NAME,key=value,...`` as the name and the values, which are read as YAML."""
    name, *pairs = re.split(r",(?![^\[{]*[\]}])", text)  # not at the commas of a list
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise ConfigError(f"{text}: {bad[0]} is not key=value")
    split = [pair.partition("=") for pair in pairs]
    return name, {key: yaml.safe_load(value) for key, _, value in split}
