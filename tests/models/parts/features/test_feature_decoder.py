"""FAE's loss on predicted features by hand, whom it trains, and what it needs."""

from types import SimpleNamespace

import pytest
import torch

from olvae.config import ConfigError
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.features.feature_decoder import FeatureDecoder
from tests.models.steps import build, fit, metrics, moved, objective, snapshot

pytest.importorskip("timm")

TARGET = "olvae.models.parts.features.feature_decoder.FeatureDecoder"
ENCODER = {
    "target": "olvae.modules.others.representation.RepresentationEncoder",
    "params": {"encoder": "test_vit", "attention": True},
}
DECODER = {
    "target": "olvae.modules.others.vit.ViTDecoder",
    "params": {"z_channels": 8, "width": 32, "depth": 1, "heads": 1},
}


def reduced(encoder: dict = ENCODER, n_z: int = 8, **model) -> LiteAutoencoderKL:
    decoder = {**DECODER, "params": {**DECODER["params"], "z_channels": n_z}}
    part = {"target": TARGET, "params": {"weight": 0.4, "depth": 1}}
    return build(
        encoder_config=encoder,
        decoder_config=decoder,
        embed_dim=n_z,
        parts={"fae": part},
        **{"learning_rate": 1e-3, **model},
    )


def test_features_are_predicted_of_the_drawn_latent():
    model = reduced().train()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = model.encode(x)
    step = SimpleNamespace(images=x, drawn=posterior.sample())
    part = model.parts["fae"]
    ((loss, weight),) = part.losses(model, step).values()
    error = part.transformer(step.drawn) - model.encoder.features(x)
    assert error.shape == (2, 64, 2, 2)
    torch.testing.assert_close(loss, error.square().mean())
    assert weight == 0.4

    loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {"encoder.attention.qkv.weight", "encoder.conv_out.weight"} <= got
    assert any(name.startswith("parts.fae.transformer.") for name in got)
    assert not any(name.startswith(("decoder.", "encoder.network.")) for name in got)


def test_feature_decoder_trains_with_the_rest(image_folder):
    model = reduced()
    before = snapshot(model)
    values = metrics(fit(model, image_folder, 2, size=32))
    assert values["train/features"] > 0
    changed = moved(before, snapshot(model))
    assert "parts.fae.transformer.conv_out.weight" in changed
    assert "encoder.attention.qkv.weight" in changed
    assert not any(name.startswith("encoder.network.") for name in changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"encoder": {**ENCODER, "params": {"encoder": "test_vit"}}, "n_z": 64},
            "parts.fae: the encoder reduces no features: start from timm:NAME::CHANNELS",
        ),
        ({"freeze_encoder": True}, r"the latents can't change \(freeze_encoder\)"),
    ],
)
def test_feature_decoder_says_what_it_needs(settings, message):
    with pytest.raises(ConfigError, match=message):
        reduced(**{"lossconfig": objective(kl_weight=0), **settings})


def test_feature_decoder_needs_a_vision_encoder():
    with pytest.raises(ConfigError, match=r"parts\.fae: "):
        build(parts={"fae": {"target": TARGET}})


def test_feature_decoder_has_a_weight_and_blocks():
    part = FeatureDecoder(0.0, 1)
    assert part.describe() == "weight 0, 1 blocks"
    with pytest.raises(ValueError, match="weight must"):
        FeatureDecoder(-0.1)
    with pytest.raises(ValueError, match=r"depth must .*0"):
        FeatureDecoder(depth=0)
    (block,) = reduced().parts["fae"].transformer.blocks
    assert block.attention.heads == 1  # of 64 channels
