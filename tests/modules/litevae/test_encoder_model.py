import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F

from olvae.modules.counting import count_macs, count_parameters
from olvae.modules.distributions import DiagonalGaussian
from olvae.modules.litevae.encoder_model import (
    SCALES,
    LiteVAE_Encoder,
    PreActivationBlock,
    WaveletEncoder,
)
from olvae.modules.wavelet import wavedec2
from tests.reference import assert_parity, fill, parity_case, recipe_input

# Counted on the published modules with latent_dim = n_z = 12 [M], in units of 1e6 and, at 256x256,
# 1e9.
OPEN = {
    "S": (0.977, 5.43, 5.5),
    "B": (6.623, 37.10, 37.4),
    "M": (34.125, 233.95, 234.9),
    "L": (41.153, 241.14, 242.1),
}
# The paper's variant gives 8 moments, n_z = 4.
PAPER = {"S": 1.0357, "B": 6.7506, "M": 32.7501, "L": 41.4224}


@pytest.mark.parametrize("scale", SCALES)
def test_encoder_parameters_and_macs_of_the_published_variant(scale):
    with torch.device("meta"):
        encoder = LiteVAE_Encoder(latent_dim=12, scale=scale)
    params, counted, published = OPEN[scale]
    assert round(count_parameters(encoder) / 1e6, 3) == params
    macs = count_macs(encoder, 1, 3, 256, 256) / 1e9
    assert round(macs, 2) == counted
    assert macs == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("scale", SCALES)
def test_encoder_parameters_and_macs_of_the_paper_variant(scale):
    with torch.device("meta"):
        encoder = LiteVAE_Encoder(latent_dim=8, scale=scale, variant="paper")
    assert round(count_parameters(encoder) / 1e6, 4) == PAPER[scale]


@pytest.mark.parametrize("case", ["encoder_S", "encoder_B"])
def test_encoder_parity_with_the_reference(case):
    case = parity_case(case)
    with torch.no_grad():
        output = fill(LiteVAE_Encoder(**case["config"]))(recipe_input(case["input"]))
    assert_parity(output, case["output"])


def test_encoder_widths_override_a_preset():
    encoder = LiteVAE_Encoder(scale="S", aggregate_channels=8)
    assert encoder.aggregator.init_conv.out_channels == 8
    assert encoder.extractors[0].init_conv.out_channels == 16


@pytest.mark.parametrize("variant", ["open_litevae", "paper"])
@pytest.mark.parametrize(("size", "levels"), [((64, 40), 3), ((16, 16), 1), ((32, 16), 4)])
def test_encoder_takes_any_size_and_depth(variant, size, levels):
    encoder = LiteVAE_Encoder(6, "S", variant, dct_levels=levels)
    f = 2**levels
    assert encoder(torch.randn(2, 3, *size)).shape == (2, 6, size[0] // f, size[1] // f)
    assert len(encoder.extractors) == levels


def test_the_paper_scales_its_bands():
    """Level l is divided by 2^l, so that LL stays in the image's range:
    a constant image gives that constant.
    """
    encoder = LiteVAE_Encoder(6, "S", "paper")
    seen = []
    for extractor in encoder.extractors:
        extractor.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(torch.full((1, 3, 16, 16), 0.5))
    for bands in seen:
        torch.testing.assert_close(bands[:, :3], torch.full_like(bands[:, :3], 0.5))
    assert len(seen) == 3


def test_learned_pool_of_the_paper_encoder():
    average = LiteVAE_Encoder(6, "S", "paper")
    learned = LiteVAE_Encoder(6, "S", "paper", pool="conv")
    assert count_parameters(learned) - count_parameters(average) == 3 * (12 * 12 * 9 + 12)
    assert learned(torch.randn(1, 3, 16, 16)).shape == (1, 6, 2, 2)


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_shared_extractor_and_skipped_levels(shared, skip):
    """The composition again, spelt out: the coarsest levels alone,
    through one extractor or one each.
    """
    encoder = LiteVAE_Encoder(6, "S", "paper", shared_extractor=shared, skip_levels=skip).double()
    assert len(encoder.extractors) == (1 if shared else 3 - skip)
    assert encoder.aggregator.init_conv.in_channels == 12 * (3 - skip)
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    features = [
        F.avg_pool2d(
            encoder.extractors[0 if shared else level - skip](
                wavedec2(x)[level] / 2 ** (level + 1)
            ),
            4 >> level,
        )
        for level in range(skip, 3)
    ]
    torch.testing.assert_close(encoder(x), encoder.aggregator(torch.cat(features, dim=1)))


@pytest.mark.parametrize("variant", ["open_litevae", "paper"])
def test_packets_are_pywavelets_and_go_to_the_aggregator_alone(variant):
    encoder = LiteVAE_Encoder(6, "S", variant, in_channels=1, dct_levels=2, packets=True)
    assert len(encoder.extractors) == 0
    given = []
    encoder.aggregator.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    x = torch.rand(1, 1, 12, 20)
    assert encoder(x).shape == (1, 6, 3, 5)
    nodes = pywt.WaveletPacket2D(
        x[0, 0].double().numpy(), "haar", "periodization", maxlevel=2
    ).get_level(2)
    expected = sorted((np.abs(node.data) for node in nodes), key=lambda band: band.flat[0])
    # Signs of details are conventions.
    ours = sorted(given[0][0].abs().numpy(), key=lambda band: band.flat[0])
    scale = 4 if variant == "paper" else 1  # so that the low band is in the image's range
    np.testing.assert_allclose(ours, np.stack(expected) / scale, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"variant": "paper"}, {"shared_extractor": True, "skip_levels": 1}, {"packets": True}],
)
def test_every_parameter_of_the_encoder_learns(arguments):
    encoder = LiteVAE_Encoder(6, "S", **arguments)
    encoder(torch.randn(2, 3, 32, 32)).square().mean().backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LiteVAE_Encoder(), "extractor_channels"),
        (lambda: LiteVAE_Encoder(scale="XL"), "S, B, M, L"),
        (
            lambda: LiteVAE_Encoder(scale="S", variant="open"),
            "variant must be one of open_litevae, paper",
        ),
        (lambda: LiteVAE_Encoder(scale="S", image_size=100), "multiple of 8"),
        (lambda: LiteVAE_Encoder(scale="S", pool="conv"), "paper variant"),
        (
            lambda: LiteVAE_Encoder(scale="S", skip_levels=3),
            "skip_levels must be from 0 to 2, .* got 3",
        ),
        (
            lambda: LiteVAE_Encoder(scale="S", packets=True, skip_levels=1),
            "packets has no extractors",
        ),
        (lambda: LiteVAE_Encoder(scale="S", dct_levels=0), "^dct_levels must be at least 1, got 0"),
        (lambda: WaveletEncoder(dct_levels=0), "^dct_levels must be at least 1, got 0"),
        (
            lambda: LiteVAE_Encoder(scale="S", aggregate_channels=0),
            "^aggregate_channels .* 1, got 0",
        ),
        (lambda: LiteVAE_Encoder(scale="S", extractor_mult=(1, 0)), "^extractor_mult .* 1, got"),
        (lambda: LiteVAE_Encoder(scale="S", aggregate_resblocks=-1), "^aggregate_res.* 0, got -1"),
        (lambda: LiteVAE_Encoder(scale="S")(torch.zeros(1, 3, 60, 64)), "64x64"),
        (lambda: LiteVAE_Encoder(scale="S")(torch.zeros(1, 1, 64, 64)), r"\(B, 3, H, W\)"),
    ],
)
def test_encoder_refuses_wrong_settings_and_images(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("variant", ["open_litevae", "paper"])
def test_the_smallest_encoder_has_one_width_and_no_blocks(variant):
    sizes = {"channels": 1, "mult": (1,), "resblocks": 0}
    widths = {
        f"{part}_{name}": n for part in ("extractor", "aggregate") for name, n in sizes.items()
    }
    encoder = LiteVAE_Encoder(6, None, variant, dct_levels=1, **widths)
    assert encoder(torch.randn(1, 3, 4, 6)).shape == (1, 6, 2, 3)


def test_a_block_of_the_paper_by_hand():
    """With 8 groups of 24 channels, and 16 of 48."""
    block, x = PreActivationBlock(24, 48).double(), torch.randn(2, 24, 3, 4, dtype=torch.float64)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    h = F.group_norm(x, 8, block.norm1.weight, block.norm1.bias)
    h = block.conv1(h * h.sigmoid())
    h = F.group_norm(h, 16, block.norm2.weight, block.norm2.bias)
    expected = block.conv2(h * h.sigmoid()) + block.shortcut(x)
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_an_encoders_linear_path_is_alone_at_first():
    encoder, x = LiteVAE_Encoder(6, "S", linear=True), torch.rand(1, 3, 16, 24)
    moments = encoder(x)
    assert torch.equal(moments[:, :3], encoder.linear(x))
    assert not moments[:, 3:].any()
    assert LiteVAE_Encoder(6, "S").linear is None


@pytest.mark.parametrize("levels", [1, 3])
def test_wavelet_encoder_against_pywavelets(levels):
    x = torch.rand(2, 3, 32, 16, dtype=torch.float64) * 2 - 1
    mean, logvar = WaveletEncoder(dct_levels=levels)(x).chunk(2, dim=1)
    ll, (horizontal, vertical, diagonal), *_ = pywt.wavedec2(
        x.numpy(), "haar", level=levels, axes=(-2, -1)
    )
    assert mean.shape == (2, 12, 32 >> levels, 16 >> levels)
    alone = WaveletEncoder(latent_dim=12, dct_levels=levels)
    assert (alone.latent_dim, alone.in_channels) == (12, 3)
    assert torch.equal(alone(x), mean)
    assert set(logvar.unique().tolist()) == {-30.0}
    bands = mean.unflatten(1, (4, 3)) * 2**levels
    torch.testing.assert_close(bands[:, 0], torch.from_numpy(ll))
    torch.testing.assert_close(bands[:, 3].abs(), torch.from_numpy(diagonal).abs())
    for theirs in (horizontal, vertical):
        assert any(
            torch.allclose(bands[:, i].abs(), torch.from_numpy(theirs).abs()) for i in (1, 2)
        )
    assert DiagonalGaussian(torch.cat((mean, logvar), 1)).std.max() < 1e-6


def test_wavelet_encoder_has_no_state():
    encoder = WaveletEncoder()
    assert (list(encoder.parameters()), dict(encoder.state_dict())) == ([], {})
    with pytest.raises(ValueError, match=r"12 bands, .* latent_dim 8 .*embed_dim"):
        WaveletEncoder(latent_dim=8)
    with pytest.raises(ValueError, match="64x64"):
        encoder(torch.zeros(1, 3, 60, 64))
