"""Check the names of TARGETs without slow imports; models that ship with this package."""

import re
from pathlib import Path

KINDS = (
    "a run folder, a .ckpt or .safetensors file, an exported folder, olvae:NAME (a model of this package), an id of "
    "the Hugging Face hub (OWNER/NAME), diffusers:ID_OR_FOLDER, or package.module.Class:ARGUMENT (a Loader of yours)"
)

DIFFUSERS = "diffusers:"

SHIPPED = "olvae:"
"""Prefix of a model that ships with this package: the export in ``olvae/pretrained/NAME``."""

SHIPPED_FOLDER = Path(__file__).parent.parent / "pretrained"

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Of files of weights, the preferred one first."""


def is_hub_id(text: str) -> bool:
    """Whether this could be OWNER/NAME on the hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None and not text.endswith(WEIGHT_SUFFIXES)


def split_class(text: str) -> tuple[str, str] | None:
    """Split ``package.module.Class:ARGUMENT`` at the colon; None if this is something else."""
    match = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)+):(.*)", text)
    return None if match is None else (match[1], match[2])


def shipped_names() -> list[str]:
    """The names of the models in this package, sorted."""
    return sorted(config.parent.name for config in SHIPPED_FOLDER.glob("*/config.json"))


def shipped_folder(text: str) -> Path:
    """The export that ``olvae:NAME`` is; FileNotFoundError with the names that there are if it is none of them."""
    name, names = text.removeprefix(SHIPPED), shipped_names()
    if name not in names:
        known = ", ".join(f"{SHIPPED}{name}" for name in names)
        raise FileNotFoundError(f"{text}: no model of this name in the package, which has {known or 'none'}")
    return SHIPPED_FOLDER / name


def check_target(text: str) -> None:
    """Raise FileNotFoundError unless something of this name exists, or may exist on the hub."""
    if text.startswith(DIFFUSERS):
        name = text.removeprefix(DIFFUSERS).partition("::")[0]
        if not (Path(name).is_dir() or is_hub_id(name)):
            raise FileNotFoundError(f"{text}: no such folder, and not an id of the hub (OWNER/NAME)")
    elif text.startswith(SHIPPED):
        shipped_folder(text)
    elif not (Path(text).exists() or is_hub_id(text) or split_class(text)):
        raise FileNotFoundError(f"{text}: not found; a target is {KINDS}")
