"""Read a class's constructor arguments from its source file, without importing it.

Importing a model imports Lightning and torch, which takes about eight times as long as all the rest
of `olvae validate`. So a constructor of this package or of Lightning is found in the syntax tree of
its file, and only its parameters are compiled. The names in its annotations and defaults are looked
up from module to module, again in source. Anything unusual, such as a decorator, gives None, and
the caller imports the target after all.
"""

import __future__

import ast
import builtins
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """Parameters by name, without ``self``, and the types of those that are annotated."""

    parameters: Mapping[str, inspect.Parameter]
    hints: Mapping[str, Any]
    # False for a built-in without a signature, which may take anything.
    known: bool = True


def arguments_in_source(module: str, name: str) -> Arguments | None:
    """Read the arguments of ``module.name`` from its source.

    None if they can't be read without an import, or there is no such name.
    """
    if not _is_read(module):
        return None
    try:
        names, function = _constructor(module, name)

        # A function with the constructor's parameters and no body. Python evaluates its defaults
        # in `names`, and leaves the annotations as text.
        stub = ast.parse("def stub(): pass")
        stub.body[0].args = function.args  # type: ignore[attr-defined]
        as_text = __future__.annotations.compiler_flag
        code = compile(ast.fix_missing_locations(stub), names.module, "exec", as_text)
        exec(code, {}, names)
        compiled = names.pop("stub")

        # Now the annotations' text is evaluated in `names` too.
        hints = typing.get_type_hints(compiled, {}, names, include_extras=True)
    except (AttributeError, LookupError, NameError, OSError, SyntaxError, TypeError):
        return None
    parameters = dict(inspect.signature(compiled).parameters)
    parameters.pop("self", None)
    return Arguments(parameters, hints)


def _is_read(module: str) -> bool:
    """Whether a module's source is read, so that finding arguments does not import it."""
    return module.partition(".")[0] in ("olvae", "lightning")


class _AnyAttribute(type):
    """Metaclass of Unimported: its attributes and subscripts, as in ``x.Y[int]``, are itself."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, _: Any) -> Any:
        return cls


class Unimported(metaclass=_AnyAttribute):
    """Stand-in for a module or class that is not imported; no value of a config is an instance."""


class _Names(dict[str, Any]):
    """Namespace of a module, in which ``exec`` and ``eval`` look names up.

    It stays empty: Python calls ``__missing__`` for each name that an expression uses.
    """

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module
        # The statement at the module's top level that defines or imports each name.
        self.statements: dict[str, ast.stmt] = {}
        for statement in ast.parse(_file(module).read_bytes()).body:
            match statement:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                    self.statements[name] = statement
                case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                    for alias in aliases:
                        self.statements[_bound_name(alias)] = statement
                case (
                    ast.Assign(targets=[ast.Name(id=name)])
                    | ast.AnnAssign(target=ast.Name(id=name))
                ):
                    self.statements[name] = statement

    def __missing__(self, name: str) -> Any:
        if name not in self.statements and hasattr(builtins, name):
            # Python looks for built-in names next.
            raise KeyError(name)
        match self.statements.get(name):
            case ast.Import() | ast.ImportFrom():
                module, original = self.imported(name)
                # Only what is loaded already is imported, or the standard library, which is quick.
                if module in sys.modules or module.partition(".")[0] in sys.stdlib_module_names:
                    found = importlib.import_module(module)
                    return getattr(found, original) if original else found
                if original and _is_read(module):
                    return _names(module)[original]
            case ast.Assign(value=value) | ast.AnnAssign(value=value) if value is not None:
                # A type alias or a constant.
                return eval(compile(ast.Expression(value), self.module, "eval"), {}, self)
        # A class of the module itself, an object of another library, or nothing that is known.
        return Unimported

    def imported(self, name: str) -> tuple[str, str]:
        """Return a name's module, and its name there, which is empty for the module itself."""
        statement = self.statements[name]
        assert isinstance(statement, ast.Import | ast.ImportFrom)
        (alias,) = (alias for alias in statement.names if name == _bound_name(alias))
        if isinstance(statement, ast.ImportFrom):
            return statement.module or "", alias.name
        # `import a.b as c` names a.b, `import a.b` names a.
        return (alias.name if alias.asname else name), ""


def _bound_name(alias: ast.alias) -> str:
    """Return the name that an import defines: ``import a.b as c`` c, and ``import a.b`` a."""
    return alias.asname or alias.name.partition(".")[0]


_names = cache(_Names)


def _file(module: str) -> Path:
    """Find a module's file; ``find_spec`` of a submodule would import its packages."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(package)
    path = Path(spec.submodule_search_locations[0], *rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _constructor(module: str, name: str) -> tuple[_Names, ast.FunctionDef]:
    """Find a function, or the ``__init__`` of a class or of its base; LookupError if unusual."""
    names = _names(module)
    unusual = LookupError(f"{module}.{name} has to be imported")
    match names.statements[name]:
        case ast.ImportFrom():
            # Imported from where it is defined.
            return _constructor(*names.imported(name))
        case ast.FunctionDef(decorator_list=[]) as function:
            return names, function
        case ast.ClassDef(decorator_list=[], keywords=[], bases=bases, body=body):
            methods = {part.name: part for part in body if isinstance(part, ast.FunctionDef)}
            if "__new__" in methods:
                raise unusual
            if "__init__" in methods:
                return names, methods["__init__"]
            if not bases:
                nothing = ast.parse("def nothing(): pass")
                return names, typing.cast(ast.FunctionDef, nothing.body[0])
            if len(bases) == 1:
                # The base is a name here, or an attribute of an imported module.
                base, _, attribute = ast.unparse(bases[0]).partition(".")
                if not attribute:
                    return _constructor(module, base)
                return _constructor(names.imported(base)[0], attribute)
    raise unusual
