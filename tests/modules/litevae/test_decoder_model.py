import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from olvae.modules.counting import count_macs, count_parameters
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder, reach_of
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.litevae.smc import SMC, fold_smc
from olvae.modules.wavelet import dwt2
from tests.reference import assert_parity, fill, parity_case, recipe_input


def test_decoder_parameters_and_macs_are_the_published_ones():
    with torch.device("meta"):
        published, paper = LiteVAE_Decoder(), LiteVAE_Decoder(variant="paper_smc")
    assert round(count_parameters(published) / 1e6, 4) == 53.3326
    assert round(count_parameters(paper) / 1e6, 2) == 48.46
    macs = count_macs(published, 1, 12, 32, 32) / 1e9
    assert round(macs, 1) == 323.5
    assert macs == pytest.approx(324, rel=0.02)


def test_decoder_parity_with_the_reference():
    case = parity_case("decoder")
    with torch.no_grad():
        output = fill(LiteVAE_Decoder(**case["config"]))(recipe_input(case["input"]))
    assert_parity(output, case["output"])


@pytest.mark.parametrize("variant", ["open_litevae", "paper_smc"])
@pytest.mark.parametrize("output", ["image", "wavelet", "packets"])
def test_decoder_shapes_gradients_and_folding(variant, output):
    decoder = LiteVAE_Decoder(8, 4, 3, (1, 2, 2), 1, variant, output)
    z = torch.randn(2, 4, 5, 6)
    x = decoder(z)
    assert x.shape == (2, 3, 20, 24)
    x.square().mean().backward()
    for name, p in decoder.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name

    for p in decoder.parameters():  # away from the initial scales of 1
        torch.nn.init.normal_(p, std=0.2)
    folded = fold_smc(decoder)
    assert not any(isinstance(m, SMC) for m in folded.modules())
    assert count_parameters(folded) < count_parameters(decoder)
    torch.testing.assert_close(folded(z), decoder(z), rtol=1e-5, atol=1e-5)


def test_group_norm_is_the_papers_decoder_with_plain_blocks():
    """The same convolutions: their products are equal;
    its blocks are diffusers' residual blocks.
    """
    plain = LiteVAE_Decoder(8, 4, 3, (1, 2), 0, "group_norm")
    smc = LiteVAE_Decoder(8, 4, 3, (1, 2), 0, "paper_smc")
    folded = fold_smc(smc)
    assert count_macs(plain, 1, 4, 8, 8) == count_macs(folded, 1, 4, 8, 8)
    assert plain.stages() is None  # its statistics are of the whole image
    assert smc.stages() is not None

    z = torch.randn(2, 4, 5, 6)
    h = plain.conv_in(z)
    for block in plain.mid:
        theirs = ResnetBlock2D(in_channels=16, temb_channels=None, groups=16, eps=block.norm1.eps)
        theirs.load_state_dict(block.state_dict())
        ours = block(h)
        torch.testing.assert_close(theirs(h, None), ours, rtol=1e-5, atol=1e-5)
        h = ours
    plain(z).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in plain.parameters())
    h = torch.randn(2, 8, 3, 4)
    expected = plain.conv_out(F.silu(F.group_norm(h, 8)))
    torch.testing.assert_close(plain.head(h), expected)
    assert LiteVAE_Decoder(6, 4, 3, (1,), 0, "group_norm").conv_norm.num_groups == 2


@pytest.mark.parametrize(("output", "levels"), [("wavelet", 1), ("packets", 2)])
def test_the_last_convolution_predicts_bands_in_the_image_range(output, levels):
    """It gives half the orthonormal bands of the image at each level:
    LL is in the image's range.
    """
    decoder = LiteVAE_Decoder(8, 4, 3, (1, 1, 1), 0, output=output)
    found = []
    decoder.conv_out.register_forward_hook(lambda *args: found.append(args[-1]))
    bands = decoder(torch.randn(1, 4, 4, 5))  # 16 x 20 pixels
    for _ in range(levels):
        bands = dwt2(bands) / 2
    torch.testing.assert_close(bands, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LiteVAE_Decoder(variant="smc"), "one of open_litevae, paper_smc, group_norm"),
        (lambda: LiteVAE_Decoder(output="bands"), "output must be one of image, wavelet, packets"),
        (lambda: LiteVAE_Decoder(8, channel_mult=(1,), output="wavelet"), "two entries"),
        (lambda: LiteVAE_Decoder(0), "^channels must be at least 1, got 0"),
        (
            lambda: LiteVAE_Decoder(8, num_res_blocks=-1),
            "^num_res_blocks must be at least 0, got -1",
        ),
        (lambda: LiteVAE_Decoder(8, 4)(torch.zeros(1, 3, 4, 4)), r"\(B, 4, h, w\)"),
    ],
)
def test_decoder_refuses_wrong_settings_and_latents(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_papers_block_by_hand():
    block, x = LiteVAE_Decoder(8, 4, 3, (1, 2), 0, "paper_smc").mid[0], torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(block(x), x + block.conv2(F.silu(block.conv1(F.silu(x)))))


def test_dropout_is_in_both_halves():
    for network in (
        LiteVAE_Encoder(8, "S", "paper", dropout=0.25),
        LiteVAE_Decoder(8, 4, dropout=0.25),
    ):
        assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} == {
            0.25
        }


@pytest.mark.parametrize(
    ("output", "scales", "reaches"),
    [
        ("image", [1, 1, 1, 1, 2, 1, 2, 1, 1], [1, 2, 2, 2, 1, 2, 1, 2, 1]),
        ("wavelet", [1, 1, 1, 1, 2, 1, 1, 1, 2], [1, 2, 2, 2, 1, 2, 2, 1, 0]),
        ("packets", [1, 1, 1, 1, 1, 1, 1, 2, 2], [1, 2, 2, 2, 2, 2, 1, 0, 0]),
    ],
)
def test_stages_of_a_decoder_of_three_levels(output, scales, reaches):
    """The first convolution, two blocks of 3x3 pairs in the middle, one in each level."""
    decoder = LiteVAE_Decoder(4, 2, 3, (1, 1, 1), 0, "paper_smc", output)
    assert decoder.upscale == 4
    stages = decoder.stages()
    assert [stage.scale for stage in stages] == scales
    assert [stage.reach for stage in stages] == reaches
    z = torch.randn(1, 2, 3, 4)
    h = z
    for stage in stages:
        shape = [side * stage.scale for side in h.shape[-2:]]
        h = stage.run(h)
        assert [*h.shape[-2:]] == shape
    torch.testing.assert_close(h, decoder(z))


def test_a_decoder_of_published_form_has_these_blocks():
    """Three in the middle, or two; `num_res_blocks` + 1 in each level, whose width they have."""
    for variant, middle in (("open_litevae", 3), ("paper_smc", 2), ("group_norm", 2)):
        decoder = LiteVAE_Decoder(4, 2, 3, (1, 2, 3), 1, variant)
        assert len(decoder.mid) == middle
        assert [len(level["block"]) for level in decoder.up] == [2, 2, 2]
        assert [level["upsample"].conv.out_channels for level in decoder.up[1:]] == [8, 12]
        assert "upsample" not in decoder.up[0]
        assert decoder.conv_in.out_channels == 12
        assert decoder.conv_out.in_channels == 4
        assert len(decoder.blocks()) == 1 + middle + 3 * 2 + 2


def test_reach_of_convolutions_in_a_row_adds_up():
    assert [reach_of(nn.Conv2d(1, 1, size)) for size in (1, 2, 3, 5, 7)] == [0, 1, 1, 2, 3]
    assert reach_of(nn.Sequential(nn.Conv2d(1, 1, 3), nn.SiLU()), nn.Conv2d(1, 1, 5)) == 3


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_every_level_after_the_first_doubles_the_image(levels):
    assert LiteVAE_Decoder(4, channel_mult=[1] * levels, num_res_blocks=0).upscale == 2 ** (
        levels - 1
    )


@torch.no_grad()
def test_a_decoders_linear_path_is_alone_at_first_and_added_later():
    decoder = LiteVAE_Decoder(4, 2, 3, (1, 2), 0, output="wavelet", linear=True)
    z = torch.randn(1, 2, 3, 4)
    assert torch.equal(decoder(z), decoder.linear_path(z))
    nn.init.normal_(decoder.conv_out.weight)
    h = z
    for stage in decoder.stages():
        h = stage.run(h)
    torch.testing.assert_close(decoder(z), h + decoder.linear_path(z))
    assert LiteVAE_Decoder(4, 2).linear is None


def test_the_smallest_decoder_and_an_enlarging_one():
    least = LiteVAE_Decoder(1, 2, channel_mult=(1,), num_res_blocks=0)
    assert least(torch.randn(1, 2, 3, 4)).shape == (1, 3, 3, 4)
    larger = LiteVAE_Decoder(4, 2, channel_mult=(1, 1), num_res_blocks=0, enlarge=3)
    assert larger(torch.randn(1, 2, 3, 4)).shape == (1, 3, 18, 24)
