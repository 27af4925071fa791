"""What MkDocs needs besides docs/: pages made from files elsewhere,
from docs/api.md and from the commands; links."""

import base64
import json
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from study.arguments import with_tables

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "comfyui.md": "integrations/comfyui/README.md",
}
NOTEBOOKS = {
    f"{path.stem}.md": str(path.relative_to(ROOT))
    for path in (ROOT / "examples/notebooks").glob("*.ipynb")
}
ELSEWHERE |= NOTEBOOKS
"""Pages of the site, and the files of the repository that they are."""

ROW = re.compile(r"^\| `(\w+)` \|", re.M)
LINK = re.compile(
    r"^```.*?^```$|`[^`]+`|(?:\[(?P<file>[\w./-]+\.md)\]|\])\((?P<target>[^)\s#]+)(?P<anchor>#\S*)?\)",
    re.M | re.S,
)
"""A link, whose text may be a file's name; or code, in which there are none."""


def on_files(files: Files, config: Any) -> Files:
    pages = {page: (ROOT / file).read_text(encoding="utf-8") for page, file in ELSEWHERE.items()}
    for page in NOTEBOOKS:
        pages[page], pictures = as_markdown(json.loads(pages[page]), page.removesuffix(".md"))
        for name, picture in pictures.items():
            files.append(File.generated(config, name, content=picture))
    pages["index.md"] = f"---\nhide: [navigation]\n---\n{pages['index.md']}"
    for page, text in {**pages, "cli.md": commands(), "reference.md": reference()}.items():
        files.append(File.generated(config, page, content=text))
    for path in (ROOT / "examples").glob("*.py"):  # the wheel has none
        files.append(
            File.generated(
                config, f"examples/{path.name}", content=path.read_text(encoding="utf-8")
            )
        )
    return files


def as_markdown(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """The cells of a notebook with their outputs, and its pictures by the names of their files.

    Lines that begin with ! are commands.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/jpeg" in data:
                file = f"{name}_{len(pictures)}.jpg"
                pictures[file] = base64.b64decode("".join(data["image/jpeg"]))
                parts.append(f"![what the cell above shows]({file})")
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).strip(chr(10))}\n```")
    return "\n\n".join(parts), pictures


def commands() -> str:
    """The help of every command, as typer writes it, without its lists of clipped sentences."""
    typer = [
        sys.executable,
        "-m",
        "typer",
        "olvae.cli.main",
        "utils",
        "docs",
        "--name",
        "olvae",
        "--title",
        "Commands",
    ]
    text = subprocess.run(typer, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"^\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", text, flags=re.M)
    return re.sub(r"^Example: (.*)$", r"```sh\n\1\n```", text, flags=re.M)


def reference() -> str:
    """The docstrings of the names in docs/api.md's tables, under its headings."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    parts = [
        "# Classes and functions",
        "The public names, by their docstrings; [examples](api.md) have a page of their own. "
        "[P 4.2] is section 4.2 of the LiteVAE paper, [R] the open-LiteVAE README, "
        "[M] measured on the published modules, [D] decided here.",
    ]
    for section in text.split("\n## ")[1:]:
        parts += [
            f"## {section.partition(chr(10))[0]}",
            *(f"::: olvae.{name}" for name in ROW.findall(section)),
        ]
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as on GitHub: to a page by its title where the site has it,
    otherwise into the repository."""
    path = page.file.src_uri
    folder = posixpath.dirname(ELSEWHERE.get(path, f"docs/{path}"))
    pages, titles = {file: page for page, file in ELSEWHERE.items()}, dict(titled(config.nav))

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        there = posixpath.normpath(posixpath.join(folder, target or ""))
        # code, another site's, or a mistake, which strictness finds
        if not target or not (ROOT / there).exists():
            return match[0]
        here = pages.get(there, there.removeprefix("docs/"))
        text = f"[{titles.get(here, match['file'])}]" if match["file"] else "]"
        if not files.get_file_from_path(here):
            here = f"{config.repo_url}/blob/main/{there}"
        return f"{text}({here}{match['anchor'] or ''})"

    if path == "config.md":
        markdown = with_tables(markdown)
    if path == "api.md":
        markdown = ROW.sub(r"| [`\1`][olvae.\1] |", markdown)
    return LINK.sub(link, markdown)


def titled(nav: Any) -> Iterator[tuple[str, str]]:
    """The pages of the navigation, each with its title."""
    for entry in nav:
        for title, inside in entry.items():
            if isinstance(inside, str):
                yield inside, title
            else:
                yield from titled(inside)


def on_page_content(html: str, **_: Any) -> str:
    """Sphinx's roles in docstrings become plain code."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)
