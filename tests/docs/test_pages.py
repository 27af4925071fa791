"""Pages can be found: by their titles, which are the navigation's, and by what they begin with."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.docs.markdown import ROOT

ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "comfyui.md": "integrations/comfyui/README.md",
}
GENERATED = ("cli.md", "reference.md")
GUIDE_AT_MOST = 150  # lines


def entries(nav: Any, section: str = "") -> Iterator[tuple[str, str, str]]:
    """Each page of the navigation: its section of the first level, its title, its file."""
    for entry in nav:
        for title, inside in entry.items():
            if isinstance(inside, str):
                yield section, title, inside
            else:
                yield from entries(inside, section or title)


def navigation() -> list[tuple[str, str, str]]:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = text.partition("\nnav:\n")[2].partition("\n\n")[0]
    return list(entries(yaml.safe_load(nav)))


NAVIGATION = navigation()


def content(page: str) -> str:
    """A page's Markdown; a notebook's first cell."""
    path = ROOT / ELSEWHERE.get(page, f"docs/{page}")
    if path.exists():
        return path.read_text(encoding="utf-8")
    notebook = json.loads((ROOT / "examples/notebooks" / page).with_suffix(".ipynb").read_text())
    return "".join(notebook["cells"][0]["source"])


PAGES = pytest.mark.parametrize(
    ("title", "page"),
    [(title, page) for _, title, page in NAVIGATION if page not in (*GENERATED, "index.md")],
    ids=lambda text: text,
)


def test_the_navigation_has_each_page_once():
    pages = [page for _, _, page in NAVIGATION]
    assert len(pages) == len(set(pages)) > 40
    hidden = re.findall(
        r"^  (\w+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("not_in_nav")[2], re.M
    )
    written = {path.name for path in ROOT.glob("docs/*.md")}
    assert written - set(pages) - set(hidden) == set()


@PAGES
def test_a_pages_title_is_its_name_in_the_navigation(title, page):
    heading = re.match(r"# (.*)\n", content(page))
    assert heading
    assert heading[1] == title or title.startswith("Notebook: ")


@PAGES
def test_a_page_begins_with_a_sentence_to_search_for(title, page):
    """Not with a heading, a block, a list or a table: search engines and the site's show it."""
    first = content(page).partition("\n")[2].strip().partition("\n\n")[0]
    assert re.match(r"[A-Z*`\[\d]", first), first[:60]
    assert not first.startswith(("```", "* ")), first[:60]
    assert len(first) > 50, first


@pytest.mark.parametrize(
    "page", [page for section, _, page in NAVIGATION if section == "Guides"], ids=str
)
def test_a_guide_has_at_most_150_lines(page):
    assert len(content(page).splitlines()) <= GUIDE_AT_MOST
