"""Tell what a TARGET's text names: a run, a file, a hub id, a class, a shipped model."""

import re
from pathlib import Path

from olvae.files import WEIGHT_SUFFIXES, nearest_path
from olvae.runs import find_run, named_runs

KINDS = (
    "a run folder, a run's name (the newest in runs/; last: of all), a .ckpt or .safetensors file, "
    "an exported folder, olvae:NAME (a model of this package), an id of the Hugging Face hub "
    "(OWNER/NAME), diffusers:ID_OR_FOLDER, timm:NAME[=FILE][::CHANNELS] (a vision encoder), or "
    "package.module.Class:ARGUMENT (a Loader of yours)"
)

DIFFUSERS = "diffusers:"

TIMM = "timm:"  # a vision encoder, with a decoder that is untrained

SHIPPED = "olvae:"  # a model that ships with this package: the export in olvae/pretrained/NAME

SHIPPED_FOLDER = Path(__file__).parent.parent / "pretrained"


def place_in(target: str) -> str:
    """The path, or the id of the hub, in a TARGET: without ``diffusers:`` and the subfolder."""
    return target.removeprefix(DIFFUSERS).partition("::")[0]


def is_hub_id(text: str) -> bool:
    """Whether this could be OWNER/NAME on the hub."""
    looks_like = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None
    return looks_like and not text.endswith(WEIGHT_SUFFIXES)


def split_class(text: str) -> tuple[str, str] | None:
    """Split ``package.module.Class:ARGUMENT`` at the colon; None if this is something else."""
    match = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)+):(.*)", text)
    return None if match is None else (match[1], match[2])


def shipped_names() -> list[str]:
    """List the models of this package, which TARGETs name with :data:`SHIPPED` before them."""
    return [config.parent.name for config in SHIPPED_FOLDER.glob("*/config.json")]


def shipped_folder(text: str) -> Path:
    """The export behind ``olvae:NAME``; FileNotFoundError with all names if there is none."""
    name = text.removeprefix(SHIPPED)
    names = shipped_names()
    if name not in names:
        known = ", ".join(f"{SHIPPED}{name}" for name in sorted(names)) or "none"
        raise FileNotFoundError(f"{text}: no model of this name in the package, which has {known}")
    return SHIPPED_FOLDER / name


def check_target(text: str) -> None:
    """Raise FileNotFoundError unless something of this name exists, or may exist on the hub."""
    if text.startswith(DIFFUSERS):
        name = place_in(text)
        if not (Path(name).is_dir() or is_hub_id(name)):
            raise FileNotFoundError(
                f"{text}: no such folder, and not an id of the hub (OWNER/NAME){nearest_path(name)}"
            )
    elif text.startswith(SHIPPED):
        shipped_folder(text)
    elif text.startswith(TIMM):
        return
    elif not (Path(find_run(text)).exists() or is_hub_id(text) or split_class(text)):
        remedy = nearest_path(text, named_runs(text)) or f"; a target is {KINDS}"
        if text in shipped_names():
            remedy = f"; did you mean {SHIPPED}{text}?"
        raise FileNotFoundError(f"{text}: not found{remedy}")
