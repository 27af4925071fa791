"""The fixtures of commands and of trainings, for what crosses files."""

from pathlib import Path

import pytest

from tests.cli.conftest import (
    _warned_of_nothing,
    config,
    done,
    olvae,
    olvae_on_two,
    photos,
    refused,
    target,
    terminal,
)
from tests.models.conftest import updates
from tests.training.conftest import at_step, train_two, train_with, under

__all__ = [
    "_warned_of_nothing",
    "at_step",
    "config",
    "done",
    "olvae",
    "olvae_on_two",
    "photos",
    "refused",
    "target",
    "terminal",
    "train_two",
    "train_with",
    "under",
    "updates",
]


@pytest.fixture
def four_images(image_folder) -> Path:
    """A folder of four pictures."""
    for path in sorted(image_folder.rglob("*.png"))[4:]:
        path.unlink()
    return image_folder
