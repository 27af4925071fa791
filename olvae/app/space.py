"""A folder that Hugging Face runs as a Space: the page, with the exports that it shows inside."""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from olvae import __version__
from olvae.config import ConfigError
from olvae.export.folder import check_empty, replace_folder
from olvae.files import nearest
from olvae.models.named import DIFFUSERS, is_hub_id
from olvae.models.shipped import is_shipped
from olvae.models.spec import CONFIG_NAME

__all__ = ["write_space"]

README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
---

What an autoencoder keeps of an image: {targets}. Written by `olvae app --space` of open-LiteVAE {version}.
"""

APP = """from olvae.app.page import page

page({targets!r}).launch(max_file_size="50mb")
"""


def write_space(targets: Sequence[str], folder: Path) -> None:
    """Write app.py, requirements.txt and README.md; exports on this machine are copied into models/.

    Args:
        targets: exported folders, ``olvae:NAME``, ids of the hub, or ``diffusers:ID_OR_FOLDER``.
        folder: new or empty.

    Raises:
        ConfigError: a target is neither of these, such as a run.
        FileExistsError: the folder is not empty.
    """
    check_empty(folder, force=False)
    folder = folder.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=nearest(folder.parent)) as beside:
        partial = Path(beside) / folder.name
        partial.mkdir()
        names = [_inside(target, partial) for target in targets]
        about = {"title": folder.name, "gradio": importlib.metadata.version("gradio"), "version": __version__}
        (partial / "README.md").write_text(README.format(targets=", ".join(names), **about), encoding="utf-8")
        (partial / "app.py").write_text(APP.format(targets=names), encoding="utf-8")
        (partial / "requirements.txt").write_text(f"open-litevae[app]>={__version__}\n", encoding="utf-8")
        replace_folder(partial, folder)


def _inside(target: str, space: Path) -> str:
    """What the page in the Space calls a target; an export is copied."""
    prefix = DIFFUSERS if target.startswith(DIFFUSERS) else ""
    path = Path(target.removeprefix(prefix))
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        copy = space / "models" / path.resolve().name
        if copy.exists():
            raise ConfigError(f"{target}: another target's folder has the same name")
        shutil.copytree(path, copy)
        return f"{prefix}models/{copy.name}"
    if is_shipped(target) or (is_hub_id(path.as_posix()) and not path.exists()):
        return target
    raise ConfigError(f"{target}: a Space holds exports: olvae export {target} --out FOLDER, then name the folder")
