"""What a mistake of a config is, and how it is told: in a line, with the nearest right name."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["ConfigError", "first_line", "nearest", "unknown_keys"]


class ConfigError(ValueError):
    """One or more mistakes of a config, one line each."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


def unknown_keys(given: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> Iterator[str]:
    """One line for each key that is not known, with the nearest one that is."""
    for key in given:
        if key not in known:
            yield f"{prefix}{key}: unknown key" + (nearest(str(key), known) or f"; known: {', '.join(known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
