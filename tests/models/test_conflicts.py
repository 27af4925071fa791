import re
from types import SimpleNamespace

import pytest
import torch

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import Sides
from olvae.models.conflicts import _out_of_range, check_source, find_conflicts
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


RANGES = {
    "accumulate_grad_batches": 1,
    "scheduler": "cosine",
    "optimizer": "adam",
    "min_lr_factor": 0.0,
    "ema_decay": 1.0,
    "warmup_steps": 3,
    "decay_steps": 4,
}
"""Settings at the ends of what is possible."""


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"min_lr_factor": 1.0, "ema_decay": 0.0, "optimizer": "muon", "decay_steps": None}, None),
        ({"scheduler": "constant", "decay_steps": 1}, None),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches .* 1, got 0"),
        ({"scheduler": "linear"}, "scheduler .* constant or cosine, got 'linear'"),
        ({"optimizer": "sgd"}, "optimizer .* got 'sgd'"),
        ({"min_lr_factor": -0.01}, "min_lr_factor .* got -0.01"),
        ({"ema_decay": 1.01}, "ema_decay .* got 1.01"),
        ({"decay_steps": 3}, "decay_steps .* warmup_steps, 3, got 3"),
    ],
)
def test_settings_out_of_range_are_named_and_the_ends_are_in_it(changes, wrong):
    lines = list(_out_of_range(SimpleNamespace(**RANGES | changes)))
    assert len(lines) == (wrong is not None)
    for line in lines:
        assert re.match(wrong, line)


CONSISTENT = {
    **RANGES,
    "encoder": SimpleNamespace(parameters=lambda: [torch.nn.Parameter()], deterministic=False),
    "quantizer": None,
    "freeze_encoder": False,
    "freeze_decoder": False,
    "frozen_halves": [],
    "checkpoint": False,
    "loss_weights": {"rec": 1.0, "kl": 1.0},
    "given_factors": {},
    "for_diffusion": {"scaling_factor": 0.0},
    "parts": {},
    "each_part": [],
    "adversary": None,
    "autoencoder": SimpleNamespace(latent_channels=4),
}
"""A model of which nothing is wrong, as long as nobody has given its factors."""

NOTHING = SimpleNamespace(parameters=list, deterministic=False)
POINTS = SimpleNamespace(parameters=lambda: [torch.nn.Parameter()], deterministic=True)
WITHOUT = {"loss_weights": {"rec": 1.0}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"encoder": NOTHING}, ["freeze_encoder"]),
        ({"encoder": NOTHING, "quantizer": object()}, []),
        ({"encoder": NOTHING, "freeze_encoder": True, **WITHOUT}, []),
        ({"checkpoint": True, "frozen_halves": ["encoder"]}, []),
        ({"checkpoint": "decoder", "frozen_halves": ["encoder"]}, []),
        ({"checkpoint": "decoder", "frozen_halves": ["decoder"]}, ["checkpoint"]),
        ({"freeze_decoder": True}, []),
        (
            {"freeze_encoder": True, "freeze_decoder": True, **WITHOUT},
            ["freeze_encoder, freeze_decoder"],
        ),
        ({"freeze_encoder": True}, ["lossconfig.params.kl_weight"]),
        ({"freeze_encoder": True, **WITHOUT}, []),
        ({"encoder": POINTS}, ["lossconfig.params.kl_weight"]),
        ({"encoder": POINTS, **WITHOUT}, []),
        ({"given_factors": {"scaling_factor": 0.0}}, ["scaling_factor"]),
        ({"parts": {"a": object()}}, ["scaling_factor"]),
        ({"adversary": object()}, []),
        ({"adversary": object(), "freeze_decoder": True}, ["adversary_config"]),
        ({"each_part": [SimpleNamespace(conflicts=lambda _: ["parts.a: no"])]}, ["parts.a"]),
        ({"optimizer": "sgd"}, ["optimizer must be adam or muon, got 'sgd'"]),
    ],
)
def test_what_contradicts_is_named_and_nothing_else(changes, named):
    lines = list(find_conflicts(SimpleNamespace(**CONSISTENT | changes)))
    assert [line.partition(": ")[0] for line in lines] == named


def images(**changes) -> SimpleNamespace:
    """What a model asks of its source: images of 32x48 pixels in colour, without latents."""
    return SimpleNamespace(**{"size": Sides(32, 48), "channels": 3, "latent_stats": []} | changes)


@pytest.mark.parametrize(
    ("data", "network", "message"),
    [
        ({}, {}, None),
        ({"size": Sides(32, 40)}, {}, r"32, 40.* multiple of 16"),
        ({"size": Sides(8, 8)}, {}, "multiple of 16.*: use "),
        ({"size": Sides(16, 16)}, {"enlarge": 2}, None),
        ({"size": Sides(24, 24)}, {"enlarge": 2}, "factor times 2"),
        ({}, {"side": 32}, "images of 32 pixels a side only"),
        ({"size": Sides(32, 32)}, {"side": 32}, None),
        ({"channels": 1}, {}, "1 channel, the model takes 3"),
        ({"channels": 4}, {}, "4 channels, the model takes 3"),
        ({"latent_stats": [{}]}, {}, "latents of a teacher, but there is none"),
        ({"latent_stats": [{}]}, {"stand_in": object()}, None),
        ({"latent_stats": [{}]}, {"stand_in": object(), "enlarge": 2}, "2 times smaller"),
    ],
)
def test_a_source_has_to_fit_the_model(data, network, message):
    vae = {"upscale": 16, "enlarge": 1, "side": None}
    vae |= {name: value for name, value in network.items() if name in vae}
    model = SimpleNamespace(
        autoencoder=SimpleNamespace(**vae),
        encoder=SimpleNamespace(in_channels=3),
        stand_in=network.get("stand_in"),
    )
    if message is None:
        check_source(model, images(**data))
        return
    with pytest.raises(ConfigError, match=message):
        check_source(model, images(**data))
