"""Encoders that are frozen, or have nothing to train."""

import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from tests.models.steps import (
    WITHOUT_KL,
    Each,
    against,
    build,
    fit,
    moved,
    objective,
    snapshot,
)


@pytest.mark.parametrize("adversary", [None, against(weight=0.5)], ids=["a", "b"])
def test_frozen_encoder_and_its_quantizer_do_not_change(image_folder, updates, adversary):
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


def test_wavelet_encoder_has_nothing_to_train_and_is_saved(image_folder, tmp_path):
    model = build(freeze_encoder=True, use_ema=True, **FIXED)
    start = snapshot(model)
    fit(model, image_folder, 2)
    assert len(moved(start, snapshot(model))) > 0.9 * len(start)
    vae, x = model.autoencoder.eval(), torch.rand(1, 3, 16, 16)
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(LiteVAE.from_pretrained(tmp_path)(x)[0], vae(x)[0])


def test_wavelet_encoder_needs_freeze_encoder_and_no_initial_logvar():
    with pytest.raises(ConfigError, match="freeze_encoder: "):
        build(**FIXED)
    with pytest.raises(ConfigError, match=r"initial_logvar: .* no log-variances"):
        build(freeze_encoder=True, initial_logvar=-4.0, **FIXED)
    narrow = {**FIXED["encoder_config"], "params": {"image_size": 16, "latent_dim": 12}}
    mixed = build(use_quant=True, **{**FIXED, "encoder_config": narrow, "lossconfig": objective()})
    assert {
        name
        for name, _ in mixed.named_parameters()
        if not name.startswith(("decoder.", "quantizer."))
    } == set()
