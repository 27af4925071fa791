"""The halves of diffusers' AutoencoderRAE against the whole; a linear map is its vision encoder."""

from importlib.util import find_spec

import pytest
import torch

from olvae.modules.base import last_convolution
from olvae.modules.others.rae import RAEDecoder, RAEEncoder
from tests.models.loading.classes import make, see_patches


@pytest.fixture
def theirs(monkeypatch):
    """With statistics of its latents, and noise in training."""
    see_patches(monkeypatch)
    return make("AutoencoderRAE", scaling_factor=0.7, noise_tau=0.8)


def config(theirs) -> dict:
    return {key: value for key, value in theirs.config.items() if not key.startswith("_")}


def load(half, theirs) -> None:
    own = half.model.state_dict()
    half.model.load_state_dict({name: theirs.state_dict()[name] for name in own})


def test_rae_encoder_gives_the_latents_of_the_whole_without_noise(theirs):
    encoder = RAEEncoder(config(theirs), 64, image_size=16, downscale=4)
    load(encoder, theirs)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        moments = encoder.train()(x)
        wanted = theirs.encode(x / 2 + 0.5).latent
    assert moments.shape == (2, 64, 4, 4)
    torch.testing.assert_close(moments[:, :32], wanted, rtol=0, atol=1e-6)
    assert encoder.deterministic
    assert (encoder.latent_dim, encoder.in_channels) == (64, 3)
    assert encoder.training
    assert not encoder.eval().training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any(name.startswith("model.decoder.") for name in encoder.state_dict())


def test_rae_decoder_gives_the_images_of_the_whole_in_our_range(theirs):
    decoder = RAEDecoder(config(theirs), 32, upscale=4)
    load(decoder, theirs)
    z = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        wanted = 2 * theirs.decode(z).sample - 1
        torch.testing.assert_close(decoder(z), wanted, rtol=0, atol=1e-6)
    decoder(z).square().mean().backward()
    assert all(p.grad is not None for p in decoder.parameters())
    assert last_convolution(decoder) is decoder.model.decoder.decoder_pred
    assert (decoder.z_channels, decoder.out_channels) == (32, 3)


def test_rae_encoder_refuses_images_of_another_size(theirs):
    encoder = RAEEncoder(config(theirs), 64, image_size=16, downscale=4)
    assert encoder.side == 16
    with pytest.raises(ValueError, match=r"^AutoencoderRAE .*16x16 .*32x16$"):
        encoder(torch.zeros(1, 3, 32, 16))


@pytest.mark.skipif(find_spec("transformers") is not None, reason="transformers is installed")
def test_rae_names_the_package_that_is_missing():
    with pytest.raises(ValueError, match="transformers: pip install"):
        RAEDecoder({"encoder_type": "dinov2"}, 768)
