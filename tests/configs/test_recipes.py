"""What all recipes have in common."""

from pathlib import Path

import pytest

from olvae.config import load

ROOT = Path(__file__).parents[2]
RECIPES = [
    path
    for path in sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "study").glob("*.yaml")])
    if load([path]).get("lightning")
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_gradients_are_clipped(path):
    """A loss that is large once, and finite, then moves the weights no further than any other."""
    assert load([path])["lightning"]["trainer"]["gradient_clip_val"] > 0
