"""Arguments read from a source without importing it, against those of the import."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Sequence
from fractions import Fraction

import pytest

from olvae.config import source_signatures
from olvae.config.source_signatures import arguments_in_source
from tests.config.recipe_targets import read_targets


def words(hint):
    """Sorted, as typing has one order for all equal unions: that of the first."""
    return sorted(re.findall(r"[\w.']+", str(hint)))


def test_arguments_in_source_are_those_of_an_import():
    """Names, kinds, defaults and types of arguments."""
    for target in read_targets():
        module, _, name = target.rpartition(".")
        factory = getattr(importlib.import_module(module), name)
        found = arguments_in_source(module, name)
        assert found is not None
        expected = inspect.signature(factory).parameters
        assert list(found.parameters) == list(expected)
        for argument, theirs in expected.items():
            ours = found.parameters[argument]
            assert (ours.kind, ours.default is ours.empty) == (
                theirs.kind,
                theirs.default is theirs.empty,
            ), argument
        function = inspect.unwrap(factory.__init__ if inspect.isclass(factory) else factory)
        hints = inspect.get_annotations(function, eval_str=True)
        for argument in found.parameters.keys() & hints:
            assert words(found.hints[argument]) == words(hints[argument]), (target, argument)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("olvae.no_such_module", "Name"),
        ("olvae.modules.wavelet", "no_such_name"),
        ("olvae.config.reading", "TOP_LEVEL"),
        ("olvae.evaluation.runner", "Request"),
        ("torch.nn", "Identity"),
    ],
)
def test_arguments_in_source_are_none_where_it_has_to_be_imported(module, name):
    assert arguments_in_source(module, name) is None


SAMPLE = """
import collections.abc
import os.path as place
import sample_other
import unheard_of.thing
from unheard_of import Other
from collections.abc import Sequence
from fractions import Fraction as Number
from sample_other import Base as Renamed, function
from wsgiref.util import FileWrapper

WIDTH = 3
Size: type = int
later: int

def plain(a: int, b: Sequence[int] = (), *, c: Number | None = None, d: Size = WIDTH): ...
def by_module(a: collections.abc.Sequence[int], b: FileWrapper, c: str = place.sep): ...
def unknown(a: unheard_of.thing.Kind[int], b: later = later, c: Other = 1, d: nowhere = 2): ...
@staticmethod
def decorated(a: int): ...

class Empty: ...
class Own:
    def __init__(self, a: int, b: "Empty | None" = None): ...
class Child(Own): ...
class ByAttribute(sample_other.Base): ...
class ByName(Renamed): ...
class Two(Own, Empty): ...
class Meta(Own, metaclass=type): ...
class New:
    def __new__(cls, a): ...
    def __init__(self, a): ...
"""
OTHER = """
class Base:
    def __init__(self, width: int = 8): ...
def function(x: float): ...
"""


@pytest.fixture
def sample(tmp_path, monkeypatch) -> str:
    """Two modules that are read; returns the first one's name."""
    for name, text in (("sample_first", SAMPLE), ("sample_other", OTHER)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(source_signatures, "_file", lambda module: tmp_path / f"{module}.py")
    monkeypatch.setattr(source_signatures, "_is_read", lambda module: module.startswith("sample_"))
    monkeypatch.delitem(sys.modules, "wsgiref.util", raising=False)
    source_signatures._names.cache_clear()
    return "sample_first"


def test_names_in_a_signature_are_looked_up_from_module_to_module(sample):
    found = arguments_in_source(sample, "plain")
    assert found.hints == {"a": int, "b": Sequence[int], "c": Fraction | None, "d": int}
    parameters = found.parameters.values()
    assert [p.default for p in parameters] == [inspect.Parameter.empty, (), None, 3]
    found = arguments_in_source(sample, "by_module")
    file_wrapper = importlib.import_module("wsgiref.util").FileWrapper
    assert found.hints == {"a": Sequence[int], "b": file_wrapper, "c": str}
    assert found.parameters["c"].default == os.sep
    # What is not imported, or has no value, stands for itself.
    unknown = source_signatures.Unimported
    found = arguments_in_source(sample, "unknown")
    assert found.hints == dict.fromkeys("abcd", unknown)
    assert found.parameters["b"].default is unknown
    assert not hasattr(unknown, "__metadata__")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Empty", {}),
        ("Own", {"a": inspect.Parameter.empty, "b": None}),
        ("Child", {"a": inspect.Parameter.empty, "b": None}),
        ("ByAttribute", {"width": 8}),
        ("ByName", {"width": 8}),
        ("Renamed", {"width": 8}),
        ("function", {"x": inspect.Parameter.empty}),
        *((name, None) for name in ("decorated", "Two", "Meta", "New", "WIDTH", "place")),
    ],
)
def test_a_constructor_is_found_in_its_class_or_its_one_base(sample, name, expected):
    found = arguments_in_source(sample, name)
    if expected is None:
        assert found is None
        return
    assert {p.name: p.default for p in found.parameters.values()} == expected
