"""The public names: those of docs/api.md, each with an example, imported when they are used."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import olvae

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^\| `(\w+)` \|", TEXT, re.M)
EXAMPLES = [ast.parse(block) for block in re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)]


def test_the_page_lists_every_public_name_once():
    assert sorted(DOCUMENTED) == sorted(set(olvae.__all__) - {"__version__"})


@pytest.mark.parametrize("name", olvae.__all__)
def test_each_is_there(name):
    value = getattr(olvae, name)
    assert name in dir(olvae)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert inspect.getdoc(value)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("modules.wavelet", "dwt2 idwt2 wavedec2"),
        ("modules.litevae.smc", "SMC"),
        ("modules.litevae.encoder_model", "LiteVAE_Encoder"),
        ("modules.litevae.decoder_model", "LiteVAE_Decoder"),
        ("models.liteautoencoder", "LiteAutoencoderKL"),
    ],
)
def test_published_paths_stay(module, names):
    found = importlib.import_module(f"olvae.{module}")
    assert all(getattr(found, name).__module__ == found.__name__ for name in names.split())


def test_each_has_an_example():
    imported, used = set(), set()
    for node in (node for tree in EXAMPLES for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and node.module == "olvae":
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Name):
            used.add(node.id)
    assert set(DOCUMENTED) <= imported & used


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="nothing"):
        _ = olvae.nothing


def test_importing_waits_for_nothing():
    slow = "{'torch', 'lightning', 'diffusers'}"
    code = f"import sys, olvae; olvae.__all__; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_waits_neither_for_lightning_nor_for_diffusers():
    code = """
import sys, olvae
from olvae.evaluation import runner
from olvae.export import decoding, encoding
olvae.find_target('olvae:photos-f8c4').load()
assert not {'lightning', 'diffusers'} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
