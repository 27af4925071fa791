"""Load a config: files over each other with what they include, and the source that reads the data they name."""

import contextlib
import difflib
import os
import re
import typing
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olvae.config.nodes import TOP_LEVEL, Config, ConfigError, arguments_of, nearest
from olvae.files import atomic_write, reason

ABSENT = object()  # in place of a value that a config does not have
RECIPES = Path(__file__).parent.parent / "recipes"
CONFIG_BYTES = 2**21  # the largest config that is read; the longest recipe has 5 kB

OF_THIS_PACKAGE = "olvae.data."
FOLDER, SHARDS = (
    f"{OF_THIS_PACKAGE}picture_folder.FolderSource",
    f"{OF_THIS_PACKAGE}shards.webdataset.WebDatasetSource",
)
SAMPLES = f"{OF_THIS_PACKAGE}dataset.SamplePhotographs"
PLACE_KEYS = {"root", "shards", "dataset", "path"}  # arguments that name the images of a source
DATA_KEYS = (
    "val_root",
    "val_dataset",
    "split",
    "val_split",
    "column",
    "name",
    "data_files",
    "data_dir",
    "revision",
)
SUFFIXES = (".tar", ".tar.gz", ".tgz")  # of shards
YAML = (".yaml", ".yml")  # of configs
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


def load(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), resolve: bool = True
) -> Config:
    """Merge config files and overrides, as :func:`merge_files`, and find the data's source.

    Where ``data.params`` has a ``root`` or ``shards`` that the source of ``data.target`` does not take, or a ``root``
    of another kind, the target becomes the source that reads it; settings that both sources take are kept. But where
    an override changes the ``root``, other parts of the old data, such as ``val_root``, are dropped.
    """
    config = merge_files(paths, overrides, resolve)
    data = config.get("data")
    if isinstance(data, dict) and resolve:
        given = {
            item.partition("=")[0].removeprefix("data.params.").partition(".")[0]
            for item in overrides
        }
        below = merge_files(paths, resolve=False).get("data") if "root" in given else None
        before = below.get("params") if isinstance(below, dict) else None
        config["data"] = _with_matching_source(
            data, before if isinstance(before, dict) else {}, given
        )
    return config


def _with_matching_source(node: Config, before: Config, given: Container[str]) -> Config:
    """Replace a data node's target by the source that reads what its params name, if its own does not.

    ``given`` are the params that overrides name; ``before`` those without overrides, if ``root`` is given.
    """
    target, params = node.get("target"), node.get("params")
    if not (
        isinstance(target, str) and target.startswith(OF_THIS_PACKAGE) and isinstance(params, dict)
    ):
        return node
    try:
        takes = arguments_of(target).parameters
    except ConfigError:  # a mistake in the target, for the check
        return node
    if target != SAMPLES and PLACE_KEYS.isdisjoint(
        takes
    ):  # a mix of sources, say: a key it lacks is for the check
        return node
    key = next((key for key in ("root", "shards") if key in params and key not in takes), "root")
    place = params.get(key)
    if key == "shards":
        new, named = SHARDS, {key: place}
    elif isinstance(place, str):
        new, named = find_source(place)
    else:
        return node
    if (
        "root" in given
        and before.get("root") != place
        and any(before.get(n) != v for n, v in named.items())
    ):
        params = {
            n: v
            for n, v in params.items()
            if n in given or n not in DATA_KEYS or v != before.get(n)
        }
    if new == target and key in takes:
        return {**node, "params": params}
    accepted = arguments_of(new).parameters
    dropped = (
        {key, "shards", "val_shards", "index"} if key == "root" else {key}
    )  # another place's parts
    kept = {
        n: v for n, v in params.items() if n not in dropped and (n in accepted or n not in takes)
    }
    return {**node, "target": new, "params": {**kept, **named}}


def place_of(data: Config) -> str:
    """Where a node's held-out images are: the path that it names, or else its target."""
    params = data.get("params") or {}
    keys = ("val_root", "val_shards", "root", "shards", "path", "folder")
    return str(next((params[key] for key in keys if params.get(key)), data.get("target")))


def find_source(src: str) -> tuple[str, Config]:
    """The target of the source that trains on SRC (see :mod:`olvae.data.opening`), and the params that name SRC."""
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
        with (
            contextlib.suppress(OSError),
            os.scandir(path) as entries,
        ):  # none if the folder can't be opened
            for entry in entries:
                if is_image_file(entry.name):
                    return False
                tars = tars or is_shard(entry.name)
        return tars and not any(
            is_image_file(name) for *_, names in os.walk(path) for name in names
        )
    return not is_local(src) or src.endswith(SUFFIXES)


def is_shard(name: str) -> bool:
    """Whether a file of a folder is a shard by its name; macOS puts a ``._x.tar`` beside x.tar on other disks."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


def is_image_file(name: str) -> bool:
    """Whether a file of a folder is an image by its name; hidden ones are none."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


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


def recipes() -> dict[str, Path]:
    """List the configs that come with this package by their names: ``demo``, then those in folders, ``imagenet/A2``."""
    paths = sorted(RECIPES.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths}


def merge_files(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), resolve: bool = True
) -> Config:
    """Merge YAML files, later over earlier, then ``key=value`` overrides; interpolations are resolved.

    When a node's target changes, the params of the old target are dropped. A file may ``include`` others, by a path
    or a list of paths relative to itself; it is merged over them. Where there is no such file, a path is the name of
    a recipe of this package. ``resolve=False`` leaves interpolations as they are. ConfigError if a file is missing, no
    mapping or includes itself, or an override is not ``key=value``.
    """
    merged = OmegaConf.create({})
    for path in paths:
        merged = _merge(merged, _read(path))
    if bad := [item for item in overrides if "=" not in item or item.startswith("=")]:
        raise ConfigError(
            *(f"{item}: an override is key=value, as in model.params.embed_dim=8" for item in bad)
        )
    try:
        merged = _merge(merged, OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(merged, resolve=resolve)
    except (
        yaml.YAMLError,
        OmegaConfBaseException,
        TypeError,
    ) as error:  # TypeError: a key of a list
        raise ConfigError(_one_line(error)) from error
    return typing.cast(Config, container)


def read_received(path: Path) -> Config:
    """Read a YAML file of somebody else, without includes, interpolations or the memory that aliases can take."""
    return typing.cast(Config, OmegaConf.to_container(_yaml(path, received=True), resolve=False))


def find_config(name: str | Path, folder: Path, includers: tuple[Path, ...]) -> Path:
    """Find a file of this name in the folder, with ``.yaml`` or without, or else a recipe of this package."""
    path = folder / name
    with_suffix = path.with_name(f"{path.name}.yaml") if path.name else path
    if path.is_file():
        return path
    if (
        with_suffix.is_file() and with_suffix.resolve() not in includers
    ):  # demo.yaml may include the recipe demo
        return with_suffix
    return recipes().get(Path(name).as_posix(), path)


def _read(name: str | Path, folder: Path = Path(), includers: tuple[Path, ...] = ()) -> DictConfig:
    """Read a file over what it includes."""
    path = find_config(name, folder, includers)
    if path.resolve() in includers:
        raise ConfigError(f"{path}: includes itself")
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.yaml"))
        raise ConfigError(
            f"{path}: no such config file" + (nearest(path.name, beside) or nearest_recipes(name))
        )
    part = _yaml(path)
    include = part.pop("include", [])
    names = list(include) if isinstance(include, list | ListConfig) else [include]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ConfigError(f"{path}: include: expected a path or a list of paths, got {wrong[0]!r}")
    for name in reversed(names):
        part = _merge(_read(name, path.parent, (*includers, path.resolve())), part)
    return part


def _yaml(path: Path, received: bool = False) -> DictConfig:
    """Read one file as it is."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {CONFIG_BYTES >> 20} MiB, which no config is")
        if received and any(
            isinstance(part, yaml.AliasEvent) for part in yaml.parse(path.read_text("utf-8"))
        ):
            raise ConfigError(
                f"{path}: YAML aliases, which may repeat without limit: refused in a received config"
            )
        part = OmegaConf.load(path)
    except (
        yaml.YAMLError,
        OmegaConfBaseException,
        UnicodeDecodeError,
        OSError,
        RecursionError,
    ) as error:
        text = reason(error) if isinstance(error, OSError) else _one_line(error)
        text = text.replace(f' in "{path.absolute()}", ', " at ").replace(
            ' in "<unicode string>", ', " at "
        )
        raise ConfigError(f"{path}: not readable as YAML: {text}") from error
    if not isinstance(part, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping with the keys {', '.join(TOP_LEVEL)}")
    return part


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """Merge ``above`` into ``below``; where it names another target, the params of the old one are dropped."""

    def drop_params(low: DictConfig, high: DictConfig) -> None:
        if "target" in low and "target" in high and low.target != high.target:
            low.pop("params", None)
        for key in high:
            old, new = low._get_node(key), high._get_node(key)
            if OmegaConf.is_dict(old) and OmegaConf.is_dict(new):
                drop_params(low[key], high[key])
            elif (
                OmegaConf.is_config(old) and OmegaConf.is_config(new) and type(old) is not type(new)
            ):
                low.pop(key)  # a list and a mapping

    drop_params(below, above)
    return typing.cast(DictConfig, OmegaConf.unsafe_merge(below, above))


def save(config: Mapping[str, Any], path: str | Path) -> None:
    """Write a config as YAML; :func:`~olvae.config.load` reads it back unchanged."""
    with atomic_write(Path(path)) as partial:
        OmegaConf.save(OmegaConf.create(_escaped(config)), partial)


def _escaped(value: Any) -> Any:
    """A config's values with ``${`` escaped: they are resolved, so it is the shell's, or of a file's name."""
    if isinstance(value, Mapping):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """List what differs between two configs by dotted key: both values, :data:`ABSENT` for a missing one."""
    flat, other = dict(_leaves(before)), dict(_leaves(after))
    pairs = {key: (flat.get(key, ABSENT), other.get(key, ABSENT)) for key in flat | other}
    return {key: (old, new) for key, (old, new) in pairs.items() if old is not new and old != new}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest_recipes(name: str | Path) -> str:
    """End the message on an unknown recipe with those that are like it, by the whole name or its last part."""
    known = recipes()
    names = {recipe.rpartition("/")[2].lower(): recipe for recipe in known}
    names |= {recipe.lower(): recipe for recipe in known}
    asked = (
        Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml").lower()
    )  # a checkout's path
    close = dict.fromkeys(
        names[match] for match in difflib.get_close_matches(asked, names, cutoff=0.7)
    )
    return (
        f"; did you mean {', '.join(close)}?"
        if close
        else "; `olvae recipes` lists those of this package"
    )
