"""Other image channels: the new networks' function against the old ones'."""

import copy

import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.models.linear_code import LinearDecoder, LinearEncoder
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.training.start_from import _resized, enlarged_as, with_channels
from tests.export.latents import tiny_vae
from tests.models.autoencoder_kl import tiny_kl
from tests.models.loading.classes import make

MAKE = {
    "KL": tiny_kl,
    **{
        name: lambda n=name: make(f"Autoencoder{n}")
        for name in ("DC", "KLFlux2", "KLQwenImage", "KLWan", "KLKVAE")
    },
}


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_with_channels_keeps_the_function_of_the_networks(name):
    rgb = DiffusersAutoencoder(MAKE[name]()).eval().as_litevae("it")
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    z = rgb.encode(x).mean
    rgba = with_channels(rgb, 4, "it")
    assert (rgba.in_channels, rgba.decoder.out_channels, rgba.training) == (4, 4, False)
    torch.testing.assert_close(
        rgba.encode(torch.cat((x, torch.rand(1, 1, 16, 16)), 1)).mean, z, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(rgba.decode(z)[:, :3], rgb.decode(z), rtol=1e-4, atol=1e-5)
    back = with_channels(rgba, 3, "it")
    torch.testing.assert_close(
        back.decode(back.encode(x).mean), rgb.decode(z), rtol=1e-4, atol=1e-5
    )
    if name == "DC":
        return  # its shortcuts average groups of channels
    grey = with_channels(rgb, 1, "it")
    expected = rgb.encode(x[:, :1].repeat(1, 3, 1, 1)).mean
    torch.testing.assert_close(grey.encode(x[:, :1]).mean, expected, rtol=1e-4, atol=1e-4)
    if "Wan" not in name and "Qwen" not in name:  # which clamp the image
        mean = rgb.decode(z).mean(1, keepdim=True)
        torch.testing.assert_close(grey.decode(z), mean, rtol=1e-4, atol=1e-5)
    again = with_channels(grey, 3, "it")
    torch.testing.assert_close(
        again.decode(z), grey.decode(z).repeat(1, 3, 1, 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("name", "times"), [("KL", 3), ("KLWan", 2)])
@torch.no_grad()
def test_with_channels_keeps_the_function_of_a_decoder_that_enlarges(name, times):
    one = DiffusersAutoencoder(MAKE[name]()).eval().as_litevae("it")
    node = copy.deepcopy(one.decoder.node)
    node["params"]["enlarge"] = times
    rgb = enlarged_as(one, node, "it")
    for key, tensor in rgb.decoder.state_dict().items():
        if key.endswith(("conv_out.weight", "conv_out.bias")):
            tensor.add_(0.1 * torch.randn_like(tensor))  # so that the copies differ
    z = torch.randn(1, rgb.latent_channels, 4, 4)
    rgba = with_channels(rgb, 4, "it")
    assert (rgba.in_channels, rgba.enlarge) == (4, times)
    torch.testing.assert_close(rgba.decode(z)[:, :3], rgb.decode(z), rtol=1e-4, atol=1e-5)
    mean = rgb.decode(z).mean(1, keepdim=True)
    if name == "KLWan":  # which clamps the image
        return
    torch.testing.assert_close(with_channels(rgb, 1, "it").decode(z), mean, rtol=1e-4, atol=1e-5)


def test_with_channels_refuses_networks_that_know_the_channels_elsewhere():
    with pytest.raises(
        ConfigError,
        match=r"^it: .*3 .*data\.params\.channels to 3",
    ):
        with_channels(tiny_vae(), 4, "it")
    # Wan 2.2's
    patches = make(
        "AutoencoderKLWan", in_channels=12, out_channels=12, patch_size=2, is_residual=True
    )
    with pytest.raises(ConfigError, match=r"^it: .*patches .*3 channels"):
        with_channels(DiffusersAutoencoder(patches).as_litevae("it"), 1, "it")


class Scaled(LinearEncoder):
    """Also scales each channel of the image."""

    def __init__(self, latent_dim: int = 4, in_channels: int = 3) -> None:
        super().__init__(latent_dim, in_channels, 4)
        self.scale = torch.nn.Parameter(torch.ones(in_channels))


def test_a_network_that_has_more_than_convolutions_of_the_channels_is_refused():
    model = LiteVAE(Scaled(), LinearDecoder(2, 3, 4))
    with pytest.raises(ConfigError, match=r"it: is for images of 3 channels, which encoder\.scale"):
        with_channels(model, 4, "it")


@pytest.mark.parametrize(
    ("axis", "channels", "expected"),
    [
        (1, 1, [[6.0]]),
        (1, 2, [[1.0, 2.0]]),
        (1, 5, [[1.0, 2.0, 3.0, 0.0, 0.0]]),
        (0, 1, [[2.0]]),
        (0, 2, [[1.0], [2.0]]),
        (0, 5, [[1.0], [2.0], [3.0], [0.0], [0.0]]),
    ],
)
def test_weights_of_three_channels_become_those_of_others(axis, channels, expected):
    """To one channel inputs are summed, and outputs averaged; to more there are zeros."""
    three = torch.tensor([1.0, 2.0, 3.0]).view((1, 3) if axis else (3, 1))
    assert _resized(three, axis, channels).tolist() == expected


def test_weights_of_one_channel_are_shared_out_or_repeated():
    one = torch.tensor([[6.0]])
    assert _resized(one, 1, 3).tolist() == [[2.0, 2.0, 2.0]]
    assert _resized(one, 0, 3).tolist() == [[6.0], [6.0], [6.0]]
