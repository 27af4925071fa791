"""Arguments read from a source without importing it, against those of the import."""

import importlib
import inspect
import re

import pytest

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
