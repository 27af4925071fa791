"""Every block of the docs: Python runs, commands exist with their flags, YAML is a valid config."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from olvae.config import resolve_target, validate
from olvae.data.places import load
from tests.docs.commands import FLAG, check, every_command, find, flags_of, known_flags
from tests.docs.conftest import run_command
from tests.docs.markdown import (
    CONFIGS,
    DOCS,
    EXAMPLES,
    ROOT,
    Block,
    blocks,
    commands,
    split_commands,
    without_blocks,
)

RUN, NETWORK, NAMES = "run", "needs network", "imports only: "
"""Marks: a shell block to run.

Python blocks to import from only, for want of a network or for the reason given.
"""

SLOW = (
    "api.md",
    "export.md",
    "extending.md",
    "formats.md",
    "large_images.md",
    "volumes.md",
    "scenes.md",
)
"""Pages whose blocks take seconds."""

LANGUAGES = ("python", "sh", "console", "powershell", "yaml", "text", "mermaid")


def of(*languages: str) -> Any:
    files = [file for file in DOCS if blocks(file, *languages)]
    return pytest.mark.parametrize("file", files, ids=lambda file: file.name)


def save_files(file: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Write the blocks that begin with a comment of their file's name,
    to be imported and loaded from the folder."""
    for block in blocks(file, "python", "yaml"):
        if named := re.match(r"# (\w+)\.(py|yaml)\n", block.text):
            (folder / f"{named[1]}.{named[2]}").write_text(block.text, encoding="utf-8")
            patch.delitem(sys.modules, named[1], raising=False)
    patch.syspath_prepend(folder)


def runnable(file: Path) -> list[Block]:
    return [block for block in blocks(file) if block.language == "python" or block.mark == RUN]


every_file = pytest.mark.parametrize(
    "file", [*DOCS, *EXAMPLES, *CONFIGS], ids=lambda file: file.name
)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=pytest.mark.slow if file.name in SLOW else ())
        for file in DOCS
        if runnable(file)
    ],
    ids=lambda file: file.name,
)
def test_python_blocks_of_the_docs_run(file, workspace, monkeypatch, capsys):
    """Python in order, in one namespace per file,
    and between it the commands that are marked to run."""
    save_files(file, workspace, monkeypatch)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in runnable(file):
        if block.language != "python":
            for words in commands(block):
                run_command(words)
            continue
        code = "\n" * (block.line - 1) + block.text  # so that a traceback names the document's line
        tree = ast.parse(code, str(file))
        if block.mark == NETWORK or block.mark.startswith(NAMES):
            tree.body = [
                node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
        exec(compile(tree, str(file), "exec"), namespace)


def test_marks_of_blocks_are_few_and_known():
    marked = [block for file in DOCS for block in blocks(file) if block.mark]
    for block in marked:
        allowed = (RUN,) if block.language in ("sh", "console") else (NETWORK,)
        assert block.mark in allowed or (
            block.language == "python" and block.mark.startswith(NAMES)
        ), block.place
    assert len([block for block in marked if block.mark != RUN]) <= 4
    marks = sum(file.read_text().count("<!-- docs:") for file in DOCS)
    assert marks == len(marked), "a mark belongs on the line above a block"


@every_file
def test_commands_of_the_docs_exist(file, tmp_path, monkeypatch):
    """In shell blocks, and in an example's docstring."""
    for name in ("examples", "scripts", "tests", "train.py", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    save_files(file, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    if file.suffix == ".md":
        lines = [
            (block.place, words)
            for block in blocks(file, "sh", "console", "powershell")
            for words in commands(block)
        ]
    else:
        found = re.findall(r"^(?: {4})?((?:olvae|python) .*)$", file.read_text(), re.M)
        assert found or file.suffix != ".py"
        lines = [(file.name, words) for line in found for words in split_commands(line)]
    for place, words in lines:
        try:
            check(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{place}: {' '.join(words)}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize(
    "command", [pytest.param(command, id=name) for name, command in every_command()]
)
def test_examples_in_help_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"Example: (.*)", command.help)
    assert examples
    for words in (words for line in examples for words in split_commands(line)):
        check(words)


def is_module(name: str) -> bool:
    """Look without importing the module: what it needs may be an extra that is not installed."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent is a class, or nothing
        return False


@every_file
def test_names_in_the_docs_exist(file):
    """Dotted names of this package, files of this repository, commands and flags in backticks."""
    text = file.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/.])olvae(?:\.\w+)+", text):
        if not is_module(name):
            resolve_target(name)
    for path in re.findall(
        r"(?<![\w/.])(?:olvae/recipes|docs|examples|scripts|tests)/[\w./-]*\w", text
    ):
        assert any((folder / path).exists() for folder in (ROOT, file.parent)), path
    codes = [
        " ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks(file))
    ]
    for code in codes:
        if code.startswith("olvae "):
            group, *rest = code.split()[1:]
            # olvae bench train|data
            for part in rest[0].split("|") if rest and "|" in rest[0] else [None]:
                words = [group, *([part, *rest[1:]] if part else rest)]
                command, rest_of_it = find(words)
                assert set(FLAG.findall(" ".join(rest_of_it))) <= flags_of(command), code
        elif code.startswith("--"):
            assert code.split()[0].split("=")[0] in known_flags(), code


@every_file
def test_no_page_goes_by_the_link_to_the_recipes(file):
    """In a checkout on Windows it is a file: recipes have names, and a folder."""
    text = file.read_text(encoding="utf-8").replace("tests/configs/", "")
    assert file.name in ("architecture.md", "decisions.md") or "configs/" not in text


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_of_the_docs_lead_somewhere(file):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", without_blocks(file)):
        if "://" in target:
            continue
        there = file.parent / target if target else file
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
            slugs = [
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            ]
            assert anchor[1:] in slugs, f"{target}{anchor}"


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_code_of_the_docs_is_in_blocks_of_a_known_language(file):
    for block in blocks(file):
        assert block.language in LANGUAGES, f"{block.place}: {block.language}"


@of("yaml")
def test_yaml_blocks_of_the_docs_are_valid_configs(file, tmp_path, monkeypatch):
    """A block with targets is a part of a config: it is checked over the demo's."""
    save_files(file, tmp_path, monkeypatch)
    for block in blocks(file, "yaml"):
        content = yaml.safe_load(block.text)
        if "target:" not in block.text:
            continue
        part = tmp_path / "part.yaml"
        part.write_text(yaml.safe_dump({"data": content}) if "target" in content else block.text)
        assert validate(load([ROOT / "olvae" / "recipes" / "demo.yaml", part])) == [], block.place


def test_the_results_table_is_that_of_its_configs():
    """Weights and discriminators of the published rows,
    against the config file that a row names."""
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [AB]\d \| `(\w+)` \| \[R\] \| ([\w-]+) \| ([\d./ ]+) \|", page, re.M)
    assert [name for name, _, _ in rows] == ["A1", "A2", "B0", "B1", "B2", "B3", "B4", "B5"]
    sizes = {16: "UNetGAN-S", 32: "UNetGAN-M", 64: "UNetGAN-L"}
    for name, discriminator, weights in rows:
        params = load([ROOT / "olvae" / "recipes" / "imagenet" / f"{name}.yaml"])["model"]["params"]
        objective = params["lossconfig"]["params"]
        assert [float(weight) for weight in weights.split("/")] == [
            objective[f"{term}_weight"] for term in ("kl", "wavelet", "gaussian")
        ], name
        node = params.get("adversary_config", {}).get("params", {}).get("discriminator_config")
        found = "none" if node is None else node["target"].rpartition(".")[2]
        if found == "UNetGAN":
            found = sizes[node["params"]["base_channels"]]
        assert found == discriminator, name


def test_the_demos_page_has_its_recipes_numbers():
    page = " ".join((ROOT / "docs" / "demo.md").read_text(encoding="utf-8").split())
    for name in ("demo", "demo_b", "folder", "finetune/photos"):
        config = load([name])
        steps, data = config["lightning"]["trainer"]["max_steps"], config["data"]["params"]
        assert f"{steps} steps of {data['batch_size']} crops of {data['size']} pixels" in page
