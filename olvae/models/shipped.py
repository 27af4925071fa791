"""Models that ship with this package, as exports: TARGET ``olvae:NAME`` is the folder ``olvae/pretrained/NAME``."""

from pathlib import Path

__all__ = ["SHIPPED", "is_shipped", "shipped_folder", "shipped_names"]

SHIPPED = "olvae:"
"""What the target of such a model starts with."""

FOLDER = Path(__file__).parent.parent / "pretrained"


def is_shipped(text: str) -> bool:
    """Whether this names a model of this package; neither a path nor an id of the hub does."""
    return text.startswith(SHIPPED)


def shipped_names() -> list[str]:
    """The names of the models in this package, sorted."""
    return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


def shipped_folder(text: str) -> Path:
    """The export that ``olvae:NAME`` is.

    Raises:
        FileNotFoundError: there is none of that name; the message lists those that there are.
    """
    name, names = text.removeprefix(SHIPPED), shipped_names()
    if name not in names:
        there = ", ".join(f"{SHIPPED}{known}" for known in names)
        raise FileNotFoundError(f"{text}: no model of this name in the package, which has {there or 'none'}")
    return FOLDER / name
