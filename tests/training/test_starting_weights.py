"""Weights that a training starts from: which half was never trained, and whose factors they are."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from olvae.config import ConfigError
from olvae.data.places import load
from olvae.models.linear_code import LinearEncoder
from olvae.modules.base import Encoder
from olvae.modules.litevae.encoder_model import WaveletEncoder
from olvae.training.starting_weights import untrained_half
from tests.conftest import tiny, tiny_config
from tests.models.parts.vision import node
from tests.models.steps import WITHOUT_KL, against


def test_the_half_that_a_source_never_trained_stays_untrained(train_with, image_folder):
    one = "lightning.trainer.max_steps=1"
    fresh = train_with(
        one, config=tiny_config(image_folder, lossconfig=WITHOUT_KL, freeze_decoder=True)
    )
    again = train_with(one, "model.params.freeze_decoder=true", start_from=str(fresh.path))
    assert load([again.config])["run"]["untrained"] == "decoder"


@pytest.mark.parametrize(
    ("frozen", "before", "expected"),
    [
        ("decoder", None, "decoder"),
        ("encoder", None, "encoder"),
        (None, None, None),
        ("decoder", "decoder", "decoder"),
        ("encoder", "decoder", None),
        ("decoder", {}, None),  # weights without a config
    ],
)
def test_untrained_half_is_the_frozen_one_with_fresh_weights(frozen, before, expected):
    model = freezing(frozen, tiny().encoder)
    config = {"run": {"untrained": before}} if isinstance(before, str) else before
    assert untrained_half(model, config) == expected


@pytest.mark.parametrize("place", ["parts.alignment", "adversary_config"])
def test_a_resumed_run_keeps_the_weights_of_its_frozen_vision_encoder(
    train_with, image_folder, tmp_path, vit, place
):
    """Which its checkpoints do not have: here another file has the name of the old one."""
    weights = tmp_path / "weights.pt"
    shutil.copy(vit, weights)
    alignment = node(str(weights), distance_margin=None)
    judge = {
        "target": "olvae.modules.dino_discriminator.DinoDiscriminator",
        "params": {"encoder": "test_vit", "weights": str(weights), "image_size": 64, "heads": 1},
    }
    if place == "adversary_config":
        config = tiny_config(image_folder, adversary_config=against(judge))
    else:
        config = tiny_config(image_folder, parts={"alignment": alignment})
    run = train_with("lightning.trainer.max_steps=1", config=config)
    train_with("lightning.trainer.max_steps=2", resume=run.path)

    tensors = torch.load(weights)
    tensors["cls_token"] += 1
    torch.save(tensors, weights)
    with pytest.raises(ConfigError, match=rf"^model\.params\.{place}: "):
        train_with("lightning.trainer.max_steps=3", resume=run.path)


def freezing(frozen: str | None, encoder: Encoder, stand_in: object = None) -> SimpleNamespace:
    halves = {
        "encoder": encoder,
        "decoder": tiny().decoder,
        "frozen_halves": [frozen] if frozen else [],
    }
    return SimpleNamespace(quantizer=None, stand_in=stand_in, **halves)


def test_untrained_half_is_none_for_an_encoder_without_weights_or_of_the_linear_code():
    """But not beside a teacher, whose latents are learned from the trained half alone."""
    for encoder in (WaveletEncoder(), LinearEncoder()):
        assert untrained_half(freezing("encoder", encoder), None) is None
    assert (
        untrained_half(freezing("encoder", LinearEncoder(), stand_in=object()), None) == "encoder"
    )
