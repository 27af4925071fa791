"""Resolve, check and build nodes of ``target`` and ``params``; find every mistake of a config before anything is built.

Importing a model takes several times as long as importing torch, because of Lightning. So the arguments of a class of
this package or of Lightning are read from its source: its constructor is compiled without its body, and the names in
its annotations are looked up from module to module. Anything unusual, such as a decorator, is left to an import.
"""

import __future__

import ast
import builtins
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
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

Config = dict[str, Any]
T = TypeVar("T")
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
"""Arguments of the model, and the setting from which the trainer fills them in."""

SET_BY_TRAINING = {
    "callbacks": "lightning.callbacks",
    "logger": "lightning.logger",
    "default_root_dir": "the option logdir of olvae train",
    "use_distributed_sampler": "the data source",
    "enable_checkpointing": "lightning.callbacks (KeepCheckpoints)",
    **dict.fromkeys(
        ("limit_train_batches", "overfit_batches", "fast_dev_run"), "lightning.trainer.max_steps"
    ),
    **dict.fromkeys(
        ("min_steps", "min_epochs"), "lightning.trainer.max_steps"
    ),  # with which a run would not stop
    "max_time": "the option time-limit of olvae train",
    **dict.fromkeys(("enable_progress_bar", "barebones"), "lightning.callbacks"),
}
"""Arguments of Lightning's Trainer that this package sets, and the setting to use instead."""


class ConfigError(ValueError):
    """One or more mistakes of a config, one line each."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a library of one of this package's extras; ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs {module}: pip install 'open-litevae[{extra}]'"
        ) from error


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message on an unknown name: the nearest known one, if one is near."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def validate(config: Mapping[str, Any]) -> list[str]:
    """List every mistake of a config, one line each, without building anything.

    Finds unknown and missing keys, wrong types and targets that do not import, in nodes at any depth, and suggests the
    nearest right name; the Trainer's keys are checked against Lightning's signature.
    """
    mistakes = list(unknown_keys(config, TOP_LEVEL))
    mistakes += _check_model(config["model"]) if "model" in config else ["model: missing"]
    if "data" in config:
        mistakes += _check_node(config["data"], "data")
    if config.get("lightning") is not None:
        mistakes += _check_lightning(config["lightning"])
    return _with_places(mistakes, config) or list(_check_colours(config))


def _with_places(mistakes: list[str], config: Mapping[str, Any]) -> list[str]:
    """Suggest another node's argument for an unknown key: one of its name, or a near one where its node has none."""
    if not any(": unknown key; " in mistake for mistake in mistakes):
        return mistakes
    places = key_places(config)

    def completed(mistake: str) -> str:
        match = re.fullmatch(r"((?:[^:]*\.)?([^.:]+): unknown key); (known:|did) .*", mistake)
        if match is None:
            return mistake
        found = [match[2]] if match[2] in places else []
        if not found and match[3] == "known:":
            found = difflib.get_close_matches(match[2], places, n=1, cutoff=0.75)
        return f"{match[1]}; did you mean {places[found[0]]}?" if found else mistake

    return [completed(mistake) for mistake in mistakes]


def key_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the dotted places of Lightning's and the nodes' arguments by name; of equal names, the outermost one."""
    places = {
        name: f"lightning.trainer.{name}"
        for name in arguments_of("lightning.pytorch.Trainer").parameters
    }
    return places | {
        place.rpartition(".")[2]: place for place in reversed(list(_argument_places(config, "")))
    }


def _argument_places(value: Any, where: str) -> Iterator[str]:
    """Yield the dotted place of every argument of the nodes at any depth, outer ones first."""
    if not isinstance(value, Mapping):
        return
    if isinstance(value.get("target"), str):
        with contextlib.suppress(ConfigError):
            yield from (
                f"{where}params.{name}" for name in arguments_of(value["target"]).parameters
            )
    for key, inner in value.items():
        yield from _argument_places(inner, f"{where}{key}.")


def _check_colours(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for a perceptual loss, whose network sees three channels, on images of another number."""
    channels = ((config.get("data") or {}).get("params") or {}).get("channels", 3)
    loss = (config["model"].get("params") or {}).get("lossconfig") or {}
    params = {"lpips_weight": 1.0, "lpips_channels": None, **(loss.get("params") or {})}
    if loss.get("target") != "olvae.losses.objective.Objective" or not params["lpips_weight"]:
        return
    shown, where = params["lpips_channels"], "model.params.lossconfig.params"
    if shown is None and channels != 3:
        yield (
            f"{where}.lpips_weight: its network sees three channels of colour, the images have {channels}: set it to "
            f"0, or name three of them, as in {where}.lpips_channels=[2,1,0]"
        )
    elif shown is not None and (
        len(shown) != 3 or not all(0 <= channel < channels for channel in shown)
    ):
        yield f"{where}.lpips_channels: expected three of {channels} channels, counted from 0, got {list(shown)}"


def check(config: Mapping[str, Any]) -> None:
    """Check a config to train with; raise ConfigError if it has mistakes, or no data."""
    mistakes = validate(config)
    if "data" not in config:
        mistakes.append("data: missing: the source of the training images")
    if mistakes:
        raise ConfigError(*mistakes)


def unknown_keys(given: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Yield a line for each key that is not known, with the nearest one that is."""
    for key in given:
        if key not in known:
            yield f"{prefix}{key}: unknown key" + (
                nearest(str(key), known) or f"; known: {', '.join(known)}"
            )


def check_arguments(factory: Any, params: Any) -> Iterator[str]:
    """Yield a line for each mistake in the arguments of a class or function, and of the nodes among them."""
    yield from _check_arguments(_imported_arguments(factory), params, "")


def resolve_target(target: str) -> Any:
    """Import the class or function that a dotted path names; else raise ConfigError with the nearest right name."""
    module_name, name = _dotted(target)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"target {target!r} does not import: {error}" + _nearest_module(module_name)
        ) from error
    if not hasattr(module, name):
        near = nearest(name, dir(module))
        raise ConfigError(f"target {target!r} does not import: {module_name} has no {name}{near}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"target {target!r} is a {type(found).__name__}, not a class or function")
    return found


def resolve_class(target: str, base: type[T]) -> type[T]:
    """Import the class derived from ``base`` that a dotted path names; raise ConfigError if it is none."""
    found = resolve_target(target)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{target} is not a kind of {base.__module__}.{base.__qualname__}")
    return found


def instantiate(node: Mapping[str, Any], **filled_in: Any) -> Any:
    """Build what a node describes, with further arguments; ConfigError if it is none, or its params do not fit."""
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
    """Copy a node, and those in it, with other paths: strings and lists in arguments whose type allows a Path.

    Those beside a ``path`` that is a repository of the Hugging Face hub are in the repository, and stay.
    """
    if not isinstance(node, dict) or not isinstance(node.get("target"), str):
        return typing.cast(Config, node)  # instantiate says what is wrong
    arguments = arguments_of(node["target"])
    params = dict(node.get("params") or {})
    path = str(params.get("path"))
    at_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists()
    for name, value in params.items():
        hint = arguments.hints.get(name)
        if _holds_nodes(hint):
            params[name] = map_nodes(value, hint, lambda part, _: with_paths(part, change))
        elif _takes_path(hint) and not at_hub:
            params[name] = (
                [change(part) for part in value]
                if isinstance(value, list)
                else value and change(value)
            )
    return {**node, "params": params}


def map_nodes(value: Any, hint: Any, change: Callable[[Any, str], Any]) -> Any:
    """Change the nodes in an argument's value: one node, a list of nodes, or nodes or null by name.

    ``hint`` is the argument's type; ``change`` gets a node and its place in the value, such as ``.name``.
    """
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    kinds = {typing.get_origin(part) for part in (typing.get_args(hint) if is_union else (hint,))}
    if isinstance(value, list) and kinds & {Sequence, list}:
        return [change(part, f".{i}") for i, part in enumerate(value)]
    if isinstance(value, Mapping) and kinds & {Mapping, dict}:
        return {
            name: part if part is None else change(part, f".{name}") for name, part in value.items()
        }
    return value if value is None else change(value, "")


def _holds_nodes(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return NODE in hint.__metadata__
    return any(_holds_nodes(part) for part in typing.get_args(hint))


def _takes_path(hint: Any) -> bool:
    return hint is Path or any(_takes_path(part) for part in typing.get_args(hint))


def _check_lightning(section: Any) -> Iterator[str]:
    if not isinstance(section, Mapping):
        yield f"lightning: expected a mapping of {', '.join(LIGHTNING)}, got {section!r}"
        return
    yield from unknown_keys(section, LIGHTNING, "lightning.")
    trainer = section.get("trainer")
    if trainer is not None:
        yield from _check_arguments(
            arguments_of("lightning.pytorch.Trainer"), trainer, "lightning.trainer"
        )
        for key in SET_BY_TRAINING.keys() & trainer if isinstance(trainer, Mapping) else ():
            yield f"lightning.trainer.{key}: is set by {SET_BY_TRAINING[key]}; leave it out"
    for key, filled_in in (
        ("callbacks", ()),
        ("logger", ("save_dir",)),
    ):  # a logger gets the run's folder
        nodes = section.get(key)
        if isinstance(nodes, Mapping):
            for name, node in nodes.items():
                yield from _check_node(node, f"lightning.{key}.{name}", filled_in)
        elif nodes is not None:
            yield f"lightning.{key}: expected a mapping of names to nodes, got {nodes!r}"


def _check_model(node: Any) -> Iterator[str]:
    if not isinstance(node, Mapping):
        yield f"model: expected {NODE}, got {node!r}"
        return
    yield from unknown_keys(node, ("base_learning_rate", "from", *NODE_KEYS), "model.")
    rate = node.get("base_learning_rate", 1e-4)
    if not isinstance(rate, float | int) or isinstance(rate, bool) or not 0 < rate < math.inf:
        yield f"model.base_learning_rate: expected a positive number, got {rate!r}"
    params = node.get("params") or {}
    filled_in: tuple[str, ...] = ("learning_rate",)  # by the trainer
    if isinstance(params, Mapping):
        for key in SET_BY_TRAINER.keys() & params:
            yield f"model.params.{key}: set {SET_BY_TRAINER[key]} instead"
        if node.get("from") is not None:
            filled_in += FROM_START
            params = {key: value for key, value in params.items() if key not in FROM_START}
            if not isinstance(node["from"], str):
                yield f"model.from: expected an autoencoder to start from, got {node['from']!r}"
    target = {"target": node["target"]} if "target" in node else {}
    yield from _check_node({**target, "params": params}, "model", filled_in)


def _check_node(node: Any, where: str, filled_in: Container[str] = ()) -> Iterator[str]:
    """Yield the mistakes of a node at a place in the config; arguments that are ``filled_in`` may be missing."""
    if not isinstance(node, Mapping):
        yield f"{where}: expected {NODE}, got {node!r}"
        return
    yield from unknown_keys(node, NODE_KEYS, f"{where}.")
    if not isinstance(node.get("target"), str):
        yield f"{where}.target: " + ("expected a dotted path" if "target" in node else "missing")
        return
    try:
        arguments = arguments_of(node["target"])
    except ConfigError as error:
        yield f"{where}.target: {error}"
        return
    yield from _check_arguments(arguments, node.get("params") or {}, f"{where}.params", filled_in)


class Arguments(NamedTuple):
    """Parameters by name, without ``self``, and the types of those that are annotated."""

    parameters: Mapping[str, inspect.Parameter]
    hints: Mapping[str, Any]
    known: bool = True  # or of a built-in without a signature, which may take anything


def _check_arguments(
    arguments: Arguments, params: Any, where: str, filled_in: Container[str] = ()
) -> Iterator[str]:
    if not isinstance(params, Mapping):
        yield f"{where}: expected a mapping of arguments, got {params!r}"
        return
    prefix = f"{where}." if where else ""
    parameters = arguments.parameters.values()
    named = {a.name: a for a in parameters if a.kind not in (a.VAR_KEYWORD, a.VAR_POSITIONAL)}
    if arguments.known and not any(a.kind is a.VAR_KEYWORD for a in parameters):
        yield from unknown_keys(params, tuple(named), prefix)
    for name, argument in named.items():
        if argument.default is argument.empty and name not in params and name not in filled_in:
            yield f"{prefix}{name}: missing"
    for name, value in params.items():
        yield from _check_value(value, arguments.hints.get(name), f"{prefix}{name}")


def _check_value(value: Any, hint: Any, where: str) -> Iterator[str]:
    if _holds_nodes(hint):
        mistakes: list[str] = []
        map_nodes(
            value, hint, lambda node, place: mistakes.extend(_check_node(node, f"{where}{place}"))
        )
        yield from mistakes
    elif hint is not None:
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError:
            name = hint.__name__ if inspect.isclass(hint) else str(hint)
            yield f"{where}: expected {name.replace('typing.', '').replace('collections.abc.', '')}, got {value!r}"


def _dotted(target: str) -> tuple[str, str]:
    """Split a target into its module and the class or function in it."""
    module, _, name = target.rpartition(".")
    right = module and all(part.isidentifier() for part in (*module.split("."), name))
    if not right or module.count(".") > 30:  # importing takes time by the square of their number
        raise ConfigError(
            f"target {target!r} is not a dotted path such as olvae.data.dataset.SamplePhotographs"
        )
    return module, name


def _nearest_module(name: str) -> str:
    """End the message on a missing module with the nearest one in its package."""
    package, _, missing = name.rpartition(".")
    try:
        inside = [
            info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)
        ]
    except (ImportError, ValueError, AttributeError):
        return _nearest_module(package) if package else ""
    return nearest(missing, inside)


def arguments_of(target: str) -> Arguments:
    """Find the arguments of a target, if possible without importing it."""
    module, name = _dotted(target)
    found = None if module in sys.modules else arguments_in_source(module, name)
    return found or _imported_arguments(resolve_target(target))


def _imported_arguments(factory: Any) -> Arguments:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:
        return Arguments({}, {}, known=False)
    function = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return Arguments(
            parameters, typing.get_type_hints(inspect.unwrap(function), include_extras=True)
        )
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return Arguments(parameters, {})


def arguments_in_source(module: str, name: str) -> Arguments | None:
    """Read the arguments of ``module.name`` from its source; None if that takes an import, or the name is wrong."""
    if not _is_read(module):
        return None
    stub = ast.parse("def stub(): pass")
    try:
        names, function = _constructor(module, name)
        stub.body[0].args = function.args  # type: ignore[attr-defined]
        as_text = __future__.annotations.compiler_flag  # annotations are not evaluated here
        exec(compile(ast.fix_missing_locations(stub), names.module, "exec", as_text), {}, names)
        compiled = names.pop("stub")
        hints = typing.get_type_hints(compiled, {}, names, include_extras=True)
    except (AttributeError, LookupError, NameError, OSError, SyntaxError, TypeError):
        return None
    return Arguments(
        {n: p for n, p in inspect.signature(compiled).parameters.items() if n != "self"}, hints
    )


def _is_read(module: str) -> bool:
    """Whether a module's source is read, so that finding arguments does not import it."""
    return module.partition(".")[0] in ("olvae", "lightning")


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, _: Any) -> Any:
        return cls


class Unimported(metaclass=_AnyAttribute):
    """Stand-in for a module or class that is not imported: a value of a config is never an instance of it."""


class _Names(dict[str, Any]):
    """Names of a module, each resolved when an expression uses it."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module
        self.statements: dict[str, ast.stmt] = {}
        for statement in ast.parse(_file(module).read_bytes()).body:
            match statement:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                    self.statements[name] = statement
                case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                    self.statements |= {
                        a.asname or a.name.partition(".")[0]: statement for a in aliases
                    }
                case (
                    ast.Assign(targets=[ast.Name(id=name)])
                    | ast.AnnAssign(target=ast.Name(id=name))
                ):
                    self.statements[name] = statement

    def __missing__(self, name: str) -> Any:
        if name not in self.statements and hasattr(builtins, name):
            raise KeyError(name)  # Python looks for built-in names next
        match self.statements.get(name):
            case ast.Import() | ast.ImportFrom():
                module, original = self.imported(name)
                if module in sys.modules or module.partition(".")[0] in sys.stdlib_module_names:
                    found = importlib.import_module(module)
                    return getattr(found, original) if original else found
                return _names(module)[original] if _is_read(module) and original else Unimported
            case ast.Assign(value=value) | ast.AnnAssign(value=value) if value is not None:
                return eval(compile(ast.Expression(value), self.module, "eval"), {}, self)
        return Unimported

    def imported(self, name: str) -> tuple[str, str]:
        """Return the module that a name is imported from, and its name there, empty for the module itself."""
        statement = self.statements[name]
        assert isinstance(statement, ast.Import | ast.ImportFrom)
        (alias,) = (a for a in statement.names if name == (a.asname or a.name.partition(".")[0]))
        if isinstance(statement, ast.ImportFrom):
            return statement.module or "", alias.name
        return (alias.name if alias.asname else name), ""


_names = cache(_Names)


def _file(module: str) -> Path:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    path = Path(next(iter((spec and spec.submodule_search_locations) or ("",))), *rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _constructor(module: str, name: str) -> tuple[_Names, ast.FunctionDef]:
    """Find a function, or the ``__init__`` of a class or of its base; LookupError if it is unusual."""
    names = _names(module)
    match names.statements[name]:
        case ast.ImportFrom():
            return _constructor(*names.imported(name))
        case ast.FunctionDef(decorator_list=[]) as function:
            return names, function
        case ast.ClassDef(decorator_list=[], keywords=[]) as node:
            own = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
            if "__new__" not in own and "__init__" in own:
                return names, own["__init__"]
            if "__new__" not in own and not node.bases:
                return names, typing.cast(ast.FunctionDef, ast.parse("def nothing(): pass").body[0])
            if "__new__" not in own and len(node.bases) == 1:
                base, _, attribute = ast.unparse(node.bases[0]).partition(".")
                return (
                    _constructor(names.imported(base)[0], attribute)
                    if attribute
                    else _constructor(module, base)
                )
    raise LookupError(f"{module}.{name} has to be imported")
