import pytest
import torch
from diffusers import AutoencoderKL

from olvae.models.autoencoder import LiteVAE, Quantizer
from olvae.modules.base import count_macs, count_parameters
from olvae.modules.sdvae import SDDecoder, SDEncoder


def test_counts():
    with torch.device("meta"):
        encoder, decoder = SDEncoder(latent_dim=8), SDDecoder(z_channels=4)
    assert round(count_parameters(encoder) / 1e6, 4) == 34.1636
    assert round(count_parameters(decoder) / 1e6, 2) == 49.49
    assert count_macs(encoder, 1, 3, 256, 256) / 1e9 == pytest.approx(137, rel=0.02)
    assert count_macs(decoder, 1, 4, 32, 32) / 1e9 == pytest.approx(312, rel=0.02)


def test_with_the_quantizer_it_is_diffusers_autoencoder():
    """The same weights give the same moments and the same image as diffusers' own AutoencoderKL."""
    widths = (32, 64, 64)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
    ).eval()
    ours = LiteVAE(
        SDEncoder(8, channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, image_size=32),
        SDDecoder(32, 4, channel_mult=(1, 2, 2), num_res_blocks=1),
        Quantizer(8, 4, 4),
    ).eval()
    ours.encoder.model.load_state_dict(theirs.encoder.state_dict())
    ours.decoder.model.load_state_dict(theirs.decoder.state_dict())
    ours.quantizer.quant_conv.load_state_dict(theirs.quant_conv.state_dict())
    ours.quantizer.post_quant_conv.load_state_dict(theirs.post_quant_conv.state_dict())
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mode(), expected.mode())
        torch.testing.assert_close(posterior.logvar, expected.logvar)
        torch.testing.assert_close(ours.decode(posterior.mode()), theirs.decode(expected.mode()).sample)


def test_image_size_must_fit():
    with pytest.raises(ValueError, match="multiple of 8"):
        SDEncoder(image_size=100)
