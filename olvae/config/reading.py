"""Load configs: YAML files merged with what they include, and overrides.

The functions import OmegaConf and YAML, which using a model does not wait for.
"""

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olvae.config.nodes import TOP_LEVEL, Config, ConfigError, nearest
from olvae.files import ON_WINDOWS, atomic_write, reason

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Stands for a value that a config does not have.
ABSENT = object()

RECIPES = Path(__file__).parent.parent / "recipes"
# The largest config that is read; the longest recipe has 5 kB.
CONFIG_BYTES = 2**21
# Of lists and mappings in a received config; the deepest recipe has 7.
MAX_DEPTH = 50
# Of YAML's events in a received config, about one for each key and value; the longest recipe has
# 133, and a thousand shards by name are a thousand more.
MAX_EVENTS = 20_000

YAML = (".yaml", ".yml")


def is_local(url: str) -> bool:
    """Whether a shard is a local file, rather than a URL or a pipe."""
    return not (url.startswith("pipe:") or "://" in url)


def expand_braces(text: str) -> list[str]:
    """List the paths, or URLs, that a text with {000..127} and environment variables stands for.

    AssertionError for a variable that is not set.
    """
    from webdataset.shardlists import expand_urls

    # A backslash would escape what follows, but on Windows it separates folders.
    if ON_WINDOWS and is_local(text):
        text = text.replace("\\", "/")
    return list(expand_urls(text))


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
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
    from omegaconf import OmegaConf

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
    # In a checkout without links, as git makes on Windows, configs is a file.
    recipe = Path(name).as_posix()
    if recipe.startswith("configs/") and not (folder / "configs").is_dir():
        recipe = recipe.removeprefix("configs/").removesuffix(".yaml")
    return recipes().get(recipe, path)


def _read(
    name: str | Path, folder: Path = Path(), includers: tuple[Path, ...] = ()
) -> "DictConfig":
    """Read a file over what it includes; ``includers`` are the files on the way to it."""
    from omegaconf import ListConfig

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


def _yaml(path: Path, received: bool = False) -> "DictConfig":
    """Read one file as it is; refuse aliases if it is ``received`` from somebody else."""
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {CONFIG_BYTES >> 20} MiB, which no config is")

        # Refuse what takes memory or time without limit, at its first sign: events come one by one.
        if received:
            depth = 0
            for number, event in enumerate(yaml.parse(path.read_text("utf-8"))):
                if number > MAX_EVENTS:
                    raise ConfigError(
                        f"{path}: more than {MAX_EVENTS:,} keys and values: "
                        "refused in a received config"
                    )
                if isinstance(event, yaml.AliasEvent):
                    raise ConfigError(
                        f"{path}: YAML aliases, which may repeat without limit: "
                        "refused in a received config"
                    )
                if isinstance(event, yaml.CollectionStartEvent):
                    depth += 1
                elif isinstance(event, yaml.CollectionEndEvent):
                    depth -= 1
                if depth > MAX_DEPTH:
                    raise ConfigError(
                        f"{path}: lists and mappings more than {MAX_DEPTH} deep: "
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


def _merge(below: "DictConfig", above: "DictConfig") -> "DictConfig":
    """Merge ``above`` into ``below``; where the target changes, the old target's params go."""
    from omegaconf import OmegaConf

    def drop_params(low: "DictConfig", high: "DictConfig") -> None:
        if "target" in low and "target" in high and low.target != high.target:
            low.pop("params", None)
        for key in high:
            # Indexing would resolve interpolations, perhaps of values that are still missing.
            name = typing.cast(str, key)
            if any(name not in c or OmegaConf.is_interpolation(c, name) for c in (low, high)):
                continue
            both = OmegaConf.is_config(low[key]) and OmegaConf.is_config(high[key])
            if OmegaConf.is_dict(low[key]) and OmegaConf.is_dict(high[key]):
                drop_params(low[key], high[key])
            elif both and type(low[key]) is not type(high[key]):
                # A list and a mapping can't be merged: the new one replaces the old one.
                low.pop(key)

    drop_params(below, above)
    return typing.cast("DictConfig", OmegaConf.unsafe_merge(below, above))


def save(config: Mapping[str, Any], path: str | Path) -> None:
    """Write a config as YAML; :func:`~olvae.data.places.load` reads it back unchanged."""
    from omegaconf import OmegaConf

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


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
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
