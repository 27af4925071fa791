"""Rows of the studies, and the tables that are made of them in a document.

Python's own modules alone: study/gpu.py runs where hardly anything is installed.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Found = Mapping[str, Mapping[str, Any]]
"""The rows by name."""

NOTHING = "Nothing is measured yet."
"""Instead of a table without lines."""


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a folder by row.

    Raises:
        FileNotFoundError: it has none.
    """
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
    if not found:
        raise FileNotFoundError(f"{folder}: no rows there: python -m study.run makes them")
    return found


def fill(document: str, rows: Found, tables: Mapping[str, Callable[[Found], str]]) -> str:
    """The document with its tables made again.

    Raises:
        ValueError: it names a table that does not exist.
    """

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise ValueError(f"no table is named {name}: choose from {', '.join(tables)}")
        return f"<!-- table: {name} -->\n\n{tables[name](rows)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", made, document, flags=re.DOTALL)


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with numbers on the right; a sentence where it would have no lines."""
    if not lines:
        return NOTHING
    rule = ["---", *("--:" for _ in headings[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text
