import pytest

from olvae.config import ConfigError
from tests.conftest import parts
from tests.models.steps import (
    WITHOUT_KL,
    against,
    build,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"parts": parts(latent_noise={"std": -0.1})},
            r"params\.parts\.latent_noise: std must not be negative, got -0.1",
        ),
        ({"freeze_encoder": True}, "kl_weight: the encoder is frozen"),
        (
            {"freeze_encoder": True, "lossconfig": WITHOUT_KL, "parts": parts(anchor={})},
            "parts.anchor: the encoder is frozen",
        ),
        ({"freeze_encoder": True, "freeze_decoder": True}, "nothing is left to train"),
        (
            {"freeze_decoder": True, "parts": parts(latent_noise={"std": 0.1})},
            "the decoder is frozen",
        ),
        (
            {"freeze_decoder": True, "adversary_config": against()},
            "an adversary has nothing to train",
        ),
        (
            {"checkpoint": True, "parts": parts(activation_bound={"bound": 1.0})},
            "checkpoint, parts.activation_bound: ",
        ),
        (
            {"checkpoint": "encoder", "freeze_encoder": True, "lossconfig": WITHOUT_KL},
            "checkpoint: the encoder is frozen",
        ),
    ],
)
def test_model_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(settings.pop("adversary_config", None), **settings)
