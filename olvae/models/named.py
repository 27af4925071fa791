"""What a TARGET is called. Tells a mistake by the text and by what is there, before anything slow is imported."""

import re
from pathlib import Path

from olvae.models.shipped import is_shipped, shipped_folder

__all__ = ["DIFFUSERS", "KINDS", "WEIGHT_SUFFIXES", "check_target", "is_hub_id"]

KINDS = (
    "a run folder, a .ckpt or .safetensors file, an exported folder, olvae:NAME (a model of this package), an id of "
    "the Hugging Face hub (OWNER/NAME), or diffusers:ID_OR_FOLDER"
)

DIFFUSERS = "diffusers:"

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Of files of weights, the preferred one first."""


def is_hub_id(text: str) -> bool:
    """Whether this could be OWNER/NAME on the hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None and not text.endswith(WEIGHT_SUFFIXES)


def check_target(text: str) -> None:
    """Check that something is there, or may be on the hub.

    Raises:
        FileNotFoundError: there is nothing of this name.
    """
    if text.startswith(DIFFUSERS):
        name = text.removeprefix(DIFFUSERS).partition("::")[0]
        if not (Path(name).is_dir() or is_hub_id(name)):
            raise FileNotFoundError(f"{text}: no such folder, and not an id of the hub (OWNER/NAME)")
    elif is_shipped(text):
        shipped_folder(text)
    elif not (Path(text).exists() or is_hub_id(text)):
        raise FileNotFoundError(f"{text}: not found; a target is {KINDS}")
