"""AutoencoderKL as a LiteVAE object and back, against diffusers' own networks."""

import diffusers
import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.models.loading.autoencoder_kl import StableDiffusion
from olvae.models.loading.diffusers_models import DiffusersAutoencoder
from tests.export.latents import Shrunk, tiny_vae
from tests.models.autoencoder_kl import PER_CHANNEL, SHAPES, autoencoder_kl, tiny_kl
from tests.models.loading.classes import make

OTHERS = {
    "per channel": PER_CHANNEL,
    "no attention": {"mid_block_add_attention": False},
    "other groups": {"norm_num_groups": 8},
    "no multiples": {"widths": (24, 40, 56), "norm_num_groups": 8},
    "one level": {"widths": (32,)},
    "grey": {"in_channels": 1, "out_channels": 1},
    "one block": {"widths": (16, 32), "norm_num_groups": 4, "layers_per_block": 1},
}
"""Each beside diffusers' defaults, and narrow where it is not about widths."""

NARROW = {"widths": (32, 64), "layers_per_block": 1}


def make_kl(name: str) -> diffusers.AutoencoderKL:
    return autoencoder_kl(**(SHAPES[name] if name in SHAPES else {**NARROW, **OTHERS[name]}))


def ours_of(theirs: diffusers.AutoencoderKL) -> LiteVAE:
    return DiffusersAutoencoder(theirs).eval().as_litevae("it")


@pytest.mark.parametrize("name", [*SHAPES, *OTHERS])
@torch.no_grad()
def test_encode_and_decode_are_diffusers_own_and_names_go_back(name):
    theirs = make_kl(name)
    ours = ours_of(theirs)
    x = torch.rand(2, theirs.config.in_channels, 32, 48) * 2 - 1
    expected, posterior = theirs.encode(x).latent_dist, ours.encode(x)
    assert torch.equal(posterior.mean, expected.mean)
    assert torch.equal(posterior.logvar, expected.logvar)
    assert expected.mean.std() > 0
    assert torch.equal(ours.decode(expected.mean), theirs.decode(expected.mean).sample)
    assert ours.is_stable_diffusion
    assert not ours.training
    assert (ours.downscale, ours.latent_channels) == (x.shape[-1] // expected.mean.shape[-1], expected.mean.shape[1])
    assert (ours.quantizer is not None) == theirs.config.use_quant_conv
    again = diffusers.AutoencoderKL(**StableDiffusion().config(ours))  # nothing in their config is left out
    for key in set(theirs.config) - {"_use_default_values"}:
        given, back = theirs.config[key], again.config[key]
        assert (list(back) if isinstance(back, tuple | list) else back or 0.0) == (
            list(given) if isinstance(given, tuple | list) else given or 0.0
        ), key
    before, after = theirs.state_dict(), StableDiffusion().theirs(ours)
    assert before.keys() == after.keys() == again.state_dict().keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weights_are_copies_and_the_generator_is_left_alone():
    theirs = tiny_kl()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ours = ours_of(theirs)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        ours.decoder.model.conv_in.weight.zero_()
    assert theirs.decoder.conv_in.weight.abs().max() > 0


def test_a_litevae_is_itself():
    ours = tiny_vae()
    assert ours.as_litevae("x") is ours
    assert not ours.is_stable_diffusion


@pytest.mark.parametrize("sample_size", [64, (64, 32), 30])
def test_a_size_that_our_encoder_does_not_take(sample_size):
    """diffusers' encoder does not use it."""
    ours = ours_of(tiny_kl(sample_size=sample_size))
    assert ours.encoder.image_size == (64 if sample_size == 64 else 256)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make("VQModel"), "diffusers' VQModel can be a teacher; those that can be trained"),
        (
            lambda: tiny_kl(down_block_types=("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",)),
            "down_block_types: AttnDownEncoderBlock2D: only DownEncoderBlock2D",
        ),
        (
            lambda: tiny_kl(up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2),
            "up_block_types: AttnUpDecoderBlock2D: only UpDecoderBlock2D",
        ),
        (lambda: tiny_kl(use_quant_conv=False), "it has one of quant_conv and post_quant_conv"),
        (lambda: tiny_kl(act_fn="gelu"), "act_fn: gelu: only silu"),
    ],
)
def test_what_our_networks_are_not(make, message):
    with pytest.raises(ConfigError, match=f"^diffusers:it: {message}") as caught:
        DiffusersAutoencoder(make()).as_litevae("diffusers:it")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^it: only LiteVAE and AutoencoderKL"):
        Shrunk().as_litevae("it")


@pytest.mark.parametrize(
    ("half", "params", "message"),
    [
        ("decoder", {"channels": 16}, r"widths \[8, 8, 16\], the decoder \[16, 16, 32\]"),
        ("decoder", {"num_res_blocks": 2}, "num_res_blocks 1, the decoder 2"),
        ("encoder", {"attention": False}, "attention False, the decoder True"),
        ("encoder", {"norm_groups": 8}, "norm_groups 8, the decoder 4"),
        ("encoder", {"latent_dim": 16}, "moments 16, the decoder 8: AutoencoderKL"),
        ("decoder", {"z_channels": 6}, "moments 8, the decoder 12"),
    ],
)
def test_halves_that_autoencoder_kl_does_not_have(half, params, message):
    ours = ours_of(tiny_kl()).config
    node = ours[f"{half}_config"]
    mixed = LiteVAE.from_config(**{**ours, f"{half}_config": {**node, "params": {**node["params"], **params}}})
    with pytest.raises(ValueError, match=message):
        StableDiffusion().config(mixed)
