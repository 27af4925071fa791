"""Play an environment without the packages of the extra ``train``, and use a model in it.

    python tests/base_alone.py README.md PICTURE FOLDER

runs README's Python example, each shipped model and ``olvae reconstruct``, and asks for a command
that needs the extra.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch

from olvae.cli.main import main
from olvae.config.nodes import TRAIN

HIDDEN = {*TRAIN, "scipy", "tensorboardX", "torchaudio"} - {"fsspec", "jinja2", "markupsafe"}
"""What this environment lacks: all but what PyTorch or huggingface_hub brings."""


class Hiding:
    """A finder of modules that does not find the hidden ones."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in HIDDEN:
            return None
        return self.finder.find_spec(name, *rest)


def run(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as error:
        return int(error.code or 0)
    raise AssertionError("main ends by an exit")


def use(readme: Path, picture: str, out: str) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["image"].shape == (1, 3, 256, 256)
    assert "huggingface_hub" not in sys.modules
    for model in ("photos-f8c4", "photos-f8c12-sharp"):
        vae = names["LiteVAE"].from_pretrained(f"olvae:{model}")
        with torch.no_grad():
            assert vae(torch.zeros(1, 3, 32, 32))[0].isfinite().all()
    assert run("--version") == run("--help") == 0
    assert run("reconstruct", "olvae:photos-f8c4", picture, "--out", out) == 0
    assert run("validate", "demo") == 2
    assert run("evaluate", "olvae:photos-f8c4") == 2
    assert run("train", "--base", "demo") == 2


if __name__ == "__main__":
    sys.meta_path[:] = map(Hiding, sys.meta_path)
    use(Path(sys.argv[1]), *sys.argv[2:])
