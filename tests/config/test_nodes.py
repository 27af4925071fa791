"""Targets: imported, built, and their arguments read from the source."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from olvae.config import ConfigError, instantiate, load, recipes, resolve_target, validate, with_paths
from olvae.config.nodes import Node, arguments_in_source, map_nodes
from olvae.models.spec import AutoencoderSpec

ROOT = Path(__file__).parent.parent.parent


def test_instantiate():
    assert instantiate({"target": "fractions.Fraction", "params": {"numerator": 1, "denominator": 2}}) == 0.5
    assert instantiate({"target": "fractions.Fraction"}, numerator=3) == 3
    for node, message in (
        ({"params": {}}, "target and params"),
        ({"target": "Fraction"}, "not a dotted path"),
        ({"target": "no.such.module"}, "does not import"),
        ({"target": "fractions.Fractoin"}, "did you mean Fraction"),
        ({"target": "olvae.config.nodes.check", "params": {"confg": 1}}, "nodes.check: "),
    ):
        with pytest.raises(ConfigError, match=message):
            instantiate(node)


def test_a_target_of_very_many_parts_is_no_dotted_path():
    """Importing the parts, one after the other, takes time by the square of their number."""
    with pytest.raises(ConfigError, match="is not a dotted path"):
        resolve_target("olvae" + ".olvae" * 3000)


@pytest.mark.parametrize(
    ("value", "hint", "places"),
    [
        ({"target": "a.A"}, Node, [""]),
        (None, Node | None, []),
        ([{"target": "a.A"}, 3], list[Node], [".0", ".1"]),
        ({"x": {"target": "a.A"}, "y": None, "z": 3}, dict[str, Node | None] | None, [".x", ".z"]),
    ],
)
def test_nodes_in_values(value, hint, places):
    visited = []
    assert map_nodes(value, hint, lambda node, place: (visited.append(place), node)[1]) == value
    assert visited == places


def test_paths_in_nodes_at_any_depth():
    params = {"root": "a", "size": 8, "batch_size": 1}
    folder = {"target": "olvae.data.picture_folder.FolderSource", "params": params}
    mix = {"target": "olvae.data.mix.MixSource", "params": {"sources": [folder, folder], "weights": [1, 2]}}
    changed = with_paths(mix, lambda path: f"/{path}")
    assert [node["params"]["root"] for node in changed["params"]["sources"]] == ["/a", "/a"]
    assert params["root"] == "a"


def targets(node):
    if isinstance(node, dict):
        if isinstance(node.get("target"), str):
            yield node["target"]
        for part in node.values():
            yield from targets(part)


READ = sorted(
    {target for name in recipes() for target in targets(load([name])) if target.startswith(("olvae.", "lightning."))}
    | {
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.callbacks.Callback",
        "olvae.data.picture_folder.FolderSource",
        "olvae.models.optimization.lr_factor",
        "olvae.training.callbacks.ImageGrids",
    }
)


def words(hint):
    """Sorted, as typing has one order for all equal unions: that of the first."""
    return sorted(re.findall(r"[\w.']+", str(hint)))


@pytest.mark.parametrize("target", READ)
def test_the_source_says_what_an_import_says(target):
    """Names, kinds, defaults and types of arguments."""
    module, _, name = target.rpartition(".")
    factory = getattr(importlib.import_module(module), name)
    found = arguments_in_source(module, name)
    assert found is not None
    expected = inspect.signature(factory).parameters
    assert list(found.parameters) == list(expected)
    for argument, theirs in expected.items():
        ours = found.parameters[argument]
        assert (ours.kind, ours.default is ours.empty) == (theirs.kind, theirs.default is theirs.empty), argument
    function = inspect.unwrap(factory.__init__ if inspect.isclass(factory) else factory)
    hints = inspect.get_annotations(function, eval_str=True)
    for argument in found.parameters.keys() & hints:
        assert words(found.hints[argument]) == words(hints[argument]), argument


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
def test_what_has_to_be_imported(module, name):
    assert arguments_in_source(module, name) is None


MISTAKES = """
include: imagenet/B5
model:
  params: {use_ema: 3, embed_dimm: 1, encoder_config: {params: {scale: XL, wavelet: 1}}, betas: [a, 1]}
data: {params: {batch_size: four}}
lightning: {trainer: {max_step: 1, precision: 7}, callbacks: {a: {target: olvae.training.callbacks.ImageGrids}}}
"""

WITHOUT_IMPORTS = """
import sys
from olvae.config import load, recipes, validate
configs = {name: load([name]) for name in recipes()}
published = configs.pop("olitevaeB_im_f8c12")  # names torch.nn.Identity
assert not any(map(validate, configs.values()))
print(validate(load([sys.argv[1]])))
print(sorted({"torch", "lightning", "torchvision", "torchmetrics", "diffusers", "scipy"} & set(sys.modules)))
assert not validate(published)
"""


def test_validating_recipes_imports_neither_torch_nor_lightning(tmp_path):
    """And finds the same mistakes as with everything imported."""
    path = tmp_path / "mistakes.yaml"
    path.write_text(MISTAKES)
    command = [sys.executable, "-c", WITHOUT_IMPORTS, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    mistakes, imported = done.stdout.splitlines()
    assert imported == "[]"
    for target in READ:
        resolve_target(target)
    expected = validate(load([path]))
    assert len(expected) == 8
    assert mistakes == str(expected)


def test_a_path_is_no_target(tmp_path):
    """A received config must not have a file beside it read, whose annotations would be evaluated."""
    (tmp_path / "evil.py").write_text("def Name(x: open('evaluated', 'w')): ...")
    target = f"olvae.{tmp_path}/evil"
    spec = {"target": f"{target}.Name", "params": {}}
    content = {"model": {"params": {"encoder_config": spec, "decoder_config": spec, "embed_dim": 4}}}
    with pytest.raises(ConfigError, match="not a dotted path"):
        AutoencoderSpec.from_content(content, "received", only_ours=True)
    assert not Path("evaluated").exists()
