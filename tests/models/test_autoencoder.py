import copy

import pytest
import torch
from PIL import Image

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.data.image import image_to_tensor
from olvae.data.pixels.size_and_range import PixelRange
from olvae.models.autoencoder import Quantizer
from olvae.modules.base import last_convolution
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from tests.conftest import TINY_ENCODER, tiny, tiny_config


def test_forward_takes_the_mode_or_a_sample():
    vae = tiny()
    x = torch.rand(1, 3, 16, 16)
    mode, posterior = vae(x)
    torch.testing.assert_close(mode, vae.decode(posterior.mode()))
    torch.manual_seed(1)
    sample, _ = vae(x, sample_posterior=True)
    torch.manual_seed(1)
    torch.testing.assert_close(sample, vae.decode(posterior.sample()))
    assert not torch.equal(mode, sample)


def rgba_at_2x() -> LiteVAE:
    """An autoencoder of four channels, with a decoder at 2x."""
    params = tiny_config()["model"]["params"]
    params["encoder_config"]["params"]["in_channels"] = 4
    params["decoder_config"]["params"] |= {"out_channels": 4, "enlarge": 2}
    return tiny(**params)


def test_colours_of_clear_pixels_do_not_show_when_rgba_is_halved():
    """By hand, in float64, and as Pillow's pictures, whose colours have alpha in them."""
    levels = torch.randint(0, 256, (1, 4, 8, 6), dtype=torch.uint8)
    levels[:, 3, :2] = 0
    levels[:, 3, 2:4, ::2] = 255
    model = rgba_at_2x()
    small = model.shrink(levels / 127.5 - 1)

    blocks = levels.double().unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)  # (1, 4, 4, 3, 4)
    alpha = blocks[:, 3:]
    weighted = (blocks[:, :3] * alpha).sum(-1) / alpha.sum(-1)
    clear = alpha.sum(-1) == 0
    colours = torch.where(clear, blocks[:, :3].mean(-1), weighted)
    expected = torch.cat((colours, alpha.mean(-1)), 1) / 127.5 - 1
    torch.testing.assert_close(small.double(), expected, rtol=0, atol=1e-4)
    picture = Image.fromarray(levels[0].permute(1, 2, 0).numpy(), "RGBA")
    pillow = image_to_tensor(picture.resize((3, 4), Image.Resampling.BOX)).double()
    opaque = (alpha.mean(-1) > 64).expand_as(colours)
    found = (small[:, :3].double() + 1) * 127.5
    assert (found - pillow[None, :3])[opaque].abs().max() < 3  # of 8 bits with alpha in them

    # Four bands of other ranges are no alpha.
    model.pixel_range = PixelRange((0.0,), (1.0,))
    plain = blocks.mean(-1) / 127.5 - 1
    torch.testing.assert_close(model.shrink(levels / 127.5 - 1).double(), plain, rtol=0, atol=1e-5)


def test_halving_rgba_has_finite_gradients():
    """Also of decoded images, beyond [-1, 1] and clear everywhere."""
    x = torch.full((1, 4, 4, 4), -3.0, requires_grad=True)
    rgba_at_2x().shrink(x).sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(x.grad[:, :3], torch.full((1, 3, 4, 4), 0.25))
    # More than opaque is opaque.
    x = torch.randn(1, 4, 2, 2)
    x[0, 3] = torch.tensor([[1.0, 3.0], [1.5, 7.0]])
    torch.testing.assert_close(rgba_at_2x().shrink(x), x.mean((2, 3), keepdim=True))


def test_latent_dim_may_be_left_out_or_be_as_published():
    def channels(latent_dim):
        config = tiny_config()["model"]["params"]
        if latent_dim is not None:
            config["encoder_config"]["params"]["latent_dim"] = latent_dim
        return LiteVAE.from_config(
            config["encoder_config"], config["decoder_config"], 4
        ).encoder.latent_dim

    assert {channels(latent_dim) for latent_dim in (None, 4, 8)} == {8}
    with pytest.raises(ConfigError, match="leave latent_dim out"):
        channels(6)


def test_quantizer_is_a_convolution_before_and_after_the_latent():
    config = tiny_config()["model"]["params"]
    config["encoder_config"]["params"]["latent_dim"] = 10
    vae = LiteVAE.from_config(config["encoder_config"], config["decoder_config"], 6, use_quant=True)
    names = {name for name, _ in vae.named_parameters() if name.startswith("quantizer.")}
    assert names == {
        f"quantizer.{conv}.{p}"
        for conv in ("quant_conv", "post_quant_conv")
        for p in ("weight", "bias")
    }
    assert vae.latent_channels == 6
    x = torch.rand(1, 3, 16, 16)
    z = vae.encode(x).mode()
    assert z.shape == (1, 6, 2, 2)
    torch.testing.assert_close(z, vae.quantizer.quant_conv(vae.encoder(x))[:, :6])
    torch.testing.assert_close(vae.decode(z), vae.decoder(vae.quantizer.post_quant_conv(z)))


def test_encoder_and_decoder_that_do_not_fit_are_refused():
    def encoder(**arguments):
        return LiteVAE_Encoder(**{"latent_dim": 8, "scale": "S", **arguments})

    def decoder(**arguments):
        return LiteVAE_Decoder(**{"channels": 8, "z_channels": 4, **arguments})

    with pytest.raises(ValueError, match=r"latent_dim, 8, .* z_channels, 6"):
        LiteVAE(encoder(), decoder(z_channels=3))
    with pytest.raises(ValueError, match=r"downscale, 4, .*upscale .*enlarge.*, 8"):
        LiteVAE(encoder(dct_levels=2), decoder())
    with pytest.raises(ValueError, match="in_channels, 1, is not"):
        LiteVAE(encoder(in_channels=1), decoder())
    assert LiteVAE(encoder(latent_dim=5), decoder(), Quantizer(5, 3, 4)).latent_channels == 3


def test_initial_logvar_shifts_log_variances_alone():
    def moments(**changes):
        torch.manual_seed(0)
        config = tiny_config()["model"]["params"]
        config["encoder_config"]["params"]["latent_dim"] = 10 if changes.get("use_quant") else 8
        vae = LiteVAE.from_config(config["encoder_config"], config["decoder_config"], 4, **changes)
        posterior = vae.encode(torch.full((1, 3, 16, 16), 0.3))
        return posterior.mean, posterior.logvar

    for use_quant in (False, True):
        (mean, logvar), (shifted_mean, shifted) = (
            moments(use_quant=use_quant),
            moments(use_quant=use_quant, initial_logvar=-4.0),
        )
        torch.testing.assert_close(mean, shifted_mean)
        torch.testing.assert_close(logvar - 4.0, shifted)


def test_the_posterior_is_float32_under_autocast():
    vae, x = tiny().train(), torch.rand(2, 3, 24, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reconstruction, posterior = vae(x)
    assert (reconstruction.shape, posterior.mean.shape) == (x.shape, (2, 4, 3, 2))
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert torch.isfinite(reconstruction).all()
    reconstruction, posterior = vae.bfloat16()(x.bfloat16())  # a bf16 model stays bf16
    assert reconstruction.dtype == posterior.mean.dtype == torch.bfloat16


def test_autoencoder_refuses_images_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\[-1, 1\], got torch\.uint8"):
        tiny().encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple of 8"):
        tiny().encode(torch.rand(1, 3, 20, 16))
    with pytest.raises(TypeError, match=r"\(B, C, H, W\) .*list: .*pil_to_tensor"):
        tiny().encode([[0.0]])
    with pytest.raises(TypeError, match=r"got DiagonalGaussian: .*\.mode\(\)"):
        tiny().decode(tiny().encode(torch.zeros(1, 3, 16, 16)))


@pytest.mark.parametrize("use_quant", [False, True])
@pytest.mark.parametrize("kind", ["litevae", "paper", "sd"])
def test_the_means_are_float32s_under_autocast(kind, use_quant):
    """Not on bf16's grid, and the last convolution's own of what it gets;
    without autocast the same bits as torch's.
    """
    target = (
        "olvae.modules.sdvae.SDEncoder"
        if kind == "sd"
        else "olvae.modules.litevae.encoder_model.LiteVAE_Encoder"
    )
    params = {"channels": 8, "channel_mult": [1, 1, 1, 1], "num_res_blocks": 1, "norm_groups": 4}
    if kind != "sd":
        params = {**TINY_ENCODER, "variant": "paper" if kind == "paper" else "open_litevae"}
    params |= {"latent_dim": 8, "linear": True, "image_size": 16}
    torch.manual_seed(0)
    decoder = tiny_config()["model"]["params"]["decoder_config"]
    vae = LiteVAE.from_config({"target": target, "params": params}, decoder, 4, use_quant=use_quant)
    last, path = last_convolution(vae.encoder), vae.encoder.linear
    torch.nn.init.normal_(last.weight, std=0.3)
    x, inputs = torch.rand(2, 3, 32, 32) * 2 - 1, []
    last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    plain = copy.deepcopy(vae)
    for conv in plain.modules():
        if isinstance(conv, torch.nn.Conv2d):
            conv.__class__ = torch.nn.Conv2d
    with torch.no_grad():
        assert torch.equal(vae.encode(x).mean, plain.encode(x).mean)
        inputs.clear()
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.moments(x)
        (given,) = inputs
        conv = torch.nn.functional.conv2d
        network = conv(
            given.double(), last.weight.double(), last.bias.double(), padding=last.padding
        )
        around = torch.nn.functional.pad(x, (4, 4, 4, 4), "replicate")
        network[:, :4] += conv(around.double(), path.weight.double(), path.bias.double(), stride=8)
        if use_quant:
            quant = vae.quantizer.quant_conv
            network = conv(network, quant.weight.double(), quant.bias.double())
    assert given.dtype == torch.bfloat16
    assert moments.dtype == torch.float32
    torch.testing.assert_close(moments.double(), network, atol=1e-5, rtol=1e-5)
    assert (moments == moments.bfloat16()).float().mean() < 0.1
