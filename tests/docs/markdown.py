"""The fenced blocks of Markdown files, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent

DOCS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob(".github/*.md"),
        *ROOT.glob("integrations/*/README.md"),
    ]
)
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
CONFIGS = sorted(ROOT.glob("olvae/recipes/**/*.yaml"))

FENCE = re.compile(
    r"(?:<!-- docs: (?P<mark>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A fenced block.

    ``mark`` is what a comment ``<!-- docs: MARK -->`` on the line above says, or empty.
    """

    file: Path
    line: int
    """Of its first line of text, from 1."""
    language: str
    text: str
    mark: str

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks(file: Path, *languages: str) -> list[Block]:
    """The blocks of a file in these languages, in order; without languages all of them."""
    text = file.read_text(encoding="utf-8")
    found = (
        Block(
            file,
            text.count("\n", 0, m.start("text")) + 1,
            m["language"],
            m["text"],
            m["mark"] or "",
        )
        for m in FENCE.finditer(text)
    )
    return [block for block in found if not languages or block.language in languages]


def without_blocks(file: Path) -> str:
    return FENCE.sub("", file.read_text(encoding="utf-8"))


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block.

    Of a ``console`` block, of the lines after a prompt.
    """
    # shlex would take PowerShell's backslashes away.
    text = block.text.replace(".venv\\Scripts\\", "").replace("\\\n", " ")
    for line in text.splitlines():
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line.removeprefix("$ ")
        yield from split_commands(line)


def split_commands(line: str) -> Iterator[list[str]]:
    """The words of the commands of a line, which ``&&`` separates,
    without comments and redirections."""
    command: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word != "&&":
            command.append(word)
        elif command:
            yield command[: command.index(">")] if ">" in command else command
            command = []
