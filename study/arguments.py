"""Tabulate what configs may set: arguments, defaults of the code, and meanings of the docstrings.

docs/hooks.py puts the tables into docs/config.md when the site is built.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from typing import Any

import yaml

from study.tables import table

MARKER = re.compile(r"^<!-- arguments: ([\w.]+)((?: \w+)*) -->$", re.M)
"""Stands where a table belongs: a target, and the names of its arguments if not all are meant."""

ROLE = re.compile(r":\w+:`~?([\w.]+)`")
SEE = re.compile(r"(?:see|as) :\w+:`~?([\w.]+)`(?:'s)?\.?")
"""A meaning that another docstring has."""

ALONE = re.compile(r"^ *``(\w+)``: (.+?)(?=\n *\n|\Z)", re.M | re.S)
"""A class's only argument, without a section."""

REQUIRED = "required"


def with_tables(page: str) -> str:
    """The page with a table for each marker."""
    return MARKER.sub(lambda match: arguments(match[1], match[2].split()), page)


def arguments(target: str, names: list[str] | None = None) -> str:
    """The table of a class's arguments: of all, or of some by name."""
    cls = find(target)
    parameters = inspect.signature(cls).parameters
    lines: list[list[str]] = []
    for name in names or parameters:
        argument, default, text = f"`{name}`", default_of(parameters[name]), meaning(cls, name)
        if lines and lines[-1][2] == text:  # one meaning of several arguments
            lines[-1] = [f"{lines[-1][0]}<br>{argument}", f"{lines[-1][1]}<br>{default}", text]
        else:
            lines.append([argument, default, text])
    return table(["argument", "default", "meaning"], lines).replace("--:", "---")


def find(target: str) -> Any:
    """A class, a function, or a method by its dotted name."""
    module, names = target, []
    while module not in sys.modules:
        try:
            import_module(module)
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
    return reduce(getattr, names, sys.modules[module])


def default_of(parameter: inspect.Parameter) -> str:
    """The default as a config would write it."""
    if parameter.default is parameter.empty:
        return REQUIRED
    value = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f"`{text.partition(chr(10))[0]}`"


def meaning(owner: Any, name: str) -> str:
    """What a docstring has on an argument: the owner's, its bases', or the one that it refers to.

    Raises:
        LookupError: none has it.
    """
    for place in getattr(owner, "__mro__", (owner,)):
        text = described(place.__doc__ or "").get(name)
        if text is None:
            continue
        reference = SEE.fullmatch(text)
        if reference is None:
            return re.sub(r"``(.+?)``", r"`\1`", ROLE.sub(_short, text)).replace("|", r"\|")
        known = vars(sys.modules[place.__module__]).get(reference[1])
        return meaning(known or find(reference[1]), name)
    raise LookupError(f"{owner.__name__}: no docstring has its argument {name}")


def _short(match: re.Match[str]) -> str:
    return f"`{match[1].rpartition('.')[2]}`"


def described(docstring: str) -> Mapping[str, str]:
    """The texts on a docstring's arguments by name; one text may be of several."""
    _, _, section = docstring.partition("Args:\n")
    entries = re.split(r"\n(?=\S)", textwrap.dedent(section.partition("\n\n")[0]))
    entries += [f"{name}: {text}" for name, text in ALONE.findall(docstring)]
    found = {}
    for entry in entries:
        names, _, text = entry.partition(": ")
        for name in names.split(", "):
            found[name.strip()] = " ".join(text.split())
    return found
