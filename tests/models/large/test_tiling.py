import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from olvae import LiteVAE
from olvae.models.autoencoder import Quantizer
from olvae.models.large import tiling
from olvae.models.large.tiling import (
    GIB,
    _needed,
    crop_to,
    decode_window,
    default_memory,
    pad_to_multiple,
    peak_bytes,
    receptive_field,
    tile_bytes,
    tile_for,
)
from olvae.modules.base import Stage
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.litevae.smc import fold_smc
from olvae.modules.sdvae import SDDecoder, SDEncoder
from tests.conftest import TINY_ENCODER
from tests.export.latents import Shrunk

CONFIGURATIONS = [
    {"variant": variant, "output": output, **shape}
    for variant, output in (("open_litevae", "image"), ("paper_smc", "wavelet"))
    for shape in (
        {"channel_mult": (1, 2, 4, 4), "num_res_blocks": 2},
        {"channel_mult": (1, 1, 2, 2), "num_res_blocks": 0},
        {"channel_mult": (1, 2), "num_res_blocks": 1},
        {"channel_mult": (1, 1), "num_res_blocks": 0, "linear": True},
    )
] + [
    {
        "variant": "paper_smc",
        "output": "packets",
        "channel_mult": (1, 1, 1),
        "num_res_blocks": 0,
        "linear": True,
    }
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
def test_receptive_field_is_what_gradients_reach(arguments):
    module = decoder(**arguments)
    field = receptive_field(module)
    for m in (module, fold_smc(module)):
        assert receptive_field(m) == field
        left, right = seen(m, module.upscale, 2 * field + 7)
        assert max(left, right) == field


@pytest.mark.parametrize(
    ("wanted", "needed"),
    [
        ((8, 16), [(2, 10), (3, 9), (7, 17), (8, 16)]),
        ((0, 8), [(0, 6), (0, 5), (0, 9), (0, 8)]),
        ((24, 32), [(10, 16), (11, 16), (23, 32), (24, 32)]),
    ],
)
def test_ranges_before_each_stage_end_at_the_borders(wanted, needed):
    """Of 16 positions, decoded to 32 pixels."""
    stages = [Stage(nn.Identity(), reach, scale) for reach, scale in ((1, 1), (0, 2), (1, 1))]
    assert _needed(stages, wanted, 16) == needed


def test_decoder_stages_are_the_whole_decoder():
    """A window of everything is everything, and a window reads no latent outside the field."""
    module = LiteVAE_Decoder(channels=4, z_channels=2, channel_mult=(1, 1), num_res_blocks=0).eval()
    z = torch.rand(1, 2, 40, 30)
    with torch.no_grad():
        torch.testing.assert_close(
            decode_window(module.paths(), z, ((0, 80), (0, 60))), module(z), rtol=0, atol=0
        )
        field = receptive_field(module)
        poisoned = torch.full_like(z, torch.nan)
        near = ..., slice(20 - field, 21 + field), slice(15 - field, 16 + field)
        poisoned[near] = z[near]
        window = (40, 42), (30, 32)
        got = decode_window(module.paths(), poisoned, window)
        torch.testing.assert_close(got, module(z)[..., 40:42, 30:32], rtol=1e-5, atol=1e-5)


def test_receptive_field_of_a_far_reach():
    """Of a decoder's widest path."""
    paths = [[Stage(nn.Identity(), 50)], [Stage(nn.Identity(), 7)]]
    assert receptive_field(SimpleNamespace(paths=lambda: paths, upscale=1)) == 50
    # Seven pixels, which are in the fourth position.
    paths = [[Stage(nn.Identity(), 7, 2)]]
    assert receptive_field(SimpleNamespace(paths=lambda: paths, upscale=2)) == 4


def autoencoder(quantizer: bool = False, **arguments) -> LiteVAE:
    levels = len(arguments["channel_mult"]) - 1
    half = LiteVAE_Decoder(channels=8, z_channels=4, **arguments)
    nn.init.xavier_normal_(half.conv_out.weight)  # beside a linear path it starts at zero
    encoder = LiteVAE_Encoder(8, **{**TINY_ENCODER, "dct_levels": levels})
    return LiteVAE(encoder, half, Quantizer(8, 4, 4) if quantizer else None).eval()


@pytest.mark.parametrize("arguments", CONFIGURATIONS)
def test_tiles_give_the_untiled_image(arguments):
    vae = autoencoder(**arguments)
    z = torch.randn(1, 4, 5, 7)
    with torch.no_grad():
        whole = vae.decode(z)
    for tile in (1, 3, 4, 6, 99):
        for model in (vae, vae.fold()) if tile == 4 else (vae,):
            assert (model.decode_tiled(z, tile) - whole).abs().max() < 1e-4 * whole.std().clamp(
                max=1.0
            )


@pytest.mark.parametrize("arguments", [c for c in CONFIGURATIONS if c["num_res_blocks"] < 2])
def test_tiles_of_too_short_reach_differ_from_the_untiled_image(arguments, monkeypatch):
    """With every stage reaching one position less, the tiles differ by more than the tolerance."""
    vae = autoencoder(**arguments)
    z = torch.randn(1, 4, 12, 12)
    short = [stage._replace(reach=max(0, stage.reach - 1)) for stage in vae.decoder.stages()]
    with torch.no_grad():
        whole = vae.decode(z)
        monkeypatch.setattr(vae.decoder, "stages", lambda: short)
        assert (vae.decode_tiled(z, 5) - whole).abs().max() > 1e-3


def sd() -> LiteVAE:
    shape = {"channels": 8, "channel_mult": (1, 1), "num_res_blocks": 0, "norm_groups": 4}
    return LiteVAE(
        SDEncoder(latent_dim=8, image_size=16, **shape), SDDecoder(z_channels=4, **shape)
    ).eval()


def test_stable_diffusions_decoder_is_not_tiled():
    assert receptive_field(sd().decoder) is None
    z = torch.randn(1, 4, 6, 5)
    with pytest.raises(ValueError, match="SDDecoder sees"):
        sd().decode_tiled(z, tile=4)
    with pytest.raises(ValueError, match=r"be tiled; .*10x12 pixels"):
        sd().decode_tiled(z, memory=100)
    vae = sd()
    with torch.no_grad():
        torch.testing.assert_close(vae.decode_tiled(z, memory=GIB), vae.decode(z))
        z = torch.randn(7, 4, 6, 5)
        needs = peak_bytes(vae.decoder, lambda d, x: d(x), (1, 4, 6, 5))
        sizes: list[int] = []
        vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        expected = vae.decode(z)
        torch.testing.assert_close(vae.decode_tiled(z, memory=3 * needs + 1), expected)
        assert sizes == [7, 3, 3, 1]  # as many images at once as fit
        vae.decode_tiled(z[:2], memory=needs)
        assert sizes[4:] == [1, 1]
        with pytest.raises(ValueError, match="be tiled"):
            vae.decode_tiled(z[:2], memory=needs - 1)


def test_tiling_splits_a_batch_before_its_images(monkeypatch):
    """As many whole images at once as fit; where not even one does, each has the tiles that it has
    alone.
    """

    def window(paths, z, place):
        if z.device.type != "meta":
            tiled.append(len(z))
        return decode_window(paths, z, place)

    vae, z = autoencoder(channel_mult=(1, 1), num_res_blocks=0), torch.randn(5, 4, 24, 20)
    needs = peak_bytes(vae.decoder, lambda d, x: d(x), (1, 4, 24, 20))
    monkeypatch.setattr(tiling, "decode_window", window)
    tiled: list[int] = []
    whole: list[int] = []
    done: list[float] = []
    with torch.no_grad():
        expected = vae.decode(z)
        vae.decode_tiled(z[:1], memory=needs // 2)
        alone = len(tiled)
        tile = tile_for(vae.decoder, needs // 2, (1, 4, 24, 20))
        assert alone == math.ceil(24 / tile) * math.ceil(20 / tile) > 1
        torch.testing.assert_close(
            vae.decode_tiled(z, memory=needs // 2, progress=done.append), expected
        )
        assert tiled == [1] * alone * 6
        vae.decoder.register_forward_pre_hook(lambda _, inputs: whole.append(len(inputs[0])))
        pairs: list[float] = []
        found = vae.decode_tiled(z, memory=2 * needs + 1, progress=pairs.append)
        torch.testing.assert_close(found, expected)
        assert (whole, pairs) == ([2, 2, 1], [0.4, 0.8, 1.0])
        vae.decode_tiled(z, memory=needs)
        assert whole[3:] == [1] * 5
        # An image that takes nothing takes a byte.
        monkeypatch.setattr(tiling, "peak_bytes", lambda *_: 0)
        vae.decode_tiled(z[:2], memory=1)
        assert whole[8:] == [1, 1]
    assert (len(tiled), done) == (6 * alone, [0.2, 0.4, 0.6, 0.8, 1.0])


def test_tiling_refuses_no_tile_and_both_settings():
    vae = autoencoder(channel_mult=(1, 1), num_res_blocks=0)
    z = torch.randn(1, 4, 2, 2)
    for both in ({}, {"tile": 1, "memory": 1}):
        with pytest.raises(ValueError, match="either `tile` or `memory`"):
            vae.decode_tiled(z, **both)
    with pytest.raises(ValueError, match=r"at least one .*0"):
        vae.decode_tiled(z, tile=0)


@pytest.mark.gpu
def test_tiles_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = autoencoder(channel_mult=(1, 2, 4, 4), num_res_blocks=2).cuda()
    z = torch.randn(1, 4, 50, 37, device="cuda")
    with torch.no_grad():
        assert (vae.decode_tiled(z, 13) - vae.decode(z)).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (8, 8), (13, 200), (5, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_padding_to_a_multiple_is_numpys_and_crops_back(size, dtype):
    x = torch.randint(0, 256, (2, 3, *size)).to(dtype)
    padded = pad_to_multiple(x, 8)
    expected = x.numpy()
    for axis in (2, 3):
        pad = -expected.shape[axis] % 8
        widths = [(0, 0)] * axis + [(0, pad)] + [(0, 0)] * (3 - axis)
        expected = np.pad(
            expected, widths, mode="reflect" if pad < expected.shape[axis] else "edge"
        )
    assert np.array_equal(padded.numpy(), expected)
    assert padded.dtype == dtype
    assert torch.equal(crop_to(padded, size), x)
    assert pad_to_multiple(x, 1) is x
    # As many as there are beside the last are mirrored, one more are copies.
    assert pad_to_multiple(torch.tensor([[1, 2]]), 3).tolist() == [[1, 2, 1]] * 3
    assert pad_to_multiple(torch.tensor([[1, 2]]), 4).tolist() == [[1, 2, 2, 2]] * 4


def test_tiling_an_autoencoder_without_tiles_decodes_whole():
    """What commands ask of any model: the interface's own answers."""
    model, x = Shrunk(), torch.rand(1, 3, 4, 6)
    assert model.fold() is model
    assert model.image_size == 256
    z = model.encode_within(x, 1).mode()
    assert torch.equal(z, model.encode(x).mode())
    assert torch.equal(model.decode_tiled(z, memory=1), model.decode(z))
    with pytest.raises(ValueError, match=r"Shrunk .*`tile`"):
        model.decode_tiled(z, tile=1)


def test_peak_bytes_of_layers_by_hand():
    """Of 4 to 8 channels of 6x6 pixels: the output, and a copy of input and output.

    A view takes nothing, and what is freed counts no more.
    """
    narrow, wide = 4 * 4 * 36, 4 * 8 * 36
    conv = nn.Conv2d(4, 8, 1)
    assert peak_bytes(conv, lambda m, x: m(x), (1, 4, 6, 6)) == wide + narrow + wide
    assert peak_bytes(conv, lambda m, x: x.view(4, 36), (1, 4, 6, 6)) == 0
    assert peak_bytes(conv, lambda m, x: x.neg().flatten().neg(), (1, 4, 6, 6)) == 2 * narrow
    assert peak_bytes(conv, lambda m, x: [x.neg() for _ in range(3)], (1, 4, 6, 6)) == 3 * narrow
    assert peak_bytes(conv, lambda m, x: x.neg().neg().neg().neg(), (1, 4, 6, 6)) == 2 * narrow
    half = conv.half()
    assert peak_bytes(half, lambda m, x: m(x), (2, 4, 6, 6)) == wide + narrow + wide


def test_tiling_takes_the_largest_tile_within_the_memory():
    vae = autoencoder(True, channel_mult=(1, 1), num_res_blocks=0)
    z = torch.randn(2, 4, 50, 37)
    with torch.no_grad():
        whole = vae.decode(z)
    fractions = []
    torch.testing.assert_close(
        vae.decode_tiled(z, 13, progress=fractions.append), whole, rtol=0, atol=1e-5
    )
    assert fractions == [i / 12 for i in range(1, 13)]
    torch.testing.assert_close(vae.decode_tiled(z, memory=2**21), whole, rtol=0, atol=1e-5)
    assert vae.decode_tiled(z[:0], memory=2**21).shape == (0, *whole.shape[1:])
    tile = tile_for(vae.decoder, 2**21, z.shape)
    assert (
        tile_bytes(vae.decoder, tile, z.shape) <= 2**21 < tile_bytes(vae.decoder, tile + 1, z.shape)
    )
    assert tile_for(vae.decoder, 64 * GIB, z.shape) == 50
    assert tile_for(vae.decoder, 64 * GIB, (1, 4, 2, 3)) == 3
    # Exactly enough for a tile of one position, and a byte less.
    least = tile_bytes(vae.decoder, 1, z.shape)
    assert tile_for(vae.decoder, least, z.shape) == 1
    with pytest.raises(ValueError, match=f"{least / GIB:.3g} GiB"):
        tile_for(vae.decoder, least - 1, z.shape)
    with pytest.raises(ValueError, match=r"smallest tile .*9\.31e-08"):
        tile_for(vae.decoder, 100, z.shape)


def test_a_tiles_bytes_are_those_in_the_middle():
    """Where it has its neighbours on all sides, in a latent that has just room for them."""
    vae = autoencoder(channel_mult=(1, 1), num_res_blocks=0)
    near = receptive_field(vae.decoder)
    window = (80, 84), (80, 84)  # two positions a side, 40 from any border
    expected = peak_bytes(
        vae.decoder, lambda d, z: decode_window(d.paths(), z, window), (2, 4, 99, 99)
    )
    for shape in ((2, 4, 2 + 2 * near, 3 + 2 * near), (2, 4, 50, 40)):
        assert tile_bytes(vae.decoder, 2, shape) == expected
    narrow = tile_bytes(vae.decoder, 2, (2, 4, 1, 3 + 2 * near))
    assert narrow < tile_bytes(vae.decoder, 2, (2, 4, 2, 3 + 2 * near)) < expected


def test_half_of_a_devices_free_memory_is_the_limit(monkeypatch):
    """At least 1 GiB on a Mac, which shares it."""
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 * GIB)
    for most, limit in ((12, 5), (4, 1), (3, 1), (1, 1)):
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda most=most: most * GIB)
        assert default_memory(torch.device("mps")) == limit * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6 * GIB, 80 * GIB))
    assert default_memory(torch.device("cuda")) == 3 * GIB
    assert default_memory(torch.device("cpu")) == GIB
