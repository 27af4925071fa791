"""Claims about other projects name the version that they are about."""

import re

from tests.docs.markdown import ROOT

DATED = re.compile(r"\b20\d\d-\d\d-\d\d\b")
VERSION = re.compile(r"\b[0-9a-f]{7}\b|pull request \d+|at no stated commit")


def undated(text: str) -> list[str]:
    """The headings of sections on a project that begin with a line without a date and a version."""
    found = []
    for section in text.split("\n## ")[1:]:
        heading, _, rest = section.partition("\n")
        first = rest.strip().partition("\n\n")[0]
        if heading != "If it fails" and not (DATED.search(first) and VERSION.search(first)):
            found.append(heading)
    return found


def test_each_trainer_is_described_at_a_date_and_a_version():
    text = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    assert text.count("\n## ") >= 4
    assert undated(text) == []
    assert undated(text.replace("About 58eb52c of 2026-08-23.\n\n", "")) != []


def test_what_comfyui_takes_is_dated():
    paragraphs = (ROOT / "docs" / "autoencoders.md").read_text(encoding="utf-8").split("\n\n")
    claims = [p for p in paragraphs if re.search(r"ComfyUI[^.|]* (takes|knows|reads)", p)]
    assert claims
    for claim in claims:
        assert DATED.search(claim), claim
        assert VERSION.search(claim), claim
