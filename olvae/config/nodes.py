"""Nodes of ``target`` and ``params``: the only reader of ``target``; and what a target's arguments are."""

import contextlib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from olvae.config.mistakes import ConfigError, nearest
from olvae.signatures import Arguments, arguments_in_source

__all__ = [
    "NODE",
    "Config",
    "Node",
    "arguments_of",
    "imported_arguments",
    "instantiate",
    "is_node",
    "moved",
    "resolve_target",
    "takes_named_nodes",
    "with_paths",
]

Config = dict[str, Any]
NODE = "a node of target and params"
Node = Annotated[Mapping[str, Any], NODE]
"""The type of a constructor's argument that is a node; the constructor instantiates it."""

MOVED = {
    "olvae.data.folder": "olvae.data.mapped.picture_folder",
    "olvae.data.huggingface": "olvae.data.mapped.hub",
    "olvae.data.latents": "olvae.data.shards.latent_source",
    "olvae.data.samples": "olvae.data.mapped.dataset",
    "olvae.data.torchvision": "olvae.data.mapped.hub",
    "olvae.data.webdataset": "olvae.data.shards.webdataset",
    "olvae.modules.basicgan.patchgan": "olvae.modules.patchgan",
    "olvae.modules.gigagan.gigagan": "olvae.modules.gigagan",
    "olvae.modules.unetgan.unetgan": "olvae.modules.unetgan",
    "olvae.training.health": "olvae.training.callbacks",
}
"""Where modules are now that the config.yaml of an older run may name."""

DEEPEST = 30
"""Dots in the name of a module; importing takes time by their square."""


def resolve_target(target: str) -> Any:
    """Import the class or function that a dotted path names.

    Raises:
        ConfigError: it does not import; the message has the nearest right name.
    """
    module_name, name = dotted(target)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"target {target!r} does not import: {error}" + _nearest_module(module_name)) from error
    if not hasattr(module, name):
        raise ConfigError(
            f"target {target!r} does not import: {module_name} has no {name}" + nearest(name, dir(module))
        )
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"target {target!r} is a {type(found).__name__}, not a class or function")
    return found


def dotted(target: str) -> tuple[str, str]:
    """The module, by the name that it has now, and the class or function in it.

    Raises:
        ConfigError: it is no dotted path.
    """
    module, _, name = moved(target).rpartition(".")
    right = module and all(part.isidentifier() for part in (*module.split("."), name))
    if not right or module.count(".") > DEEPEST:
        raise ConfigError(f"target {target!r} is not a dotted path such as olvae.data.mix.MixSource")
    return module, name


def moved(target: Any) -> str:
    """A target by the name that its module has now."""
    module, _, name = str(target).rpartition(".")
    return f"{MOVED.get(module, module)}.{name}"


def instantiate(node: Mapping[str, Any], **filled_in: Any) -> Any:
    """Build what a node describes; ``filled_in`` are further arguments."""
    if not isinstance(node, Mapping) or "target" not in node:
        raise ConfigError(f"expected {NODE}, got {node!r}")
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
    arguments = arguments_of(node["target"])
    params = dict(node.get("params") or {})
    for name, value in params.items():
        hint = arguments.hints.get(name) if arguments is not None else None
        if is_node(hint):
            nodes = [with_paths(part, change) for part in (value if isinstance(value, list) else [value]) if part]
            params[name] = nodes if isinstance(value, list) else next(iter(nodes), value)
        elif _takes_path(hint):
            params[name] = [change(part) for part in value] if isinstance(value, list) else value and change(value)
    return {**node, "params": params}


def arguments_of(target: str) -> Arguments | None:
    """From the source where that says it, as an import takes seconds; None for built-in functions.

    Raises:
        ConfigError: it does not import.
    """
    return arguments_in_source(*dotted(target)) or imported_arguments(resolve_target(target))


def imported_arguments(factory: Any) -> Arguments | None:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # built-in functions have none
        return None
    return Arguments(parameters, _type_hints(factory))


def _type_hints(factory: Any) -> dict[str, Any]:
    function = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return {}


def is_node(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return NODE in hint.__metadata__
    return any(is_node(part) for part in typing.get_args(hint))


def takes_named_nodes(hint: Any) -> bool:
    """Whether an argument is a mapping of names to nodes, or may be one."""
    if typing.get_origin(hint) is Mapping:
        return is_node(typing.get_args(hint)[1])
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and any(
        takes_named_nodes(part) for part in typing.get_args(hint)
    )


def _takes_path(hint: Any) -> bool:
    return hint is Path or any(_takes_path(part) for part in typing.get_args(hint))


def _nearest_module(name: str) -> str:
    """For a missing module: the nearest one in its package."""
    package, _, missing = name.rpartition(".")
    try:
        inside = [info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    except (ImportError, ValueError, AttributeError):
        return _nearest_module(package) if package else ""
    return nearest(missing, inside)
