"""Resolve and build nodes of ``target`` and ``params``; find a target's arguments, if possible without importing it.

Importing a model takes several times as long as importing torch, because of Lightning. So the arguments of a class of
this package or of Lightning are read from its source: its constructor is compiled without its body, and the names in
its annotations are looked up from module to module. Anything unusual, such as a decorator, is left to an import.
"""

import ast
import builtins
import contextlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union

from olvae.config.reading import Config, ConfigError, nearest

T = TypeVar("T")

NODE = "a node of target and params"
Node = Annotated[Mapping[str, Any], NODE]
"""The type of a constructor's argument that is a node; the constructor instantiates it."""

LONGEST = 30
"""Dots in the name of a module; importing takes time by their square."""

READ_AS_SOURCE = ("olvae", "lightning")
"""Packages whose modules are not imported to find arguments."""


class Arguments(NamedTuple):
    """Parameters by name, without ``self``, and the types of those that are annotated."""

    parameters: Mapping[str, inspect.Parameter]
    hints: Mapping[str, Any]


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
            f"target {target!r} does not import: {module_name} has no {name}" + nearest(name, dir(module))
        )
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"target {target!r} is a {type(found).__name__}, not a class or function")
    return found


def resolve_class(target: str, base: type[T]) -> type[T]:
    """Import the class that a dotted path names.

    Raises:
        ConfigError: it does not import, or is not derived from ``base``.
    """
    found = resolve_target(target)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{target} is not a kind of {base.__module__}.{base.__qualname__}")
    return found


def _dotted(target: str) -> tuple[str, str]:
    """Split a target into its module and the class or function in it."""
    module, _, name = target.rpartition(".")
    right = module and all(part.isidentifier() for part in (*module.split("."), name))
    if not right or module.count(".") > LONGEST:
        raise ConfigError(f"target {target!r} is not a dotted path such as olvae.data.dataset.SamplePhotographs")
    return module, name


def _nearest_module(name: str) -> str:
    """End the message on a missing module with the nearest one in its package."""
    package, _, missing = name.rpartition(".")
    try:
        inside = [info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    except (ImportError, ValueError, AttributeError):
        return _nearest_module(package) if package else ""
    return nearest(missing, inside)


def instantiate(node: Mapping[str, Any], **filled_in: Any) -> Any:
    """Build what a node describes; ``filled_in`` are further arguments.

    Raises:
        ConfigError: it is not a node, its target does not import, or its params do not fit.
    """
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


def map_nodes(value: Any, hint: Any, change: Callable[[Any, str], Any]) -> Any:
    """Change the nodes in an argument's value: one node, a list of nodes, or nodes or null by name.

    Args:
        hint: the argument's type, with a :data:`Node` in it.
        change: gets a node and its place in the value, such as ``.name``.
    """
    kinds = {typing.get_origin(part) for part in _alternatives(hint)}
    if isinstance(value, list) and kinds & {Sequence, list}:
        return [change(part, f".{i}") for i, part in enumerate(value)]
    if isinstance(value, Mapping) and kinds & {Mapping, dict}:
        return {name: part if part is None else change(part, f".{name}") for name, part in value.items()}
    return value if value is None else change(value, "")


def holds_nodes(hint: Any) -> bool:
    """Return whether a type is a node, or one of nodes."""
    if typing.get_origin(hint) is Annotated:
        return NODE in hint.__metadata__
    return any(holds_nodes(part) for part in typing.get_args(hint))


def with_paths(node: Mapping[str, Any], change: Callable[[str], str]) -> Config:
    """Copy a node, and those in it, with other paths: strings and lists in arguments whose type allows a Path."""
    if not isinstance(node, dict) or not isinstance(node.get("target"), str):
        return typing.cast(Config, node)  # instantiate says what is wrong
    arguments = arguments_of(node["target"])
    params = dict(node.get("params") or {})
    for name, value in params.items():
        hint = arguments.hints.get(name) if arguments is not None else None
        if holds_nodes(hint):
            params[name] = map_nodes(value, hint, lambda part, _: with_paths(part, change))
        elif _takes_path(hint):
            params[name] = [change(part) for part in value] if isinstance(value, list) else value and change(value)
    return {**node, "params": params}


def _takes_path(hint: Any) -> bool:
    return hint is Path or any(_takes_path(part) for part in typing.get_args(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def arguments_of(target: str) -> Arguments | None:
    """Find the arguments of a target; None for built-in functions.

    Raises:
        ConfigError: it does not import.
    """
    module, name = _dotted(target)
    found = None if module in sys.modules else arguments_in_source(module, name)
    return found or imported_arguments(resolve_target(target))


def imported_arguments(factory: Any) -> Arguments | None:
    """Find the arguments of a class or function; None if it is a built-in one that does not say."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:
        return None
    function = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return Arguments(parameters, typing.get_type_hints(inspect.unwrap(function), include_extras=True))
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return Arguments(parameters, {})


def arguments_in_source(module: str, name: str) -> Arguments | None:
    """Read the arguments of ``module.name`` from its source; None if that takes an import, or the name is wrong."""
    if not _is_read(module):
        return None
    stub = ast.parse("def stub(): pass")
    try:
        names, function = _constructor(module, name)
        for argument in (node for node in ast.walk(function.args) if isinstance(node, ast.arg)):
            if argument.annotation is not None and not isinstance(argument.annotation, ast.Constant):
                argument.annotation = ast.fix_missing_locations(ast.Constant(ast.unparse(argument.annotation)))
        stub.body[0].args = function.args  # type: ignore[attr-defined]
        exec(compile(ast.fix_missing_locations(stub), names.module, "exec"), {}, names)
        compiled = names.pop("stub")
        hints = typing.get_type_hints(compiled, {}, names, include_extras=True)
    except (AttributeError, LookupError, NameError, OSError, SyntaxError, TypeError):
        return None
    return Arguments({n: p for n, p in inspect.signature(compiled).parameters.items() if n != "self"}, hints)


def _is_read(module: str) -> bool:
    return module.partition(".")[0] in READ_AS_SOURCE


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
                    self.statements |= {a.asname or a.name.partition(".")[0]: statement for a in aliases}
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    self.statements[name] = statement

    def __missing__(self, name: str) -> Any:
        if name not in self.statements and hasattr(builtins, name):
            raise KeyError(name)  # Python goes on to the built-in names
        statement = self.statements.get(name)
        match statement:
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
            if statement.level:
                raise LookupError("a relative import")
            return statement.module or "", alias.name
        return (alias.name if alias.asname else name), ""


@cache
def _names(module: str) -> _Names:
    return _Names(module)


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
                return _constructor(names.imported(base)[0], attribute) if attribute else _constructor(module, base)
    raise LookupError(f"{module}.{name} has to be imported")
