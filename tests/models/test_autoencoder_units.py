"""Latents in a diffusion model's units, sizes and limits of an autoencoder, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.models.autoencoder import DecoderInput, Quantizer, load_located
from olvae.models.large.streaming import Plane
from olvae.models.linear_code import LinearDecoder, LinearEncoder
from olvae.models.spec import AutoencoderSpec
from olvae.modules.counting import count_parameters
from olvae.modules.distributions import Deterministic
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from tests.conftest import tiny, tiny_config
from tests.export.latents import Shrunk

CPU = torch.device("cpu")


def linear(**decoder) -> LiteVAE:
    """Two channels, patches of 4 pixels."""
    return LiteVAE(LinearEncoder(4, 3, 4), LinearDecoder(2, 3, 4, **decoder)).eval()


def test_latents_come_from_a_diffusion_models_units():
    """By one factor and shift; by numbers for each channel; by four, for each place in a patch."""
    model, z = linear(), torch.randn(2, 2, 3, 5)
    model.set_for_diffusion({"scaling_factor": 0.5, "shift_factor": 3})
    torch.testing.assert_close(model.from_diffusion(z), z / 0.5 + 3)
    model.set_for_diffusion({"latents_mean": [1, -2], "latents_std": [3, 4]})
    expected = torch.stack((z[:, 0] * 3 / 0.5 + 1, z[:, 1] * 4 / 0.5 - 2), dim=1)
    torch.testing.assert_close(model.from_diffusion(z), expected)
    mean, std = [1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]
    model.set_for_diffusion({"latents_mean": mean, "latents_std": std, "scaling_factor": 1})
    found = model.from_diffusion(z)
    for place in np.ndindex(2, 3, 5):
        channel, row, column = place
        number = 4 * channel + 2 * (row % 2) + column % 2
        expected = z[:, channel, row, column] * std[number] + mean[number]
        torch.testing.assert_close(found[:, channel, row, column], expected)
    # Either without the other is none.
    model.latents_mean = None
    torch.testing.assert_close(model.from_diffusion(z), z + 3)
    model.latents_mean, model.latents_std = [0.0, 0.0], None
    torch.testing.assert_close(model.from_diffusion(z), z + 3)


def test_statistics_of_latents_by_the_factors():
    model = linear()
    for factors, mean, std in (
        ({}, [0, 0], [1, 1]),
        ({"scaling_factor": 0.25, "shift_factor": 3}, [3, 3], [4, 4]),
        ({"latents_mean": [1, 2], "latents_std": [3, 6]}, [1, 2], [12, 24]),
        ({"latents_mean": list(range(8)), "latents_std": [1] * 4 + [3, 5, 3, 5]}, *2 * [None]),
    ):
        found_mean, found_std = model.set_for_diffusion(factors).statistics()
        assert found_mean.tolist() == (mean or [1.5, 5.5])
        assert found_std.tolist() == (std or [4, 16])


def test_an_enlarging_model_shrinks_images_by_block_means():
    model, x = linear(enlarge=2), torch.arange(32.0).view(1, 1, 4, 8)
    assert (model.downscale, model.upscale, model.enlarge) == (4, 8, 2)
    expected = x.view(1, 1, 2, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(model.shrink(x), expected)
    plain = linear()
    assert plain.shrink(x) is x
    assert (plain.upscale, plain.image_size, plain.side) == (4, 128, None)


def test_a_model_of_another_kind_is_no_litevae():
    with pytest.raises(ConfigError, match="only LiteVAE"):
        Shrunk().as_litevae("it")
    model = linear()
    assert model.as_litevae("it") is model
    z = torch.zeros(1, 2, 2, 2)
    Shrunk().use_latents(z, z)
    x = torch.rand(1, 3, 4, 6)
    whole, image = Shrunk().encode_within(x, 1), Shrunk().decode_tiled(x)
    assert torch.equal(whole.mean, Shrunk().encode(x).mean)
    assert torch.equal(image, Shrunk().decode(x))
    assert not whole.mean.requires_grad
    assert not image.requires_grad
    with pytest.raises(ValueError, match=r"Shrunk .*`tile`"):
        Shrunk().decode_tiled(x, 8)


def test_a_quantizer_begins_as_the_identity_where_it_can():
    square = Quantizer(6, 3, 3)
    square.start_as_identity()
    x, z = torch.randn(1, 6, 2, 2), torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(square.quant_conv(x), x)
    torch.testing.assert_close(square.post_quant_conv(z), z)
    with pytest.raises(ConfigError, match=r"quant_conv .*6 .*4"):
        Quantizer(6, 2, 2).start_as_identity()
    with pytest.raises(ConfigError, match=r"post_quant_conv .*3 .*4"):
        Quantizer(6, 3, 4).start_as_identity()


LINEAR = {
    "encoder_config": {
        "target": "olvae.models.linear_code.LinearEncoder",
        "params": {"latent_dim": 4, "downscale": 4},
    },
    "decoder_config": {
        "target": "olvae.models.linear_code.LinearDecoder",
        "params": {"z_channels": 2, "upscale": 4},
    },
}


def test_log_variances_begin_where_there_are_some():
    plain = LiteVAE.from_config(**LINEAR, embed_dim=2)
    assert plain.quantizer is None
    with pytest.raises(ConfigError, match="initial_logvar: LinearEncoder"):
        LiteVAE.from_config(**LINEAR, embed_dim=2, initial_logvar=-1.0)
    quantized = LiteVAE.from_config(**LINEAR, embed_dim=2, use_quant=True, initial_logvar=-1.0)
    assert quantized.quantizer.quant_conv.bias.tolist() == [0.0, 0.0, -1.0, -1.0]
    # A quantizer is the identity beside a single linear path, too.
    params = tiny_config(use_quant=True)["model"]["params"]
    params["encoder_config"]["params"] |= {"linear": True, "latent_dim": 8}
    assert not tiny(**params).quantizer.quant_conv.bias.any()


def test_a_spec_is_counted_before_it_is_built():
    """As many parameters as are allowed, exactly; a folded one has fewer."""
    count = count_parameters(linear())
    spec = AutoencoderSpec(**LINEAR, embed_dim=2, scaling_factor=2, pixel_range=[0, 10])
    model = LiteVAE.from_spec(spec, count)
    assert count_parameters(model) == count
    assert model.scaling_factor == 2.0
    assert model.pixel_range.high == (10.0,)
    assert not model.folded
    with pytest.raises(ConfigError, match=f"{count:,} parameters"):
        LiteVAE.from_spec(spec, count - 1)
    ranges = AutoencoderSpec(**LINEAR, embed_dim=2, pixel_range=[[0, 1]] * 2)
    with pytest.raises(ConfigError, match=r"pixel_range: 2 .*3 channels"):
        LiteVAE.from_spec(ranges)
    folded = LiteVAE.from_spec(AutoencoderSpec(**tiny().config, folded=True))
    assert folded.folded
    assert count_parameters(folded) < count_parameters(tiny())


def test_a_config_that_builds_no_autoencoder_is_named_by_its_origin():
    """What is built is in evaluation mode, and draws from no generator of the caller's."""
    weights = linear().state_dict()
    spec = AutoencoderSpec(**LINEAR, embed_dim=2)
    found = SimpleNamespace(spec=spec, origin="config.json", weights="file")
    before = torch.get_rng_state()
    model = load_located(found, weights, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor.double())
    # Tensors that nothing fits are the same every time.
    name = "decoder.linear.bias"
    part = {key: value for key, value in weights.items() if key != name}
    part["encoder.more"] = torch.zeros(9)
    fresh = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match="file: "):
            fresh.append(load_located(found, part, allow_mismatch=True))
    assert torch.equal(fresh[0].state_dict()[name], fresh[1].state_dict()[name])
    decoder = {**LINEAR["decoder_config"], "params": {"z_channels": 3, "upscale": 4}}
    wrong = AutoencoderSpec(LINEAR["encoder_config"], decoder, 2)
    with pytest.raises(ConfigError, match=r"config\.json: no autoencoder"):
        load_located(SimpleNamespace(spec=wrong, origin="config.json", weights="x"), weights)


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_windows_of_a_plane_of_moments_are_the_decoders_input(quantized):
    quantizer = Quantizer(4, 2, 2) if quantized else None
    model = LiteVAE(LinearEncoder(4, 3, 4), LinearDecoder(2, 3, 4), quantizer)
    encoded = torch.randn(1, 4, 5, 6)
    plane = Plane(4, 5, 6, in_memory=True)
    plane.write(0, encoded)
    windows = DecoderInput(model, plane, CPU)
    assert tuple(windows.shape) == (1, 2, 5, 6)
    z = encoded[:, :2]
    if quantizer is not None:
        z = quantizer.post_quant_conv(quantizer.quant_conv(encoded)[:, :2])
    torch.testing.assert_close(windows[..., slice(1, 4), slice(2, 6)], z[:, :, 1:4, 2:6])


@torch.no_grad()
def test_latents_without_a_distribution_are_points():
    encoder, decoder = TinyEncoder(6, channels=2, blocks=(0, 0)), TinyDecoder(2, 3, blocks=(0, 0))
    model, x = LiteVAE(encoder, decoder), torch.rand(1, 3, 4, 6)
    posterior = model.encode(x)
    assert isinstance(posterior, Deterministic)
    assert torch.equal(posterior.mean, encoder(x)[:, :3])
    whole = model.encode_within(x, 2**30)
    assert isinstance(whole, Deterministic)
    assert torch.equal(whole.mean, posterior.mean)
    assert torch.equal(model.moments_within(x, 2**30), encoder(x))
    torch.testing.assert_close(model.decode_tiled(posterior.mean, 1), model.decode(posterior.mean))


def test_a_folded_model_says_so_and_the_other_stays():
    model = tiny()
    folded = model.fold()
    assert folded.folded
    assert not model.folded
    assert folded.export_config()["folded"]
    config = model.export_config()
    assert not config["folded"]
    sizes = {name: config[name] for name in ("in_channels", "out_channels", "latent_channels")}
    assert sizes == {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
    assert not config["use_quant_conv"]
    assert config["sample_size"] == model.encoder.image_size
    assert len(config["block_out_channels"]) == 4
    assert tiny(use_quant=True).export_config()["use_post_quant_conv"]
