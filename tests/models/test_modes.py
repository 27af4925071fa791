"""Frozen halves, settings that exclude each other, checkpointing."""

import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from tests.conftest import parts
from tests.models.steps import (
    WITHOUT_KL,
    Each,
    against,
    assert_same,
    build,
    fit,
    metrics,
    moved,
    objective,
    snapshot,
)


@pytest.mark.parametrize("adversary", [None, against(weight=0.5)], ids=["a", "b"])
def test_a_frozen_encoder(image_folder, updates, adversary):
    model = build(
        adversary,
        use_quant=True,
        freeze_encoder=True,
        use_ema=True,
        ema_decay=0.5,
        lossconfig=WITHOUT_KL,
    )
    start, modes = snapshot(model), []
    fit(model, image_folder, 3, callbacks=[Each(lambda m: modes.append(m.encoder.training))])
    changed = moved(start, snapshot(model))
    frozen = {name for name in start if name.startswith(("encoder.", "quantizer.quant_conv."))}
    trained = {
        name for name in start if name.startswith(("decoder.", "quantizer.post_quant_conv."))
    }
    assert not frozen & changed
    assert len(trained & changed) > 0.9 * len(trained)
    assert modes == [False] * 3
    assert len(updates.of(model.decoder)) == 3
    assert len(updates.of(model.encoder)) == 0


FIXED = {
    "embed_dim": 12,
    "encoder_config": {
        "target": "olvae.modules.litevae.encoder_model.WaveletEncoder",
        "params": {"image_size": 16},
    },
    "decoder_config": {
        "target": "olvae.modules.litevae.decoder_model.LiteVAE_Decoder",
        "params": {
            "channels": 8,
            "z_channels": 12,
            "channel_mult": [1, 1, 1, 1],
            "num_res_blocks": 0,
        },
    },
    "lossconfig": WITHOUT_KL,
}
"""Model arguments: an encoder without parameters."""


def test_a_fixed_encoder(image_folder, tmp_path):
    model = build(freeze_encoder=True, use_ema=True, **FIXED)
    start = snapshot(model)
    fit(model, image_folder, 2)
    assert len(moved(start, snapshot(model))) > 0.9 * len(start)
    vae, x = model.autoencoder.eval(), torch.rand(1, 3, 16, 16)
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(LiteVAE.from_pretrained(tmp_path)(x)[0], vae(x)[0])


def test_a_fixed_encoder_says_what_it_needs():
    with pytest.raises(
        ConfigError, match=r"freeze_encoder: WaveletEncoder has nothing to train: set it to true"
    ):
        build(**FIXED)
    with pytest.raises(
        ConfigError, match=r"initial_logvar: WaveletEncoder learns no log-variances: leave it out"
    ):
        build(freeze_encoder=True, initial_logvar=-4.0, **FIXED)
    narrow = {**FIXED["encoder_config"], "params": {"image_size": 16, "latent_dim": 12}}
    mixed = build(use_quant=True, **{**FIXED, "encoder_config": narrow, "lossconfig": objective()})
    assert {
        name
        for name, _ in mixed.named_parameters()
        if not name.startswith(("decoder.", "quantizer."))
    } == set()


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
def test_choices_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(settings.pop("adversary_config", None), **settings)


@pytest.mark.parametrize("checkpoint", [True, "decoder"])
def test_computing_steps_again_changes_nothing_else(image_folder, checkpoint):
    """Weights after three steps with an adversary and averages, bit for bit; the average keeps its names."""
    settings = {"use_ema": True, "sample_posterior": True}
    plain, again = (
        fit(
            build(against(weight=0.5, adaptive_weight=True), checkpoint=value, **settings),
            image_folder,
            3,
        )
        for value in (False, checkpoint)
    )
    assert_same(snapshot(plain), snapshot(again))
    assert metrics(plain) == metrics(again)
    assert [again.encoder.checkpoint, again.decoder.checkpoint] == [
        checkpoint in (True, h) for h in ("encoder", "decoder")
    ]
    assert list(again.state_dict()) == list(plain.state_dict())
