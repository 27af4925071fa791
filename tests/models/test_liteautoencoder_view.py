"""LiteAutoencoderKL's ``autoencoder``: one plain LiteVAE over the same weights."""

import copy

import torch

from olvae.models.autoencoder import LiteVAE
from tests.models.steps import build


def test_autoencoder_is_built_once_and_shares_the_weights():
    model = build()
    vae = model.autoencoder
    assert isinstance(vae, LiteVAE)
    assert model.autoencoder is vae
    assert vae.encoder is model.encoder
    names = {name.partition(".")[0] for name in model.state_dict()}
    assert names <= {"encoder", "decoder", "quantizer", "adversary", "parts"}


def test_autoencoder_follows_a_replaced_encoder():
    model, other = build(), build()
    x = torch.rand(1, 3, 32, 32) * 2.0 - 1.0
    before = model.encode(x).mode()
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.mul_(0.5)
    model.encoder = other.encoder
    assert model.autoencoder.encoder is other.encoder
    assert not torch.equal(model.encode(x).mode(), before)


def test_autoencoder_of_a_copy_is_over_the_copied_weights():
    model = build()
    twin = copy.deepcopy(model)
    assert twin.autoencoder.encoder is twin.encoder
    assert twin.encoder is not model.encoder


def test_factors_set_on_the_autoencoder_stay():
    model = build()
    model.autoencoder.set_for_diffusion({"scaling_factor": 0.5})
    model.encode(torch.zeros(1, 3, 32, 32))
    assert model.autoencoder.export_config()["scaling_factor"] == 0.5
