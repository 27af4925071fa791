"""The arguments of a class or function, read from its source instead of imported.

A config is checked against the constructors that it names. Importing them takes many times as long as importing torch
(Lightning imports torchmetrics, torchvision, SciPy and more), and what they do is not needed. So modules of FOLLOWED
packages are parsed, names are followed from module to module, and classes among annotations are stood in for by empty
ones: a value of a config is never an instance of a class. Whatever that does not settle (metaclasses, dataclasses,
decorators that replace) is left to an import.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from inspect import Parameter
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Arguments", "arguments_in_source"]

FOLLOWED = ("olvae", "lightning")

ACCEPT_PLAIN_VALUES = ("Protocol", "TypedDict")
"""Bases of classes that a value of a config can belong to."""


class Arguments(NamedTuple):
    """Parameters by name, without ``self``, and the types of those that are annotated."""

    parameters: Mapping[str, Parameter]
    hints: Mapping[str, Any]


class _UnsettledError(Exception):
    """Only an import can tell."""


def arguments_in_source(module: str, name: str) -> Arguments | None:
    """The arguments of ``module.name``; None where only an import can tell, or finds what is wrong.

    Parameters with a default have the default ``None``.
    """
    package, *rest = module.split(".")
    if package not in FOLLOWED or not all(part.isidentifier() for part in rest) or _imported(module):
        return None
    try:
        return _arguments(_look_up(module, name))
    except _UnsettledError:
        return None


def _imported(module: str) -> bool:
    return module in sys.modules


class _Module:
    """Stands in for a module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return _look_up(self._name, name)


class _Definition(type):
    """Stands in for a class, and describes a function; ``node`` is None in packages that are not followed."""

    module: str
    node: ast.ClassDef | ast.FunctionDef | None

    def __getitem__(cls, _: Any) -> "_Definition":
        return cls


def _definition(module: str, name: str, node: ast.ClassDef | ast.FunctionDef | None = None) -> _Definition:
    return _Definition(name, (), {"__module__": module, "module": module, "node": node})


class _Names(dict[str, Any]):
    """The names that an expression in a module may use."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __missing__(self, name: str) -> Any:
        if name not in _statements(self.module):
            raise KeyError(name)  # eval goes on to the built-in names
        return _look_up(self.module, name)


def _look_up(module: str, name: str) -> Any:
    package = module.partition(".")[0]
    if _imported(module) or package in sys.stdlib_module_names:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            raise _UnsettledError from None
    if package not in FOLLOWED:
        return _definition(module, name) if _file(f"{module}.{name}") is None else _Module(f"{module}.{name}")
    statement = _statements(module).get(name)
    match statement:
        case ast.ClassDef(bases=bases) if any(ast.unparse(base).endswith(ACCEPT_PLAIN_VALUES) for base in bases):
            raise _UnsettledError
        case ast.ClassDef() | ast.FunctionDef():
            return _definition(module, name, statement)
        case ast.Import():
            (full,) = (alias.name for alias in statement.names if name in (alias.asname, alias.name.partition(".")[0]))
            renamed = any(alias.asname == name for alias in statement.names)
            return _Module(full if renamed else name)
        case ast.ImportFrom():
            (original,) = (alias.name for alias in statement.names if name == (alias.asname or alias.name))
            return _look_up(_absolute(module, statement), original)
        case ast.Assign() | ast.AnnAssign() if statement.value is not None:
            return _evaluate(statement.value, module)
    if _file(f"{module}.{name}") is not None:
        return _Module(f"{module}.{name}")
    raise _UnsettledError


def _absolute(module: str, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    file = _file(module)
    parts = module.split(".") + (["__init__"] if file is not None and file.name == "__init__.py" else [])
    return ".".join([*parts[: -statement.level], *([statement.module] if statement.module else [])])


@cache
def _file(module: str) -> Path | None:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in (Path(folder, *rest, "__init__.py"), Path(folder, *rest).with_suffix(".py")):
            if file.is_file():
                return file
    return None


@cache
def _statements(module: str) -> Mapping[str, ast.stmt]:
    """What defines each name of a module, the last one where there are several."""
    file = _file(module)
    if file is None:
        raise _UnsettledError
    found: dict[str, ast.stmt] = {}
    for statement in ast.parse(file.read_bytes()).body:
        found |= dict.fromkeys(_defined(statement), statement)
    return found


def _defined(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.ClassDef() | ast.FunctionDef():
            yield statement.name
        case ast.Import():
            yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
        case ast.ImportFrom():
            yield from (alias.asname or alias.name for alias in statement.names)
        case ast.Assign():
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name


def _hint(annotation: ast.expr, module: str) -> Any:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    hint = _evaluate(annotation, module)
    if "ForwardRef(" in repr(hint):
        raise _UnsettledError
    return type(None) if hint is None else hint


def _evaluate(expression: ast.expr, module: str) -> Any:
    try:
        return eval(compile(ast.Expression(expression), module, "eval"), {}, _Names(module))
    except (NameError, TypeError, AttributeError, SyntaxError):
        raise _UnsettledError from None


def _arguments(found: Any) -> Arguments:
    if not isinstance(found, _Definition) or found.node is None or found.node.decorator_list:
        raise _UnsettledError
    if isinstance(found.node, ast.FunctionDef):
        return _of_function(found.node, found.module, method=False)
    owner = _constructor(found)
    return Arguments({}, {}) if owner is None else _of_function(*owner, method=True)


def _constructor(found: Any) -> tuple[ast.FunctionDef, str] | None:
    """``__init__`` of a class or of the first base that has one, and its module."""
    if found is object or found is Any:
        return None
    if not isinstance(found, _Definition) or not isinstance(found.node, ast.ClassDef) or found.node.keywords:
        raise _UnsettledError
    functions = {node.name: node for node in found.node.body if isinstance(node, ast.FunctionDef)}
    if "__new__" in functions:
        raise _UnsettledError
    if "__init__" in functions:
        return functions["__init__"], found.module
    bases = (_constructor(_evaluate(base, found.module)) for base in found.node.bases)
    return next((owner for owner in bases if owner is not None), None)


def _of_function(function: ast.FunctionDef, module: str, method: bool) -> Arguments:
    given = function.args
    positional = [*given.posonlyargs, *given.args][method:]
    required = len(positional) - len(given.defaults)
    kinds: list[tuple[ast.arg | None, Any, bool]] = [
        *((arg, Parameter.POSITIONAL_OR_KEYWORD, i >= required) for i, arg in enumerate(positional)),
        *(
            (arg, Parameter.KEYWORD_ONLY, d is not None)
            for arg, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        ),
        (given.vararg, Parameter.VAR_POSITIONAL, False),
        (given.kwarg, Parameter.VAR_KEYWORD, False),
    ]
    parameters: dict[str, Parameter] = {}
    hints: dict[str, Any] = {}
    for arg, kind, optional in kinds:
        if arg is not None:
            parameters[arg.arg] = Parameter(arg.arg, kind, default=None if optional else Parameter.empty)
            if arg.annotation is not None:
                hints[arg.arg] = _hint(arg.annotation, module)
    return Arguments(parameters, hints)
