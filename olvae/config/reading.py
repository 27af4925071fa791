"""Read config files over each other, with what they include; write and compare configs."""

import copy
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olvae.files import atomic_write, reason

Config = dict[str, Any]

ABSENT = object()  # in place of a value that a config does not have
RECIPES = Path(__file__).parent.parent / "recipes"
TOP_LEVEL = ("model", "data", "lightning", "run")
CONFIG_BYTES = 2**21  # the largest config that is read; the longest recipe has 5 kB


class ConfigError(ValueError):
    """One or more mistakes of a config, one line each."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message on an unknown name: the nearest known one, if one is near."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def recipes() -> dict[str, Path]:
    """List the configs that come with this package by their names: ``demo``, then those in folders, ``imagenet/A2``."""
    paths = sorted(RECIPES.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths}


def merge_files(paths: Sequence[str | Path], overrides: Sequence[str] = (), resolve: bool = True) -> Config:
    """Merge YAML files, later over earlier, then ``key=value`` overrides; interpolations are resolved.

    When a node's target changes, the params of the old target are dropped. A file may ``include`` others, by a path
    or a list of paths relative to itself; it is merged over them. Where there is no such file, a path is the name of
    a recipe of this package.

    ``resolve``: leave interpolations as they are, if False.

    Raises ConfigError: a file is missing, no mapping or includes itself, or an override is not ``key=value``.
    """
    merged = OmegaConf.create({})
    for path in paths:
        merged = _merge(merged, _read(path))
    if bad := [item for item in overrides if "=" not in item or item.startswith("=")]:
        raise ConfigError(*(f"{item}: an override is key=value, as in model.params.embed_dim=8" for item in bad))
    try:
        merged = _merge(merged, OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(merged, resolve=resolve)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:  # TypeError: a key of a list
        raise ConfigError(_one_line(error)) from error
    return typing.cast(Config, container)


def read_received(path: Path) -> Config:
    """Read a YAML file of somebody else, without includes, interpolations or the memory that aliases can take."""
    return typing.cast(Config, OmegaConf.to_container(_yaml(path, received=True), resolve=False))


def _find(name: str | Path, folder: Path, includers: tuple[Path, ...]) -> Path:
    """Find a file of this name in the folder, with ``.yaml`` or without, or else a recipe of this package."""
    path = folder / name
    with_suffix = path.with_name(f"{path.name}.yaml") if path.name else path
    if path.is_file():
        return path
    if with_suffix.is_file() and with_suffix.resolve() not in includers:  # demo.yaml may include the recipe demo
        return with_suffix
    return recipes().get(Path(name).as_posix(), path)


def _read(name: str | Path, folder: Path = Path(), includers: tuple[Path, ...] = ()) -> DictConfig:
    """Read a file over what it includes."""
    path = _find(name, folder, includers)
    if path.resolve() in includers:
        raise ConfigError(f"{path}: includes itself")
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.yaml"))
        raise ConfigError(f"{path}: no such config file" + (nearest(path.name, beside) or nearest_recipes(name)))
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
        if received and any(isinstance(part, yaml.AliasEvent) for part in yaml.parse(path.read_text("utf-8"))):
            raise ConfigError(f"{path}: YAML aliases, which may repeat without limit: refused in a received config")
        part = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        text = reason(error) if isinstance(error, OSError) else _one_line(error)
        text = text.replace(f' in "{path.absolute()}", ', " at ").replace(' in "<unicode string>", ', " at ")
        raise ConfigError(f"{path}: not readable as YAML: {text}") from error
    if not isinstance(part, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping with the keys {', '.join(TOP_LEVEL)}")
    return part


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """Merge ``above`` over ``below``; where it names another target, the params of the old one are dropped."""

    def drop_params(low: DictConfig, high: DictConfig) -> None:
        if "target" in low and "target" in high and low.target != high.target:
            low.pop("params", None)
        for key in high:
            old, new = low._get_node(key), high._get_node(key)
            if OmegaConf.is_dict(old) and OmegaConf.is_dict(new):
                drop_params(low[key], high[key])
            elif OmegaConf.is_config(old) and OmegaConf.is_config(new) and type(old) is not type(new):
                low.pop(key)  # a list and a mapping

    below = copy.deepcopy(below)
    drop_params(below, above)
    return typing.cast(DictConfig, OmegaConf.merge(below, above))


def save(config: Mapping[str, Any], path: str | Path) -> None:
    """Write a config as YAML; :func:`~olvae.config.load` reads it back unchanged."""
    with atomic_write(Path(path)) as partial:
        OmegaConf.save(OmegaConf.create(dict(config)), partial)


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
    asked = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml").lower()  # a checkout's path
    close = dict.fromkeys(names[match] for match in difflib.get_close_matches(asked, names, cutoff=0.7))
    return f"; did you mean {', '.join(close)}?" if close else "; `olvae recipes` lists those of this package"
