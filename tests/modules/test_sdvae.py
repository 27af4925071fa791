import pytest
import torch
from torch import nn

from olvae.modules.sdvae import SDDecoder, SDEncoder, block_types

SMALL = {"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4}


def networks(**arguments) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        SDEncoder(8, image_size=32, **SMALL, **arguments),
        SDDecoder(z_channels=4, **SMALL, **arguments),
    ]


def test_reflection_pads_every_convolution_with_a_border():
    """The weights are those of zeros; a network of constant images is constant up to the border."""
    for zeros, reflect in zip(
        networks(), networks(padding="reflect", attention=False), strict=True
    ):
        convolutions = [m for m in reflect.modules() if isinstance(m, nn.Conv2d)]
        assert {
            m.padding_mode for m in convolutions if m.kernel_size == (3, 3) and m.stride == (1, 1)
        } == {"reflect"}
        assert {m.padding_mode for m in zeros.modules() if isinstance(m, nn.Conv2d)} == {"zeros"}
    decoder = networks(padding="reflect")[1]
    z = torch.randn(1, 4, 1, 1).expand(1, 4, 6, 8)
    with torch.no_grad():
        x = decoder(z)
        torch.testing.assert_close(x, x[..., :1, :1].expand_as(x), atol=1e-5, rtol=0)
        x = networks()[1](z)
        assert (x - x[..., 6:7, 8:9]).abs().max() > 1e-3  # zeros are seen


def test_strided_convolutions_keep_zero_padding():
    """At the bottom and the right, as published; diffusers adds them by itself."""
    for encoder in (networks()[0], networks(padding="reflect")[0]):
        (down,) = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        assert down.padding_mode == "zeros"
        seen = []
        down.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        encoder(torch.rand(1, 3, 8, 8))
        assert seen[0].shape[-2:] == (9, 9)
        assert seen[0][..., -1, :].abs().max() == seen[0][..., -1].abs().max() == 0


def test_sd_networks_without_attention():
    for with_it, without in zip(networks(), networks(attention=False), strict=True):
        named = {name for name, _ in with_it.named_parameters()} - {
            name for name, _ in without.named_parameters()
        }
        assert named
        assert all(".attentions." in name for name in named)


def test_sd_networks_refuse_other_padding_and_sizes():
    with pytest.raises(ValueError, match="multiple of 8"):
        SDEncoder(image_size=100)
    for network in (SDEncoder, SDDecoder):
        with pytest.raises(ValueError, match="padding must"):
            network(padding="circular", **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"num_res_blocks": -1}, "num_res_blocks must be at least 0, got -1"),
        ({"attention_levels": [2]}, "attention_levels: 2: there are levels 0 to 1"),
    ],
)
def test_sd_networks_refuse_counts_and_levels_that_are_none(arguments, message):
    for network in (SDEncoder, SDDecoder):
        with pytest.raises(ValueError, match=message):
            network(**{**SMALL, **arguments})


def test_attention_stands_in_its_level_which_decoders_begin_with_the_latents():
    assert block_types(3, [0], [2]) == {
        "down_block_types": ["AttnDownEncoderBlock2D"] + ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2,
    }
    encoder, decoder = networks(attention_levels=[1])
    assert [hasattr(level, "attentions") for level in encoder.model.down_blocks] == [False, True]
    assert [hasattr(level, "attentions") for level in decoder.model.up_blocks] == [True, False]


@torch.no_grad()
def test_linear_paths_of_sd_networks_are_alone_at_first_and_added_later():
    encoder, decoder = networks(linear=True)
    x, z = torch.rand(1, 3, 8, 12), torch.randn(1, 4, 2, 3)
    assert (encoder.latent_dim, encoder.in_channels) == (8, 3)
    assert (decoder.z_channels, decoder.out_channels) == (4, 3)
    assert encoder(x).shape == (1, 8, 4, 6)
    assert torch.equal(encoder(x)[:, :4], encoder.linear(x))
    assert not encoder(x)[:, 4:].any()
    assert torch.equal(decoder(z), decoder.linear_path(z))
    nn.init.normal_(decoder.model.conv_out.weight)
    torch.testing.assert_close(decoder(z), decoder.model(z) + decoder.linear_path(z))
    assert networks()[0].linear is None
    assert SDDecoder(z_channels=4, **SMALL, enlarge=3)(z).shape == (1, 3, 12, 18)


def test_blocks_of_diffusers_are_called_by_the_step():
    for network, shape in zip(networks(), [(1, 3, 8, 8), (1, 4, 4, 4)], strict=True):
        calls = []
        network.step = lambda run, *given, calls=calls: calls.append(run) or run(*given)
        network.checkpoint_steps()
        assert network.checkpoint
        network(torch.randn(shape))
        assert len(calls) == 3  # two levels and the middle


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_every_level_of_sds_after_the_first_doubles_the_image(levels):
    form = {"channels": 8, "channel_mult": [1] * levels, "num_res_blocks": 0, "norm_groups": 4}
    assert SDEncoder(8, **form).downscale == SDDecoder(**form).upscale == 2 ** (levels - 1)
