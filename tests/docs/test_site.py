"""The documentation as a site: it builds strictly, its links hold,
and the generated pages have everything."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import olvae
from tests.docs.commands import every_command
from tests.docs.markdown import DOCS, ROOT

REPOSITORY = "https://github.com/open-litevae/open-litevae/blob/main/"


def test_a_number_that_begins_a_line_is_of_a_list():
    """Markdown makes an item of a sentence's last number, where a line breaks before it."""
    found = []
    for file in [file for file in DOCS if file.suffix == ".md"]:
        last = 0
        for line in file.read_text(encoding="utf-8").splitlines():
            match = re.match(r"\s*(\d+)[.)] ", line)
            if match and int(match[1]) not in (1, last + 1):
                found.append(f"{file.name}: {line}")
            last = int(match[1]) if match else last
    assert found == []


def build(folder: Path, docs: Path = ROOT / "docs") -> subprocess.CompletedProcess[str]:
    """As ``make docs`` does, from other files, into another folder."""
    config = folder / "mkdocs.yml"
    text = (
        (ROOT / "mkdocs.yml")
        .read_text(encoding="utf-8")
        .replace("[docs/hooks.py]", f"[{ROOT}/docs/hooks.py]")
    )
    config.write_text(f"{text}\ndocs_dir: {docs}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        config,
        "-d",
        folder / "site",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


class Page(HTMLParser):
    """What a page links to and shows, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [values[name] or "" for name in ("href", "src") if name in values]
        self.anchors |= {values[name] or "" for name in ("id", "name") if name in values}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return {
        path: Page(path.read_text(encoding="utf-8")) for path in (folder / "site").rglob("*.html")
    }


@pytest.mark.slow
def test_every_document_is_a_page_whose_links_hold(site):
    pages = [path for path in site if path.name == "index.html"]
    written = [
        *(path for path in DOCS if ".github" not in path.parts),
        *ROOT.glob("examples/notebooks/*.ipynb"),
    ]
    assert len(pages) == len([*written, "cli", "reference"])
    for path in pages:
        for link in site[path].links:
            if link.startswith(REPOSITORY):
                assert (ROOT / unquote(link.removeprefix(REPOSITORY)).partition("#")[0]).exists(), (
                    f"{path}: {link}"
                )
            elif "://" not in link and not link.startswith(("mailto:", "data:")):
                target, _, anchor = unquote(link).partition("#")
                there = (path.parent / target).resolve() if target else path
                there = there / "index.html" if there.is_dir() else there
                assert there.is_file(), f"{path}: {link}"
                assert there not in site or anchor in site[there].anchors, f"{path}: {link}"


@pytest.mark.slow
def test_generated_pages_have_every_command_and_every_public_name(site):
    anchors = {path.parent.name: page.anchors for path, page in site.items()}
    assert {name.replace(" ", "-") for name, _ in every_command()} <= anchors["cli"]
    assert {f"olvae.{name}" for name in olvae.__all__ if name != "__version__"} <= anchors[
        "reference"
    ]


@pytest.mark.slow
def test_a_link_to_nowhere_stops_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    for path in (ROOT / "docs").iterdir():
        (tmp_path / "docs" / path.name).symlink_to(path)
    (tmp_path / "docs" / "data.md").unlink()
    (tmp_path / "docs" / "data.md").write_text(
        "# Data\n\n[here](nothing.md), [there](train.md#nothing)\n"
    )
    done = build(tmp_path, tmp_path / "docs")
    assert done.returncode == 1
    assert "'nothing.md'" in done.stderr
    assert "'#nothing'" in done.stderr


def test_the_drawn_layers_are_those_of_the_import_contract():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    diagram = re.search(r"^```mermaid\n(.*?)^```$", text, re.M | re.S)
    assert diagram
    layers = re.search(
        r"^layers = \[\n(.*?)^\]$", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert layers
    drawn = [set(box.split(" · ")) for box in re.findall(r'\["(.*?)"\]', diagram[1])]
    assert drawn == [set(re.findall(r"olvae\.(\w+)", line)) for line in layers[1].splitlines()]


def test_walks_of_the_architecture_name_files_and_functions_that_exist():
    """A file and, after it, a function, a class, or a class and its method."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    stops = re.findall(r"`((?:\w+/)*\w+\.py)`(?:\s+`(?:(\w+)\.)?(\w+)`)?", text)
    assert len(stops) > 70
    for file, *names in stops:
        found = [path for path in (ROOT / "olvae" / file, ROOT / file) if path.exists()]
        assert found, file
        source = found[0].read_text(encoding="utf-8")
        for name in filter(None, names):
            assert re.search(rf"(?:def|class) {name}\b", source), f"{file}: {name}"


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


@pytest.mark.slow  # needs mkdocs
def test_pages_of_notebooks_have_what_the_cells_printed_and_showed():
    hooks = load_hooks()
    for page, file in hooks.NOTEBOOKS.items():
        notebook = json.loads((ROOT / file).read_text(encoding="utf-8"))
        text, pictures = hooks.as_markdown(notebook, page.removesuffix(".md"))
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        assert len(pictures) == sum("image/jpeg" in output.get("data", {}) for output in outputs)
        assert pictures
        for name, picture in pictures.items():
            assert f"]({name})" in text
            assert picture.startswith(b"\xff\xd8")
        for output in outputs:
            assert "".join(output.get("text", "")).strip("\n") in text
