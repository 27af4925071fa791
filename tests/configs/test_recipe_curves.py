"""Compare the losses of every recipe's first steps, in small, with the recorded ones."""

import pytest
import torch

from tests.configs.recipe_curves import (
    RECIPES,
    TOLERANCE,
    Workshop,
    difference,
    in_small,
    losses,
    read_record,
)

QUICK = ("demo_b", "distil/demo", "imagenet/VAE", "not_rgb/satellite")
"""An adversary, a teacher, another architecture, other data; Muon and Adam."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def test_every_recipe_has_a_recorded_curve():
    assert list(read_record()[0]) == RECIPES


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
)
def test_a_recipes_losses_are_the_recorded_ones(name, shop):
    recorded, exact = read_record()
    moved = difference(losses(name, shop), recorded[name], exact)
    assert moved is None, f"{name}: {moved}; if that is meant, `make curves` records anew"


def test_a_change_of_a_weight_moves_a_curve(shop, monkeypatch):
    """By a hundredth; beyond the tolerance of other processors too."""

    def changed(name: str, shop: Workshop) -> dict:
        config = in_small(name, shop)
        config["model"]["params"]["lossconfig"]["params"]["gaussian_weight"] *= 1.01
        return config

    monkeypatch.setattr("tests.configs.recipe_curves.in_small", changed)
    monkeypatch.setattr("tests.configs.recipe_curves.STEPS", 2)
    recorded = {tag: s[:2] for tag, s in read_record()[0]["imagenet/VAE"].items()}
    moved = difference(losses("imagenet/VAE", shop), recorded, False)
    assert moved is not None
    assert moved.startswith("train/loss is")
    assert "at step 1," in moved


def test_curves_are_compared_to_the_digit_or_to_the_tolerance():
    one = {"train/loss": [1.0, 2.0]}
    near = {"train/loss": [1.0, 2.0 * (1 + TOLERANCE / 2)]}
    assert difference(one, one, exact=True) is None
    assert difference(near, one, exact=False) is None
    assert "step 2, was 2.0" in str(difference(near, one, exact=True))
    assert "other losses" in str(difference({"train/loss": [1.0]}, one, exact=False))
    assert difference({"train/loss": [1.0, torch.nan]}, one, exact=False) is not None
