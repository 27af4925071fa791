"""Resolve, check and build nodes of ``target`` and ``params``.

All mistakes of a config are found before anything is built, and without importing its model: the
arguments of a target are read from its source (see :func:`arguments_in_source`).
"""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

from olvae.config.source_signatures import Arguments, arguments_in_source

Config = dict[str, Any]
_T = TypeVar("_T")
NODE = "a node of target and params"
Node = Annotated[Mapping[str, Any], NODE]
"""The type of a constructor's argument that is a node; the constructor instantiates it."""

TOP_LEVEL = ("model", "data", "lightning", "run")
NODE_KEYS = ("target", "params")
LIGHTNING = ("trainer", "callbacks", "logger")

FROM_START = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "initial_logvar")
"""Arguments of the model that are taken from the autoencoder of ``model.from``."""

SET_BY_TRAINER = {
    "learning_rate": "model.base_learning_rate",
    "accumulate_grad_batches": "lightning.trainer.accumulate_grad_batches",
    "gradient_clip_val": "lightning.trainer.gradient_clip_val",
}
"""Arguments of the model that the trainer fills in, and the setting that each comes from."""

SET_BY_TRAINING = {
    "callbacks": "lightning.callbacks",
    "logger": "lightning.logger",
    "default_root_dir": "the option logdir of olvae train",
    "use_distributed_sampler": "the data source",
    "enable_checkpointing": "lightning.callbacks (KeepCheckpoints)",
    # They write the checkpoints, and join the processes of a launcher.
    "plugins": "olvae train",
    "limit_train_batches": "lightning.trainer.max_steps",
    "overfit_batches": "lightning.trainer.max_steps",
    "fast_dev_run": "lightning.trainer.max_steps",
    # With a minimum, a run would not stop.
    "min_steps": "lightning.trainer.max_steps",
    "min_epochs": "lightning.trainer.max_steps",
    "max_time": "the option time-limit of olvae train",
    "enable_progress_bar": "lightning.callbacks",
    "barebones": "lightning.callbacks",
}
"""Arguments of Lightning's Trainer that this package sets, and the setting to use instead."""


OTHER_NAMES = {"upscale": "enlarge"}
"""Names that people give to arguments which are called otherwise here, too unlike to be near."""

ADDRESS = "https://github.com/open-litevae/open-litevae"  # the package is on no index

TRAIN = (
    "aiohttp",
    "diffusers",
    "fsspec",
    "jinja2",
    "lightning",
    "markupsafe",
    "matplotlib",
    "psutil",
    "pywt",
    "tensorboard",
    "torch_fidelity",
    "torchmetrics",
    "torchvision",
    "webdataset",
)
"""Names, for import, of the packages in the extra ``train``: using a model needs none of them."""


class ConfigError(ValueError):
    """One or more mistakes of a config, one line each."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


def import_extra(module: str, packages: str, purpose: str) -> Any:
    """Import a library of an extra; if it is missing, raise ConfigError with the pip command.

    ``packages``: names on PyPI of all that the purpose needs.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {module}: pip install {packages}") from error


def missing_package(error: BaseException | None) -> str | None:
    """Return what to do about a package of the extra ``train`` that an error misses, or None."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            package = (error.name or "").partition(".")[0]
            if package in TRAIN:
                return (
                    f"needs {package}: pip install 'open-litevae[train] @ git+{ADDRESS}', "
                    "or in a clone pip install -e '.[train]'"
                )
        error = error.__cause__
    return None


def nearest(name: str, known: Sequence[str]) -> str:
    """End a message on an unknown name: "; did you mean X?", or nothing if no name is near."""
    matches = difflib.get_close_matches(OTHER_NAMES.get(name, name), known)
    return f"; did you mean {matches[0]}?" if matches else ""


def validate(config: Mapping[str, Any]) -> list[str]:
    """List every mistake of a config, one line each, without building anything.

    Finds unknown and missing keys, wrong types and targets that do not import, in nodes at any
    depth, and suggests the nearest right name. Lightning's signature decides which keys the Trainer
    has.
    """
    mistakes = list(unknown_keys(config, TOP_LEVEL))
    if "model" in config:
        mistakes += _check_model(config["model"])
    else:
        mistakes.append("model: missing")
    if "data" in config:
        mistakes += _check_node(config["data"], "data")
    if config.get("lightning") is not None:
        mistakes += _check_lightning(config["lightning"])
    # The colours are checked last, because that needs arguments of the right types.
    return _with_places(mistakes, config) or list(_check_colours(config))


def _with_places(mistakes: list[str], config: Mapping[str, Any]) -> list[str]:
    """Suggest another node's argument for an unknown key: one of its name, or else a similar one.

    A similar one only where the key's own node has none.
    """
    if not any(": unknown key; " in mistake for mistake in mistakes):
        return mistakes
    places = key_places(config)
    completed = []
    for mistake in mistakes:
        # As `unknown_keys` writes it: "known:" lists all keys, because no key of the node is near.
        match = re.fullmatch(r"((?:[^:]*\.)?([^.:]+): unknown key); (known:|did) .*", mistake)
        if match is None:
            completed.append(mistake)
            continue
        start, key, ending = match.groups()
        found = [key] if key in places else []
        if not found and ending == "known:":
            found = difflib.get_close_matches(key, places, n=1, cutoff=0.75)
        completed.append(f"{start}; did you mean {places[found[0]]}?" if found else mistake)
    return completed


def key_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Map argument names of Lightning's Trainer and all nodes to dotted places; outer ones win."""
    places = {}
    for name in arguments_of("lightning.pytorch.Trainer").parameters:
        places[name] = f"lightning.trainer.{name}"
    # Inner places first, so that outer ones of the same name overwrite them.
    for place in reversed(list(_argument_places(config, ""))):
        places[place.rpartition(".")[2]] = place
    return places


def _argument_places(value: Any, where: str) -> Iterator[str]:
    """Yield the dotted place of every argument of the nodes at any depth, outer ones first."""
    if not isinstance(value, Mapping):
        return
    if isinstance(value.get("target"), str):
        with contextlib.suppress(ConfigError):
            for name in arguments_of(value["target"]).parameters:
                yield f"{where}params.{name}"
    for key, inner in value.items():
        yield from _argument_places(inner, f"{where}{key}.")


def _check_colours(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line if the perceptual loss, whose network sees RGB, gets other channels."""
    data = config.get("data") or {}
    channels = (data.get("params") or {}).get("channels", 3)
    loss = (config["model"].get("params") or {}).get("lossconfig") or {}
    params = {"lpips_weight": 1.0, "lpips_channels": None, **(loss.get("params") or {})}
    target = loss.get("target")
    if not isinstance(target, str) or not params["lpips_weight"]:
        return
    try:
        takes = arguments_of(target).parameters
    except ConfigError:
        return  # a loss that is not installed, in a config for inference
    if "lpips_channels" not in takes:
        return
    shown = params["lpips_channels"]
    where = "model.params.lossconfig.params"
    if shown is None:
        if channels != 3:
            yield (
                f"{where}.lpips_weight: its network sees three channels of colour, the images have "
                f"{channels}: set it to 0, or name three of them, as in "
                f"{where}.lpips_channels=[2,1,0]"
            )
    elif len(shown) != 3 or not all(0 <= channel < channels for channel in shown):
        yield (
            f"{where}.lpips_channels: expected three of {channels} channels, "
            f"counted from 0, got {list(shown)}"
        )


def check(config: Mapping[str, Any]) -> None:
    """Check a config to train with; raise ConfigError if it has mistakes, or no data."""
    mistakes = validate(config)
    if "data" not in config:
        mistakes.append("data: missing: the source of the training images")
    if mistakes:
        raise ConfigError(*mistakes)


def unknown_keys(given: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Yield a line for each unknown key, with the nearest known one, or all if none is near."""
    for key in given:
        if key not in known:
            ending = nearest(str(key), known) or f"; known: {', '.join(known)}"
            yield f"{prefix}{key}: unknown key{ending}"


def check_arguments(factory: Any, params: Any) -> Iterator[str]:
    """Yield a line for each mistake in the arguments of a class or function, nodes included."""
    yield from _check_arguments(_imported_arguments(factory), params, "")


def resolve_target(target: str) -> Any:
    """Import the class or function at a dotted path; ConfigError with the nearest right name."""
    module_name, name = _dotted(target)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if missing_package(error):
            raise
        raise ConfigError(
            f"target {target!r} does not import: {error}{_nearest_module(module_name)}"
        ) from error
    if not hasattr(module, name):
        near = nearest(name, dir(module))
        raise ConfigError(f"target {target!r} does not import: {module_name} has no {name}{near}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"target {target!r} is a {type(found).__name__}, not a class or function")
    return found


def resolve_class(target: str, base: type[_T]) -> type[_T]:
    """Import a subclass of ``base`` by its dotted path; raise ConfigError if it is not one."""
    found = resolve_target(target)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{target} is not a kind of {base.__module__}.{base.__qualname__}")
    return found


def check_name_or_path(setting: str, name: str, known: Collection[str]) -> None:
    """Raise ConfigError for a name that is neither known nor the path of a class of your own."""
    if name not in known and "." not in name:
        raise ConfigError(
            f"{setting} {name}: choose from {', '.join(known)}, or name a class, "
            "package.module.Class"
        )


def instantiate(node: Mapping[str, Any], **filled_in: Any) -> Any:
    """Build what a node describes, with further arguments.

    ConfigError if it is not a node, or its params do not fit the target's signature.
    """
    if not isinstance(node, Mapping) or "target" not in node:
        raise ConfigError(f"expected {NODE}, got {node!r}")
    factory = resolve_target(node["target"])
    params = {**(node.get("params") or {}), **filled_in}
    # Checked before the call, as a TypeError of the call itself may be a bug inside the factory.
    try:
        # ValueError: some built-in classes have no signature.
        with contextlib.suppress(ValueError):
            inspect.signature(factory).bind(**params)
    except TypeError as error:
        raise ConfigError(f"{node['target']}: {error}") from error
    return factory(**params)


def with_paths(node: Mapping[str, Any], change: Callable[[str], str]) -> Config:
    """Copy a node, and the nodes in it, with ``change`` applied to each path.

    Paths are strings, and lists of strings, in arguments whose type allows a Path. If the node's
    ``path`` is a repository of the Hugging Face hub, its other paths are files in the repository,
    and stay.
    """
    if not isinstance(node, dict) or not isinstance(node.get("target"), str):
        # Not a node: instantiate will report it.
        return typing.cast(Config, node)
    arguments = arguments_of(node["target"])
    params = dict(node.get("params") or {})
    path = str(params.get("path"))
    at_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists()
    for name, value in params.items():
        hint = arguments.hints.get(name)
        if _holds_nodes(hint):
            params[name] = map_nodes(value, hint, lambda part, _: with_paths(part, change))
        elif _takes_path(hint) and not at_hub:
            if isinstance(value, list):
                params[name] = [change(part) for part in value]
            elif value:
                params[name] = change(value)
    return {**node, "params": params}


def map_nodes(value: Any, hint: Any, change: Callable[[Any, str], Any]) -> Any:
    """Change the nodes in an argument's value: one node, a list of nodes, or nodes or null by name.

    ``hint`` is the argument's type; ``change`` gets a node and its place in the value, such as
    ``.name``.
    """
    # A single node's type is Annotated, so Mapping among the kinds means nodes by name.
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    alternatives = typing.get_args(hint) if is_union else (hint,)
    kinds = {typing.get_origin(part) for part in alternatives}
    if isinstance(value, list) and kinds & {Sequence, list}:
        return [change(part, f".{i}") for i, part in enumerate(value)]
    if isinstance(value, Mapping) and kinds & {Mapping, dict}:
        changed = {}
        for name, part in value.items():
            changed[name] = None if part is None else change(part, f".{name}")
        return changed
    return None if value is None else change(value, "")


def _holds_nodes(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return NODE in hint.__metadata__
    return any(_holds_nodes(part) for part in typing.get_args(hint))


def _takes_path(hint: Any) -> bool:
    return hint is Path or any(_takes_path(part) for part in typing.get_args(hint))


def _check_lightning(section: Any) -> Iterator[str]:
    """Yield the mistakes of the section ``lightning``: trainer, callbacks and logger."""
    if not isinstance(section, Mapping):
        yield f"lightning: expected a mapping of {', '.join(LIGHTNING)}, got {section!r}"
        return
    yield from unknown_keys(section, LIGHTNING, "lightning.")

    # The trainer: Lightning's arguments, without those that this package sets.
    trainer = section.get("trainer")
    if trainer is not None:
        arguments = arguments_of("lightning.pytorch.Trainer")
        yield from _check_arguments(arguments, trainer, "lightning.trainer")
        if isinstance(trainer, Mapping):
            for key in SET_BY_TRAINING.keys() & trainer:
                yield f"lightning.trainer.{key}: is set by {SET_BY_TRAINING[key]}; leave it out"
            epochs = trainer.get("check_val_every_n_epoch")
            if epochs not in (None, 1):
                yield (
                    f"lightning.trainer.check_val_every_n_epoch: {epochs}: a stream of images has "
                    "no epochs, so nothing would be validated: set val_check_interval, in steps"
                )

    # Callbacks and loggers: nodes by name. A logger gets the run's folder as save_dir.
    for key, filled_in in (("callbacks", ()), ("logger", ("save_dir",))):
        nodes = section.get(key)
        if isinstance(nodes, Mapping):
            for name, node in nodes.items():
                yield from _check_node(node, f"lightning.{key}.{name}", filled_in)
        elif nodes is not None:
            yield f"lightning.{key}: expected a mapping of names to nodes, got {nodes!r}"


def _check_model(node: Any) -> Iterator[str]:
    """Yield the mistakes of the section ``model``: a node with two keys of its own."""
    if not isinstance(node, Mapping):
        yield f"model: expected {NODE}, got {node!r}"
        return
    yield from unknown_keys(node, ("base_learning_rate", "from", *NODE_KEYS), "model.")

    rate = node.get("base_learning_rate", 1e-4)
    if not isinstance(rate, float | int) or isinstance(rate, bool) or not 0 < rate < math.inf:
        yield f"model.base_learning_rate: expected a positive number, got {rate!r}"

    # Arguments that the trainer, or the autoencoder of `from`, fills in may be missing.
    params = node.get("params") or {}
    filled_in: tuple[str, ...] = ("learning_rate",)
    if isinstance(params, Mapping):
        for key in SET_BY_TRAINER.keys() & params:
            yield f"model.params.{key}: set {SET_BY_TRAINER[key]} instead"
        if node.get("from") is not None:
            filled_in += FROM_START
            if not isinstance(node["from"], str):
                yield f"model.from: expected an autoencoder to start from, got {node['from']!r}"
            # Its decoder is not known yet, but all decoders have these arguments.
            decoder = params.get("decoder_config")
            if isinstance(decoder, Mapping):
                every = arguments_of("olvae.modules.base.Decoder")._replace(known=False)
                where = "model.params.decoder_config.params"
                added = decoder.get("params") or {}
                yield from _check_arguments(every, added, where, every.parameters)
            params = {key: value for key, value in params.items() if key not in FROM_START}
    plain_node = {"params": params}
    if "target" in node:
        plain_node["target"] = node["target"]
    yield from _check_node(plain_node, "model", filled_in)


def _check_node(node: Any, where: str, filled_in: Container[str] = ()) -> Iterator[str]:
    """Yield the mistakes of the node at ``where``; arguments in ``filled_in`` may be missing."""
    if not isinstance(node, Mapping):
        yield f"{where}: expected {NODE}, got {node!r}"
        return
    yield from unknown_keys(node, NODE_KEYS, f"{where}.")
    if "target" not in node:
        yield f"{where}.target: missing"
        return
    if not isinstance(node["target"], str):
        yield f"{where}.target: expected a dotted path"
        return
    try:
        arguments = arguments_of(node["target"])
    except ConfigError as error:
        yield f"{where}.target: {error}"
        return
    yield from _check_arguments(arguments, node.get("params") or {}, f"{where}.params", filled_in)


def _check_arguments(
    arguments: Arguments, params: Any, where: str, filled_in: Container[str] = ()
) -> Iterator[str]:
    """Yield a line for each unknown or missing argument, and each value of a wrong type."""
    if not isinstance(params, Mapping):
        yield f"{where}: expected a mapping of arguments, got {params!r}"
        return
    prefix = f"{where}." if where else ""
    parameters = arguments.parameters.values()
    named = {a.name: a for a in parameters if a.kind not in (a.VAR_KEYWORD, a.VAR_POSITIONAL)}
    takes_others = any(a.kind is a.VAR_KEYWORD for a in parameters)
    if arguments.known and not takes_others:
        yield from unknown_keys(params, tuple(named), prefix)
    for name, argument in named.items():
        if argument.default is argument.empty and name not in params and name not in filled_in:
            yield f"{prefix}{name}: missing"
    for name, value in params.items():
        yield from _check_value(value, arguments.hints.get(name), f"{prefix}{name}")


def _check_value(value: Any, hint: Any, where: str) -> Iterator[str]:
    """Yield the mistakes of an argument's value: a wrong type, or mistakes of the nodes in it."""
    if _holds_nodes(hint):
        mistakes: list[str] = []
        map_nodes(
            value, hint, lambda node, place: mistakes.extend(_check_node(node, f"{where}{place}"))
        )
        yield from mistakes
    elif hint is not None:
        from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError:
            name = hint.__name__ if inspect.isclass(hint) else str(hint)
            name = name.replace("typing.", "").replace("collections.abc.", "")
            yield f"{where}: expected {name}, got {value!r}"


def _dotted(target: str) -> tuple[str, str]:
    """Split a target into its module and the class or function in it."""
    module, _, name = target.rpartition(".")
    right = module and all(part.isidentifier() for part in (*module.split("."), name))
    # An import takes time by the square of the number of dots, so a long path could hang here.
    if not right or module.count(".") > 30:
        raise ConfigError(
            f"target {target!r} is not a dotted path such as olvae.data.dataset.SamplePhotographs"
        )
    return module, name


def _nearest_module(name: str) -> str:
    """End the message on a missing module with the nearest one in its package."""
    package, _, missing = name.rpartition(".")
    try:
        folders = importlib.import_module(package).__path__
        inside = [info.name for info in pkgutil.iter_modules(folders)]
    except (ImportError, ValueError, AttributeError):
        # The package is missing too: look one level higher.
        return _nearest_module(package) if package else ""
    return nearest(missing, inside)


def arguments_of(target: str) -> Arguments:
    """Find the arguments of a target, if possible without importing it."""
    module, name = _dotted(target)
    found = None if module in sys.modules else arguments_in_source(module, name)
    return found or _imported_arguments(resolve_target(target))


def _imported_arguments(factory: Any) -> Arguments:
    """Find the arguments of a class or function that is imported."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:
        return Arguments({}, {}, known=False)
    function = factory.__init__ if inspect.isclass(factory) else factory
    try:
        hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError):
        # Annotations that exist for type checkers only.
        hints = {}
    return Arguments(parameters, hints)
