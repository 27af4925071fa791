"""Decoders at 2x: at first the decoder at 1x enlarged by nearest neighbours, exact in tiles."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olvae.config import instantiate
from olvae.models.large.tiling import decode_tiled, receptive_field
from olvae.models.linear_code import LinearDecoder
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.modules.base import Decoder, last_convolution
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.others.tiny import TinyDecoder
from olvae.modules.others.wrapped import TRAINABLE
from olvae.modules.sdvae import SDDecoder
from tests.models.loading.classes import make

NARROW: dict[str, Any] = {
    "channels": 8,
    "z_channels": 4,
    "channel_mult": (1, 2),
    "num_res_blocks": 0,
}
TILED: dict[str, tuple[type[Decoder], dict[str, Any]]] = {
    "image": (LiteVAE_Decoder, NARROW),
    "wavelet": (LiteVAE_Decoder, {**NARROW, "output": "wavelet", "variant": "paper_smc"}),
    "packets": (LiteVAE_Decoder, {**NARROW, "output": "packets", "linear": True}),
    "linear": (LiteVAE_Decoder, {**NARROW, "linear": True}),
    "tiny": (TinyDecoder, {"channels": 8, "blocks": (1, 1)}),
    "linear code": (LinearDecoder, {"z_channels": 4, "upscale": 2}),
}
WHOLE: dict[str, tuple[type[Decoder], dict[str, Any]]] = {
    "group_norm": (LiteVAE_Decoder, {**NARROW, "variant": "group_norm"}),
    "sd": (SDDecoder, {**NARROW, "norm_groups": 4}),
    "sd, linear": (SDDecoder, {**NARROW, "norm_groups": 4, "linear": True}),
    "taef2": (TinyDecoder, {"channels": 8, "blocks": (1, 1), "pool": True}),
}
ALL = {**TILED, **WHOLE}


def nearest(image: Tensor, by: int) -> Tensor:
    return image.repeat_interleave(by, 2).repeat_interleave(by, 3)


def randomised(network: Decoder) -> Decoder:
    """With weights of their own everywhere, also where training starts at 0."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize("by", [2, 3])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_an_enlarged_decoder_starts_as_nearest_neighbours(name, by):
    kind, arguments = ALL[name]
    one = randomised(kind(**arguments))
    two = kind(**arguments, enlarge=by).eval()
    two.load_state_dict(two.enlarged(one.state_dict()))
    z = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(two(z), nearest(one(z), by), rtol=1e-5, atol=1e-6)
    assert (two.enlarge_by, two.upscale, two.out_channels) == (by, by * one.upscale, 3)
    assert two.widths == one.widths
    again = instantiate(two.node)
    assert again.state_dict().keys() == two.state_dict().keys()


def check_start_at_2x(one):
    """The same decoder at 2x, with its weights: nearest neighbours of its image."""
    node = copy.deepcopy(one.node)
    node["params"]["enlarge"] = 2
    two = instantiate(node).eval()
    two.load_state_dict(two.enlarged(one.state_dict()))
    z = torch.randn(1, one.z_channels, 4, 4)
    torch.testing.assert_close(two(z), nearest(one(z), 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TRAINABLE)
@torch.no_grad()
def test_decoders_of_diffusers_start_as_nearest_neighbours(name):
    one = DiffusersAutoencoder(make(name)).as_litevae(name).decoder.eval()
    check_start_at_2x(one)


@torch.no_grad()
def test_patches_of_pixels_are_enlarged_pixel_by_pixel():
    """Wan 2.2's last convolution gives patches of 2x2 pixels."""
    wan = make("AutoencoderKLWan", in_channels=12, out_channels=12, patch_size=2, is_residual=True)
    one = DiffusersAutoencoder(wan).as_litevae("it").decoder.eval()
    check_start_at_2x(one)


@torch.no_grad()
def test_a_fresh_enlarged_decoder_has_equal_copies_too():
    two = LiteVAE_Decoder(**NARROW, enlarge=2).eval()
    image = two(torch.randn(1, 4, 5, 3))
    assert torch.equal(image, nearest(image[..., ::2, ::2], 2))


@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_tiles_of_an_enlarged_decoder_are_exact(name):
    kind, arguments = TILED[name]
    two = randomised(kind(**arguments, enlarge=2))
    assert receptive_field(two) == receptive_field(kind(**arguments))
    z = torch.randn(1, 4, 9, 6)
    whole = two(z)
    for tile in (1, 4):
        torch.testing.assert_close(
            decode_tiled(two, z, tile), whole, rtol=1e-4, atol=1e-4 * float(whole.std())
        )


def test_gradients_tell_the_copies_apart():
    two = LiteVAE_Decoder(**NARROW, enlarge=2)
    target = torch.rand(1, 3, 20, 12)
    (two(torch.randn(1, 4, 5, 3)) - target).square().mean().backward()
    gradient = last_convolution(two).weight.grad.unflatten(0, (3, 4))
    assert all(not torch.equal(gradient[:, 0], gradient[:, k]) for k in (1, 2, 3))


@pytest.mark.parametrize("by", [0, -1, 5, True, 2.0, "two", None])
def test_a_decoder_is_enlarged_by_a_small_whole_number(by):
    with pytest.raises(ValueError, match=f"enlarge .*{by!r}"):
        TinyDecoder(enlarge=by)
