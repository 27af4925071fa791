import pytest
import torch
from torch import nn

from olvae.models.receptive import decode_window, receptive_field
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.smc import fold_smc
from olvae.modules.sdvae import SDDecoder

CONFIGURATIONS = [
    {"variant": variant, "output": output, **shape}
    for variant in ("open_litevae", "paper_smc")
    for output in ("image", "wavelet")
    for shape in (
        {"channel_mult": (1, 2, 4, 4), "num_res_blocks": 2},
        {"channel_mult": (1, 1, 2, 2), "num_res_blocks": 0},
        {"channel_mult": (1, 2), "num_res_blocks": 1},
    )
]


def decoder(**arguments) -> LiteVAE_Decoder:
    """Few channels in float64, with weights that let every input through."""
    module = LiteVAE_Decoder(channels=2, z_channels=1, out_channels=1, **arguments).double().eval()
    for p in module.parameters():
        nn.init.uniform_(p, 0.5, 1.0)
    return module


def seen(module: nn.Module, f: int, size: int) -> tuple[int, int]:
    """By gradients: how many columns left and right of the middle position its pixels depend on."""
    z = torch.zeros(1, 1, 1, size, dtype=torch.float64, requires_grad=True)
    middle = size // 2
    module(z)[..., f * middle : f * (middle + 1)].sum().backward()
    columns = z.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    return middle - int(columns.min()), int(columns.max()) - middle


@pytest.mark.parametrize("arguments", CONFIGURATIONS)
def test_the_field_is_what_gradients_reach(arguments):
    module = decoder(**arguments)
    field = receptive_field(module)
    for m in (module, fold_smc(module)):
        assert receptive_field(m) == field
        left, right = seen(m, module.upscale, 2 * field + 7)
        assert max(left, right) == field


@pytest.mark.parametrize(
    ("variant", "output", "field"),
    [("open_litevae", "image", 20), ("open_litevae", "wavelet", 21), ("paper_smc", "image", 18)],
)
def test_the_field_of_the_published_shape(variant, output, field):
    """By hand: how many 3x3 convolutions there are at the latent's size, and at two, four, eight times that; going
    back from the first pixel of position 0, every one takes a step to the left and every upsampling halves."""
    convolutions = {
        ("open_litevae", "image"): (1 + 6 + 6, 1 + 6, 1 + 6, 1 + 6 + 2),
        ("open_litevae", "wavelet"): (1 + 6 + 6, 1 + 6, 1 + 6 + 6 + 2),
        ("paper_smc", "image"): (1 + 4 + 6, 1 + 6, 1 + 6, 1 + 6 + 1),
    }[variant, output]
    leftmost = 0
    for count in reversed(convolutions[1:]):
        leftmost = (leftmost - count) // 2
    assert receptive_field(LiteVAE_Decoder(channels=8, variant=variant, output=output)) == field
    assert field == convolutions[0] - leftmost


@pytest.mark.parametrize("arguments", [c for c in CONFIGURATIONS if c["num_res_blocks"] < 2])
def test_one_position_less_is_too_few(arguments):
    """A latent cut to the field around a position decodes to the same pixels; cut one closer, it does not."""
    module = decoder(**arguments)
    field, f = receptive_field(module), module.upscale
    size = 2 * field + 9
    middle = size // 2
    z = torch.rand(1, 1, 3, size, dtype=torch.float64)

    def error(halo):
        cut = module(z[..., middle - halo : middle + halo + 1])[..., f * halo : f * (halo + 1)]
        return ((cut - whole).abs() / whole.abs()).max()

    with torch.no_grad():
        whole = module(z)[..., f * middle : f * (middle + 1)]
        assert error(field) < 1e-13
        assert error(field - 1) > 1e-13


def test_the_stages_are_the_whole_decoder():
    """A window of everything is everything, and a window reads no latent outside the field."""
    module = LiteVAE_Decoder(channels=4, z_channels=2, channel_mult=(1, 1), num_res_blocks=0).eval()
    z = torch.rand(1, 2, 40, 30)
    with torch.no_grad():
        torch.testing.assert_close(decode_window(module.stages(), z, ((0, 80), (0, 60))), module(z), rtol=0, atol=0)
        field = receptive_field(module)
        poisoned = torch.full_like(z, torch.nan)
        near = ..., slice(20 - field, 21 + field), slice(15 - field, 16 + field)
        poisoned[near] = z[near]
        window = (40, 42), (30, 32)
        got = decode_window(module.stages(), poisoned, window)
        torch.testing.assert_close(got, module(z)[..., 40:42, 30:32], rtol=1e-5, atol=1e-5)


def test_stable_diffusions_decoder_has_no_finite_field():
    assert receptive_field(SDDecoder(channels=32, channel_mult=(1, 1), num_res_blocks=0)) is None
