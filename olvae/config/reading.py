"""Load configs: YAML files merged with what they include, and the data source for their paths."""

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

# Stands for a value that a config does not have.
ABSENT = object()

RECIPES = Path(__file__).parent.parent / "recipes"
# The largest config that is read; the longest recipe has 5 kB.
CONFIG_BYTES = 2**21

OF_THIS_PACKAGE = "olvae.data."
FOLDER = f"{OF_THIS_PACKAGE}picture_folder.FolderSource"
SHARDS = f"{OF_THIS_PACKAGE}shards.webdataset.WebDatasetSource"
SAMPLES = f"{OF_THIS_PACKAGE}dataset.SamplePhotographs"

# Arguments that name the images of a source.
PLACE_KEYS = {"root", "shards", "dataset", "path"}

# Arguments that belong to one set of images, and are dropped with it.
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

# Extensions of shards, and of configs.
SUFFIXES = (".tar", ".tar.gz", ".tgz")
YAML = (".yaml", ".yml")

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
        source, naming = find_source(place)
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
    for key in ("val_root", "val_shards", "root", "shards", "path", "folder"):
        if params.get(key):
            return str(params[key])
    return str(data.get("target"))


def find_source(src: str) -> tuple[str, Config]:
    """Return the target of the source that trains on SRC, and the params that name SRC to it.

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
    if kind == "hf" and "://" not in src:
        path, arguments = _split_arguments(rest)
        return f"{OF_THIS_PACKAGE}hub.HuggingFaceSource", {"path": path, **arguments}
    if holds_shards(src):
        return SHARDS, {"shards": src}
    return FOLDER, {"root": src}


def holds_shards(src: str) -> bool:
    """Whether SRC is tar files: a pattern, a URL, a pipe, or a folder of them.

    A folder that has images at any depth is not one of shards.
    """
    if src.partition(":")[0] in ("torchvision", "hf") and "://" not in src:
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
    if not tars:
        return False
    for *_, names in os.walk(path):
        for name in names:
            if is_image_file(name):
                return False
    return True


def is_shard(name: str) -> bool:
    """Whether a file is a shard by its name; not ``._x.tar``, which macOS puts beside x.tar."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


def is_image_file(name: str) -> bool:
    """Whether a file is an image by its name; hidden files are not."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def is_local(url: str) -> bool:
    """Whether a shard is a local file, rather than a URL or a pipe."""
    return not (url.startswith("pipe:") or "://" in url)


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


def recipes() -> dict[str, Path]:
    """Map the names of this package's recipes to files: ``demo``, then ``imagenet/A2`` etc."""
    paths = sorted(RECIPES.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths}


def merge_files(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), resolve: bool = True
) -> Config:
    """Merge YAML files, later over earlier, then ``key=value`` overrides; resolve interpolations.

    When a node's target changes, the params of the old target are dropped. A file may ``include``
    others, by a path or a list of paths relative to itself; it is merged over them. A path without
    such a file is the name of a recipe of this package. ``resolve=False`` leaves interpolations as
    they are.

    ConfigError if a file is missing, is not a mapping or includes itself, or an override is not
    ``key=value``.
    """
    merged = OmegaConf.create({})
    for path in paths:
        merged = _merge(merged, _read(path))

    bad = [item for item in overrides if "=" not in item or item.startswith("=")]
    if bad:
        raise ConfigError(
            *(f"{item}: an override is key=value, as in model.params.embed_dim=8" for item in bad)
        )
    try:
        merged = _merge(merged, OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(merged, resolve=resolve)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        # TypeError: an override names an item of a list by a key.
        raise ConfigError(_one_line(error)) from error
    return typing.cast(Config, container)


def read_received(path: Path) -> Config:
    """Read a YAML file from somebody else.

    Includes and interpolations are not followed, and aliases, which can fill memory, are refused.
    """
    return typing.cast(Config, OmegaConf.to_container(_yaml(path, received=True), resolve=False))


def find_config(name: str | Path, folder: Path, includers: tuple[Path, ...]) -> Path:
    """Find a config by its name in the folder, with or without ``.yaml``, or else among recipes."""
    path = folder / name
    if path.is_file():
        return path
    if path.name:
        with_suffix = path.with_name(f"{path.name}.yaml")
        # A file demo.yaml may itself include the recipe demo.
        if with_suffix.is_file() and with_suffix.resolve() not in includers:
            return with_suffix
    return recipes().get(Path(name).as_posix(), path)


def _read(name: str | Path, folder: Path = Path(), includers: tuple[Path, ...] = ()) -> DictConfig:
    """Read a file over what it includes; ``includers`` are the files on the way to it."""
    path = find_config(name, folder, includers)
    if path.resolve() in includers:
        raise ConfigError(f"{path}: includes itself")
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.yaml"))
        near = nearest(path.name, beside) or nearest_recipes(name)
        raise ConfigError(f"{path}: no such config file{near}")

    part = _yaml(path)
    include = part.pop("include", [])
    names = list(include) if isinstance(include, list | ListConfig) else [include]
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ConfigError(f"{path}: include: expected a path or a list of paths, got {wrong[0]!r}")

    # The last one first, as each is merged below what is read already.
    for name in reversed(names):
        part = _merge(_read(name, path.parent, (*includers, path.resolve())), part)
    return part


def _yaml(path: Path, received: bool = False) -> DictConfig:
    """Read one file as it is; refuse aliases if it is ``received`` from somebody else."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {CONFIG_BYTES >> 20} MiB, which no config is")
        if received:
            events = yaml.parse(path.read_text("utf-8"))
            if any(isinstance(event, yaml.AliasEvent) for event in events):
                raise ConfigError(
                    f"{path}: YAML aliases, which may repeat without limit: "
                    "refused in a received config"
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
        # YAML repeats the file's name with each position.
        for place in (path.absolute(), "<unicode string>"):
            text = text.replace(f' in "{place}", ', " at ")
        raise ConfigError(f"{path}: not readable as YAML: {text}") from error
    if not isinstance(part, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping with the keys {', '.join(TOP_LEVEL)}")
    return part


def _one_line(error: Exception) -> str:
    """Put an error of YAML or OmegaConf on one line, without OmegaConf's details of the key."""
    return " ".join(str(error).split("\n    full_key")[0].split())


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """Merge ``above`` into ``below``; where the target changes, the old target's params go."""

    def drop_params(low: DictConfig, high: DictConfig) -> None:
        if "target" in low and "target" in high and low.target != high.target:
            low.pop("params", None)
        for key in high:
            # The nodes themselves: indexing would resolve interpolations.
            old = low._get_node(key)
            new = high._get_node(key)
            both = OmegaConf.is_config(old) and OmegaConf.is_config(new)
            if OmegaConf.is_dict(old) and OmegaConf.is_dict(new):
                drop_params(low[key], high[key])
            elif both and type(old) is not type(new):
                # A list and a mapping can't be merged: the new one replaces the old one.
                low.pop(key)

    drop_params(below, above)
    return typing.cast(DictConfig, OmegaConf.unsafe_merge(below, above))


def save(config: Mapping[str, Any], path: str | Path) -> None:
    """Write a config as YAML; :func:`~olvae.config.load` reads it back unchanged."""
    with atomic_write(Path(path)) as partial:
        OmegaConf.save(OmegaConf.create(_escaped(config)), partial)


def _escaped(value: Any) -> Any:
    """Escape each ``${`` in a config: it is resolved, so this is the shell's, or a file's name."""
    if isinstance(value, Mapping):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Map each dotted key that differs to both values, :data:`ABSENT` where a config has none."""
    flat_before = dict(_leaves(before))
    flat_after = dict(_leaves(after))
    changed = {}
    for key in flat_before | flat_after:
        old = flat_before.get(key, ABSENT)
        new = flat_after.get(key, ABSENT)
        if old is not new and old != new:
            changed[key] = (old, new)
    return changed


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each leaf; an empty mapping is a leaf."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest_recipes(name: str | Path) -> str:
    """End the message on an unknown recipe with similar ones, by full name or its last part."""
    known = recipes()
    names = {recipe.rpartition("/")[2].lower(): recipe for recipe in known}
    names |= {recipe.lower(): recipe for recipe in known}
    # In a checkout, people name a recipe by a path.
    asked = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml").lower()
    matches = difflib.get_close_matches(asked, names, cutoff=0.7)
    if not matches:
        return "; `olvae recipes` lists all of them"
    # A recipe may match by both names.
    close = dict.fromkeys(names[match] for match in matches)
    return f"; did you mean {', '.join(close)}?"
