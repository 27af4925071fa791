"""YAML to objects, in the open-LiteVAE and latent-diffusion dialect: nodes of ``target`` and ``params``.

The only reader of ``target``. A config's top level has ``model``, ``data``, ``lightning`` (``trainer`` and
``callbacks``), and in a run folder ``run``, the command's own settings.
"""

import contextlib
import copy
import difflib
import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from olvae.files import atomic_write, reason
from olvae.signatures import Arguments, arguments_in_source

__all__ = [
    "ABSENT",
    "Config",
    "ConfigError",
    "Node",
    "check",
    "check_arguments",
    "differences",
    "instantiate",
    "load",
    "nearest_recipes",
    "read_received",
    "recipes",
    "resolve_target",
    "save",
    "unknown_keys",
    "validate",
    "with_paths",
]

Config = dict[str, Any]
ABSENT = object()
"""In place of a value that a config does not have."""
_NODE = "a node of target and params"
Node = Annotated[Mapping[str, Any], _NODE]
"""The type of a constructor's argument that is a node; the constructor instantiates it."""

RECIPES = Path(__file__).parent / "recipes"
CHECKOUT = "configs"
"""What the folder of the recipes is called in a checkout: a link to it."""

TOP_LEVEL = ("model", "data", "lightning", "run")
LIGHTNING = ("trainer", "callbacks", "logger")
NODE_KEYS = ("target", "params")
MODEL_KEYS = ("base_learning_rate", "from", *NODE_KEYS)
FOUND = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "initial_logvar")
"""Arguments of the model that ``model.from``, an autoencoder to start from, has the values of."""
SAID_ELSEWHERE = {
    "learning_rate": "model.base_learning_rate",
    "accumulate_grad_batches": "lightning.trainer.accumulate_grad_batches",
    "gradient_clip_val": "lightning.trainer.gradient_clip_val",
}
"""Arguments of the model, and the setting from which the trainer fills them in."""

TRAINER = "lightning.pytorch.Trainer"
TRAINER_OURS = {
    "callbacks": "lightning.callbacks",
    "logger": "lightning.logger",
    "default_root_dir": "--logdir",
    "use_distributed_sampler": "the data source",
    "enable_checkpointing": "lightning.callbacks (KeepCheckpoints)",
    "limit_train_batches": "lightning.trainer.max_steps",
    "fast_dev_run": "lightning.trainer.max_steps",
}
"""Trainer arguments that this package sets, and the setting to use instead."""


MOVED = {
    "olvae.data.folder": "olvae.data.mapped.folder",
    "olvae.data.huggingface": "olvae.data.mapped.huggingface",
    "olvae.data.latents": "olvae.data.shards.latents",
    "olvae.data.samples": "olvae.data.mapped.samples",
    "olvae.data.torchvision": "olvae.data.mapped.torchvision",
    "olvae.data.webdataset": "olvae.data.shards.webdataset",
    "olvae.modules.basicgan.patchgan": "olvae.modules.discriminators.patchgan",
    "olvae.modules.gigagan.gigagan": "olvae.modules.discriminators.gigagan",
    "olvae.modules.unetgan.unetgan": "olvae.modules.discriminators.unetgan",
    "olvae.training.health": "olvae.training.callbacks",
}
"""Where modules are now that the config.yaml of an older run may name."""


CONFIG_BYTES = 2**21
"""The largest config that is read; the longest recipe has 5 kB."""

MOST_VALUES = 100_000
"""Of a config, wherever aliases repeat them: a few kB of YAML can stand for more than fits into memory."""


DEEPEST = 30
"""Dots in the name of a module; importing takes time by their square."""


class ConfigError(ValueError):
    """One or more mistakes of a config, one line each."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


def recipes() -> dict[str, Path]:
    """The configs that come with this package, by their names: ``demo``, then those in folders, ``imagenet/A2``."""
    paths = sorted(RECIPES.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths}


def load(paths: Sequence[str | Path], overrides: Sequence[str] = (), resolve: bool = True) -> Config:
    """Merge YAML files, later over earlier, then ``key=value`` overrides; interpolations are resolved.

    When a node's target changes, the params of the old target are dropped. A file may ``include`` others, by a path
    or a list of paths relative to itself; it is merged over them. Where there is no such file, a path is the name of
    a recipe of this package.

    Args:
        resolve: leave interpolations as they are, if False.

    Raises:
        ConfigError: a file is missing, is not a YAML mapping or includes itself, or an override is not
            ``key=value``.
    """
    merged = OmegaConf.create({})
    for path in paths:
        merged = _merge(merged, _read(path))
    bad = [item for item in overrides if "=" not in item or item.startswith("=")]
    if bad:
        raise ConfigError(*(f"{item}: an override is key=value, as in model.params.embed_dim=8" for item in bad))
    try:
        merged = _merge(merged, OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(merged, resolve=resolve)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from error
    assert isinstance(container, dict)
    return typing.cast(Config, container)


def _find(name: str | Path, folder: Path, includers: tuple[Path, ...]) -> Path:
    """The file of this name in the folder, with ``.yaml`` or without, else this package's recipe, else no file."""
    path = folder / name
    with_suffix = path.with_name(f"{path.name}.yaml") if path.name else path
    if path.is_file():
        return path
    if with_suffix.is_file() and with_suffix.resolve() not in includers:  # demo.yaml may include the recipe demo
        return with_suffix
    recipe = Path(name).as_posix()
    if recipe.startswith(f"{CHECKOUT}/") and not (folder / CHECKOUT).is_dir():  # installed, or Windows without links
        recipe = recipe.removeprefix(f"{CHECKOUT}/").removesuffix(".yaml")
    return recipes().get(recipe, path)


def _read(name: str | Path, folder: Path = Path(), includers: tuple[Path, ...] = ()) -> DictConfig:
    """A file over what it includes."""
    path = _find(name, folder, includers)
    if path.resolve() in includers:
        raise ConfigError(f"{path}: includes itself")
    if path.is_dir():
        raise ConfigError(f"{path}: this is a folder: name a config file in it")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file" + _nearest_file(path, name))
    part = _yaml(path)
    include = part.pop("include", [])
    names = list(include) if isinstance(include, list | ListConfig) else [include]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ConfigError(f"{path}: include: expected a path or a list of paths, got {wrong[0]!r}")
    for name in reversed(names):
        below = _read(name, path.parent, (*includers, path.resolve()))
        part = _merge(below, part)
    return part


def _yaml(path: Path) -> DictConfig:
    """One file as it is."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {CONFIG_BYTES >> 20} MiB, which no config is")
        with path.open(encoding="utf-8") as file:
            values = _count(yaml.compose(file, yaml.SafeLoader), {})
        if values > MOST_VALUES:
            raise ConfigError(f"{path}: more than {MOST_VALUES} values, counting what its aliases repeat")
        part = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_parse_error(error, path)}") from error
    if not isinstance(part, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping with the keys {', '.join(TOP_LEVEL)}")
    return part


def _count(node: Any, counted: dict[int, float]) -> float:
    """The values in a node of YAML, repeated where aliases do; infinite if a node has itself in it."""
    if id(node) not in counted:
        counted[id(node)] = math.inf
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
        inside = node.value if isinstance(node, yaml.SequenceNode) else inside
        counted[id(node)] = 1 + sum(_count(part, counted) for part in inside)
    return counted[id(node)]


def read_received(path: Path) -> Config:
    """Read a YAML file of somebody else: one that includes no other file and resolves no interpolation.

    Raises:
        ConfigError: it is not readable, or not a mapping.
    """
    container = OmegaConf.to_container(_yaml(path), resolve=False)
    return typing.cast(Config, container)


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """``above`` over ``below``; where it names another target, the params of the old one are dropped."""

    def drop_params(low: DictConfig, high: DictConfig) -> None:
        if "target" in low and "target" in high and _moved(low.target) != _moved(high.target):
            low.pop("params", None)
        for key in high:
            if OmegaConf.is_dict(low._get_node(key)) and OmegaConf.is_dict(high._get_node(key)):
                drop_params(low[key], high[key])

    below = copy.deepcopy(below)
    drop_params(below, above)
    merged = OmegaConf.merge(below, above)
    assert isinstance(merged, DictConfig)
    return merged


def save(config: Mapping[str, Any], path: str | Path) -> None:
    """Write a config as YAML; :func:`load` reads it back unchanged."""
    with atomic_write(Path(path)) as partial:
        OmegaConf.save(OmegaConf.create(dict(config)), partial)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two configs, by dotted key: both values, :data:`ABSENT` where there is none.

    A target is equal to the same one by the name that its module had before.
    """
    flat, other = dict(_leaves(before)), dict(_leaves(after))
    pairs = {key: (flat.get(key, ABSENT), other.get(key, ABSENT)) for key in flat | other}
    return {key: (old, new) for key, (old, new) in pairs.items() if old is not new and old != new}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _moved(value) if key == "target" else value


def resolve_target(target: str) -> Any:
    """Import the class or function that a dotted path names.

    Raises:
        ConfigError: it does not import; the message has the nearest right name.
    """
    module_name, name = _dotted(target)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"target {target!r} does not import: {error}" + _nearest_module(module_name)) from error
    if not hasattr(module, name):
        raise ConfigError(
            f"target {target!r} does not import: {module_name} has no {name}" + _nearest(name, dir(module))
        )
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"target {target!r} is a {type(found).__name__}, not a class or function")
    return found


def _dotted(target: str) -> tuple[str, str]:
    """The module, by the name that it has now, and the class or function in it.

    Raises:
        ConfigError: it is no dotted path.
    """
    module, _, name = _moved(target).rpartition(".")
    right = module and all(part.isidentifier() for part in (*module.split("."), name))
    if not right or module.count(".") > DEEPEST:
        raise ConfigError(f"target {target!r} is not a dotted path such as olvae.data.mapped.folder.FolderSource")
    return module, name


def _moved(target: Any) -> str:
    """A target by the name that its module has now."""
    module, _, name = str(target).rpartition(".")
    return f"{MOVED.get(module, module)}.{name}"


def instantiate(node: Mapping[str, Any], **filled_in: Any) -> Any:
    """Build what a node describes; ``filled_in`` are further arguments."""
    if not isinstance(node, Mapping) or "target" not in node:
        raise ConfigError(f"expected {_NODE}, got {node!r}")
    factory = resolve_target(node["target"])
    params = {**(node.get("params") or {}), **filled_in}
    try:
        with contextlib.suppress(ValueError):  # some built-in classes have no signature
            inspect.signature(factory).bind(**params)
    except TypeError as error:
        raise ConfigError(f"{node['target']}: {error}") from error
    return factory(**params)


def with_paths(node: Mapping[str, Any], change: Callable[[str], str]) -> Config:
    """A node, and those in it, with other paths: strings and lists in arguments whose type allows a Path."""
    if not isinstance(node, dict) or not isinstance(node.get("target"), str):
        return typing.cast(Config, node)  # instantiate says what is wrong
    arguments = _arguments_of(node["target"])
    params = dict(node.get("params") or {})
    for name, value in params.items():
        hint = arguments.hints.get(name) if arguments is not None else None
        if _is_node(hint):
            nodes = [with_paths(part, change) for part in (value if isinstance(value, list) else [value]) if part]
            params[name] = nodes if isinstance(value, list) else next(iter(nodes), value)
        elif _takes_path(hint):
            params[name] = [change(part) for part in value] if isinstance(value, list) else value and change(value)
    return {**node, "params": params}


def validate(config: Mapping[str, Any]) -> list[str]:
    """Every mistake of a config, one line each, without building anything.

    Finds unknown and missing keys, wrong types and targets that do not import, in nodes at any depth, and suggests the
    nearest right name; the Trainer's keys are checked against Lightning's signature.
    """
    mistakes = list(unknown_keys(config, TOP_LEVEL, ""))
    if "model" not in config:
        mistakes.append("model: missing")
    for section in ("model", "data"):
        if section in config:
            mistakes += _check_node(config[section], section)
    lightning = config.get("lightning")
    if lightning is not None:
        mistakes += _check_lightning(lightning)
    return mistakes


def check(config: Mapping[str, Any]) -> None:
    """Check a config to train with.

    Raises:
        ConfigError: it has mistakes, or no data.
    """
    mistakes = validate(config)
    if "data" not in config:
        mistakes.append("data: missing: the source of the training images")
    if mistakes:
        raise ConfigError(*mistakes)


def _check_lightning(section: Any) -> Iterator[str]:
    if not isinstance(section, Mapping):
        yield f"lightning: expected a mapping of {', '.join(LIGHTNING)}, got {section!r}"
        return
    yield from unknown_keys(section, LIGHTNING, "lightning.")
    trainer = section.get("trainer")
    if trainer is not None:
        yield from _check_arguments(_arguments_of(TRAINER), trainer, "lightning.trainer")
        for key in set(trainer) & set(TRAINER_OURS) if isinstance(trainer, Mapping) else ():
            yield f"lightning.trainer.{key}: is set by {TRAINER_OURS[key]}; leave it out"
    for key in ("callbacks", "logger"):
        nodes = section.get(key)
        if isinstance(nodes, Mapping):
            for name, node in nodes.items():
                yield from _check_node(node, f"lightning.{key}.{name}")
        elif nodes is not None:
            yield f"lightning.{key}: expected a mapping of names to nodes, got {nodes!r}"


RUN_LOGGERS = (".CSVLogger", ".WandbLogger")
"""Loggers whose ``save_dir`` is the run's folder, unless it is given."""


def _check_node(node: Any, where: str) -> Iterator[str]:
    if not isinstance(node, Mapping):
        yield f"{where}: expected {_NODE}, got {node!r}"
        return
    yield from unknown_keys(node, MODEL_KEYS if where == "model" else NODE_KEYS, f"{where}.")
    if where == "model":
        rate = node.get("base_learning_rate", 1e-4)
        if not isinstance(rate, float | int) or isinstance(rate, bool) or not 0 < rate < math.inf:
            yield f"model.base_learning_rate: expected a positive number, got {rate!r}"
    if not isinstance(node.get("target"), str):
        yield (f"{where}.target: missing" if "target" not in node else f"{where}.target: expected a dotted path")
        return
    try:
        arguments = _arguments_of(node["target"])
    except ConfigError as error:
        yield f"{where}.target: {error}"
        return
    params = node.get("params") or {}
    filled_in: tuple[str, ...] = ("save_dir",) if node["target"].endswith(RUN_LOGGERS) else ()
    if where == "model" and isinstance(params, Mapping):
        for key in set(params) & set(SAID_ELSEWHERE):
            yield f"model.params.{key}: set {SAID_ELSEWHERE[key]} instead"
        filled_in = ("learning_rate",)  # by the trainer
        if node.get("from") is not None:
            filled_in += FOUND
            params = {key: value for key, value in params.items() if key not in FOUND}
            if not isinstance(node["from"], str):
                yield f"model.from: expected an autoencoder to start from, got {node['from']!r}"
    yield from _check_arguments(arguments, params, f"{where}.params", filled_in)


def _arguments_of(target: str) -> Arguments | None:
    """From the source where that says it, as an import takes seconds; None for built-in functions.

    Raises:
        ConfigError: it does not import.
    """
    return arguments_in_source(*_dotted(target)) or _imported_arguments(resolve_target(target))


def _imported_arguments(factory: Any) -> Arguments | None:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # built-in functions have none
        return None
    return Arguments(parameters, _type_hints(factory))


def check_arguments(factory: Any, params: Any, where: str = "", filled_in: Container[str] = ()) -> Iterator[str]:
    """One line for each mistake in the arguments of a class or function, and of the nodes among them.

    Args:
        where: the place of the arguments in the config, as in ``data.params``.
        filled_in: names of arguments that may be missing.
    """
    yield from _check_arguments(_imported_arguments(factory), params, where, filled_in)


def _check_arguments(
    arguments: Arguments | None, params: Any, where: str, filled_in: Container[str] = ()
) -> Iterator[str]:
    if not isinstance(params, Mapping):
        yield f"{where}: expected a mapping of arguments, got {params!r}"
        return
    if arguments is None:
        return
    prefix = f"{where}." if where else ""
    parameters = arguments.parameters
    open_ended = any(a.kind is inspect.Parameter.VAR_KEYWORD for a in parameters.values())
    named = {n: a for n, a in parameters.items() if a.kind not in (a.VAR_KEYWORD, a.VAR_POSITIONAL)}
    if not open_ended:
        yield from unknown_keys(params, tuple(named), prefix)
    for name, argument in named.items():
        if argument.default is argument.empty and name not in params and name not in filled_in:
            yield f"{prefix}{name}: missing"
    for name, value in params.items():
        hint = arguments.hints.get(name)
        if _is_node(hint) and isinstance(value, list) and typing.get_origin(hint) is Sequence:
            for i, part in enumerate(value):
                yield from _check_node(part, f"{prefix}{name}.{i}")
        elif _is_node(hint) and value is not None:
            yield from _check_node(value, f"{prefix}{name}")
        elif hint is not None:
            try:
                check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            except TypeCheckError:
                yield f"{prefix}{name}: expected {_readable(hint)}, got {value!r}"


def _type_hints(factory: Any) -> dict[str, Any]:
    function = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return {}


def _is_node(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return _NODE in hint.__metadata__
    return any(_is_node(part) for part in typing.get_args(hint))


def _takes_path(hint: Any) -> bool:
    return hint is Path or any(_takes_path(part) for part in typing.get_args(hint))


def _readable(hint: Any) -> str:
    text = getattr(hint, "__name__", None) if inspect.isclass(hint) and not typing.get_args(hint) else None
    return text or str(hint).replace("typing.", "").replace("collections.abc.", "")


def unknown_keys(given: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> Iterator[str]:
    """One line for each key that is not known, with the nearest one that is."""
    for key in given:
        if key not in known:
            yield f"{prefix}{key}: unknown key" + (_nearest(str(key), known) or f"; known: {', '.join(known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def _nearest_module(name: str) -> str:
    """For a missing module: the nearest one in its package."""
    package, _, missing = name.rpartition(".")
    try:
        inside = [info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    except (ImportError, ValueError, AttributeError):
        return _nearest_module(package) if package else ""
    return _nearest(missing, inside)


def _nearest_file(path: Path, name: str | Path) -> str:
    """For a missing file: the nearest one beside it, else the nearest recipes."""
    beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return _nearest(path.name, beside) or nearest_recipes(name)


def nearest_recipes(name: str | Path) -> str:
    """For a message on a name that no recipe has: those that are like it, by the whole name or its last part."""
    known = recipes()
    names = {recipe.rpartition("/")[2].lower(): recipe for recipe in known}
    names |= {recipe.lower(): recipe for recipe in known}
    asked = Path(name).as_posix().removeprefix(f"{CHECKOUT}/").removesuffix(".yaml").lower()
    close = dict.fromkeys(names[match] for match in difflib.get_close_matches(asked, names, cutoff=0.7))
    return f"; did you mean {', '.join(close)}?" if close else "; `olvae recipes` lists those of this package"


def _parse_error(error: Exception, path: Path) -> str:
    """Without the file's name, which the message has already."""
    text = reason(error) if isinstance(error, OSError) else _first_line(error)
    return text.replace(f' in "{path.absolute()}", ', " at ")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
