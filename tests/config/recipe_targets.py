"""Name the classes that the recipes name, for tests of reading and importing them."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from olvae.config import recipes
from tests.recipes import recipe


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("target"), str):
            yield node["target"]
        for part in node.values():
            yield from targets(part)


@cache
def read_targets() -> set[str]:
    """Those of this package and Lightning in the recipes, and some others."""
    named = {target for path in recipes().values() for target in targets(recipe(path))}
    return {target for target in named if target.startswith(("olvae.", "lightning."))} | {
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.callbacks.Callback",
        "olvae.data.picture_folder.FolderSource",
        "olvae.models.updates.optimizers.lr_factor",
        "olvae.training.callbacks.ImageGrids",
    }
