"""docs/config.md has every argument of what configs build, with the default of the code."""

import inspect
import re
from collections import defaultdict
from importlib import import_module
from typing import Any

import pytest
import yaml

from olvae.config import recipes, resolve_target
from olvae.data.shards.latent_source import LatentSource
from olvae.data.source import Source
from olvae.models.parts.part import Part
from olvae.modules.base import Decoder, Encoder
from study.arguments import MARKER, REQUIRED, arguments, meaning, with_tables
from tests.docs.markdown import ROOT
from tests.recipes import recipe

PAGE = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (`\w+`(?:<br>`\w+`)*) \| (.*?) \| (.*) \|$", re.M)


def rows(table: str) -> dict[str, tuple[str, str]]:
    """Default and meaning by argument; one row may be of several."""
    found: dict[str, tuple[str, str]] = {}
    for names, defaults, text in ROW.findall(table):
        each = zip(names.split("<br>"), defaults.split("<br>"), strict=True)
        found |= {name.strip("`"): (default.strip("`"), text) for name, default in each}
    return found


def targets(node: Any) -> set[str]:
    found = {node["target"]} if isinstance(node, dict) and "target" in node else set()
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return found.union(*map(targets, children))


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def test_every_argument_of_the_page_has_the_default_of_the_code():
    listed: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for target, names in MARKER.findall(PAGE):
        found = rows(arguments(target, names.split()))
        assert not found.keys() & listed[target].keys(), target
        listed[target] |= found
    for target, found in listed.items():
        parameters = inspect.signature(resolve_target(target)).parameters
        assert found.keys() == parameters.keys(), target
        for name, (default, text) in found.items():
            expected = parameters[name].default
            if expected is inspect.Parameter.empty:
                assert default == REQUIRED, f"{target}: {name}"
            else:
                plain = list(expected) if isinstance(expected, tuple) else expected
                assert yaml.safe_load(default) == plain, f"{target}: {name}"
            assert len(text) > 9, f"{target}: {name}: {text}"
            assert not text.startswith("see "), f"{target}: {name}: {text}"


def test_no_class_that_a_config_may_build_is_missing():
    listed = {target for target, _ in MARKER.findall(PAGE)}
    built = set().union(*(targets(recipe(path)) for path in recipes().values()))
    assert {target for target in built if target.startswith("olvae.")} <= listed

    # All parts, sources and networks, also those that no recipe has.
    folders = ("models/parts", "data", "modules")
    for path in (path for folder in folders for path in (ROOT / "olvae" / folder).rglob("*.py")):
        if path.stem != "__init__":
            import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for cls in set().union(*map(subclasses, (Part, Source, Encoder, Decoder))):
        name = f"{cls.__module__}.{cls.__qualname__}"
        ours = cls.__module__.startswith(("olvae.data.", "olvae.models.parts.", "olvae.modules."))
        is_base = any(child.__module__.startswith("olvae.") for child in cls.__subclasses__())
        # LatentSource is for diffusion models, which these configs do not train.
        if ours and not is_base and cls is not LatentSource:
            assert name in listed


def test_the_site_shows_the_tables_in_place_of_their_markers():
    shown = with_tables(PAGE)
    assert "<!-- arguments:" not in shown
    assert "| `kl_weight` | `0.01` |" in shown


TABLES = {
    "lossconfig.params": "olvae.losses.objective.Objective",
    "adversary_config.params": "olvae.models.adversary.Adversary",
    "model.params": "olvae.models.liteautoencoder.LiteAutoencoderKL",
    "parts.teacher.params": "olvae.models.parts.teacher.Teacher",
    "parts.alignment.params": "olvae.models.parts.alignment.Alignment",
}
"""Tables that are written by hand, by what their headings name."""


def test_defaults_of_tables_that_are_written_by_hand_are_the_codes():
    pages = [ROOT / "docs" / name for name in ("objective.md", "parts.md", "sources.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    tables = re.findall(
        r"^\| argument of `([\w.]+)` \| default .*\n\|.*\n((?:\|.*\n)+)", text, re.M
    )
    assert {node for node, _ in tables} == TABLES.keys()
    for node, body in tables:
        parameters = inspect.signature(resolve_target(TABLES[node])).parameters
        for line in body.splitlines():
            names, defaults = (re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3])
            assert set(names) <= parameters.keys(), line
            if REQUIRED in line.split("|")[2]:
                assert parameters[names[0]].default is inspect.Parameter.empty, line
            for name, default in zip(names, defaults, strict=False):
                expected = parameters[name].default
                plain = list(expected) if isinstance(expected, tuple) else expected
                assert yaml.safe_load(default) == plain, line


class Documented:
    """A class.

    Args:
        of_two, names: one text,
            on two lines.
        kl_weight: see :class:`~olvae.losses.objective.Objective`.
    """

    def __init__(self, of_two: int, names: str = "a", kl_weight: float = 0.1) -> None: ...


class Undocumented(Documented):
    """``alone``: the only argument."""

    def __init__(self, alone: int, names: int, missing: int) -> None: ...


def test_a_meaning_is_the_docstrings_or_a_base_classes():
    assert meaning(Documented, "names") == "one text, on two lines."
    assert meaning(Undocumented, "names") == "one text, on two lines."
    assert meaning(Undocumented, "alone") == "the only argument."
    assert meaning(Documented, "kl_weight").startswith("of the posterior's KL divergence")
    with pytest.raises(LookupError, match="Undocumented: no docstring has its argument missing"):
        meaning(Undocumented, "missing")
