"""The commands of docs/first_model.md in order, in small: they print what the page shows."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, Block, blocks, commands

PAGE = ROOT / "docs" / "first_model.md"
SMALLER = {
    "train": ["lightning.trainer.max_steps=4", "lightning.trainer.val_check_interval=4"],
    "examples/random_crops.py": ["--count", "40"],
    "examples/train_diffusion.py": ["--steps", "2"],
}
"""Further arguments of the commands that take minutes; the last of two values counts."""

DECIDED = ("encoder", "decoder", "latent ", "objective", "data ", "batch", "device", "seed")
"""Lines of a training's table that have the page's very numbers, in small too."""

STEPS = re.compile(r"^step +\d|^done after|^encoding:|misses a pixel's values")
"""Lines that depend on the number of steps or on the machine's speed."""


def shape(line: str) -> str:
    """A line without numbers, rules and spaces."""
    line = re.sub(r"20\d\d-\d\d-\d\dT[\d-]+", "TIME", line).replace("shards", "shard")
    return re.sub(r"[\d.,e±\s─│╭╮╰╯-]+", " ", line).strip()


def run(words: list[str], folder: Path) -> list[str]:
    program, *rest = words
    begin = ["-m", "olvae"] if program == "olvae" else []
    arguments = [str(ROOT / word) if word.startswith("examples/") else word for word in rest]
    small = next((more for word, more in SMALLER.items() if word in rest), [])
    done = subprocess.run(
        [sys.executable, *begin, *arguments, *small],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).splitlines()


def expected(block: Block) -> dict[str, list[str]]:
    """Each command of a console block, with the lines that the page shows under it."""
    found: dict[str, list[str]] = {}
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found[line.removeprefix("$ ")] = []
        elif shape(line):
            found[list(found)[-1]].append(line)
    return found


@pytest.mark.slow
def test_commands_of_the_first_model_print_what_its_page_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(ROOT / "olvae" / "data" / "photographs", tmp_path / "photos")
    for block in blocks(PAGE, "console"):
        for words, lines in zip(commands(block), expected(block).values(), strict=True):
            printed = run(words, tmp_path)
            shapes = {shape(line) for line in printed}
            for line in lines:
                exact = line.strip("│ ").startswith(DECIDED) and line.startswith("│")
                known = line.strip("│ ") in {p.strip("│ ") for p in printed}
                assert known if exact else STEPS.search(line) or shape(line) in shapes, (
                    f"{line}\n\n" + "\n".join(printed)
                )
    assert (tmp_path / "diffusion" / "samples.png").is_file()
    assert (tmp_path / "my-vae" / "config.json").is_file()


def test_pictures_of_the_docs_are_small():
    for path in (ROOT / "docs" / "images").glob("first_model_*"):
        assert path.stat().st_size < 80_000, path.name
