import pytest
import torch

from olvae.models.linear_code import LinearDecoder, LinearEncoder
from olvae.modules import base
from olvae.modules.base import (
    Stage,
    check_betas,
    check_choice,
    check_counts,
    check_not_negative,
    copy_plain,
    device_of,
    dtype_of,
    last_convolution,
    mean_over_processes,
    repeat_outputs,
    widen,
)
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder, WaveletEncoder
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from olvae.modules.sdvae import SDDecoder, SDEncoder


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (LiteVAE_Encoder, {"dct_levels": -1}, "dct_levels must be at least 1, got -1"),
        (WaveletEncoder, {"dct_levels": 0}, "dct_levels must be at least 1, got 0"),
        (LiteVAE_Decoder, {"channel_mult": []}, r"channel_mult must be at least 1, got \[\]"),
        (SDEncoder, {"channel_mult": []}, r"channel_mult must be at least 1, got \[\]"),
        (SDDecoder, {"channel_mult": [0]}, r"channel_mult must be at least 1, got \[0\]"),
        (TinyEncoder, {"blocks": []}, r"blocks must be at least 0, got \[\]"),
        (TinyDecoder, {"blocks": []}, r"blocks must be at least 0, got \[\]"),
        (LinearEncoder, {"downscale": 0}, "downscale must be at least 1, got 0"),
        (
            LinearEncoder,
            {"downscale": 12, "image_size": 256},
            "image_size 256 is not a multiple of 12",
        ),
        (LinearDecoder, {"upscale": -8}, "upscale must be at least 1, got -8"),
    ],
)
def test_networks_refuse_counts_that_no_network_has(network, arguments, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        network(**arguments)


def test_check_counts_names_the_setting():
    check_counts(1, channels=8, channel_mult=[1, 2], other=(3,))
    check_counts(0, num_res_blocks=0)
    assert (LinearEncoder(downscale=12).image_size, LinearEncoder().image_size) == (384, 256)
    with pytest.raises(ValueError, match=r"channel_mult must .*\[1, -1\]"):
        check_counts(1, channels=8, channel_mult=(1, -1))


def test_a_networks_node_keeps_the_arguments_as_they_were():
    """Lists and dicts, at any depth, are copies: changing them later changes no saved config."""
    widths, inner = [1, 2], {"a": [1]}
    copied = copy_plain({"widths": widths, "inner": inner, "x": (1,)})
    decoder = LiteVAE_Decoder(channels=8, z_channels=4, channel_mult=widths, num_res_blocks=0)
    widths.append(3)
    inner["a"].append(2)
    assert copied == {"widths": [1, 2], "inner": {"a": [1]}, "x": (1,)}
    assert decoder.node["params"]["channel_mult"] == [1, 2]


def test_a_networks_node_has_every_argument_by_name():
    """Those that were given by their place, and the defaults."""
    assert LinearDecoder(4, 2, upscale=8).node == {
        "target": "olvae.models.linear_code.LinearDecoder",
        "params": {"z_channels": 4, "out_channels": 2, "upscale": 8, "enlarge": 1},
    }


@pytest.mark.parametrize(
    ("betas", "fits"),
    [
        ((0.0, 0.0), True),
        ([0.5, 0.999], True),
        ((0.9, 0.5), True),
        ((-0.1, 0.5), False),
        ((0.5, -0.1), False),
        ((0.5, 1.0), False),
        ((1.0, 0.5), False),
        ((0.5,), False),
        ((0.5, 0.5, 0.5), False),
        ((), False),
    ],
)
def test_betas_are_two_numbers_from_0_to_below_1(betas, fits):
    if fits:
        assert check_betas(betas) == tuple(betas)
        return
    with pytest.raises(ValueError, match="betas must"):
        check_betas(betas)


def test_numbers_that_are_negative_or_none_are_refused():
    check_not_negative(a=0, b=0.0, c=3)
    for number in (-1e-9, float("nan"), -1):
        with pytest.raises(ValueError, match=r"b must .*negative"):
            check_not_negative(a=1, b=number)
    check_choice(("x", "y"), a="x", b="y")
    with pytest.raises(ValueError, match=r"b must .*x, y, got 'z'"):
        check_choice(("x", "y"), a="x", b="z")


def test_device_and_dtype_of_a_module_are_its_first_tensors():
    meta = torch.nn.BatchNorm1d(2, affine=False, device="meta")
    assert device_of(meta).type == "meta"
    assert device_of(torch.nn.ReLU()).type == "cpu"
    assert dtype_of(torch.nn.ReLU()) == torch.float32
    assert dtype_of(torch.nn.Linear(1, 1).half()) == torch.float16
    mixed = torch.nn.Sequential(torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1))
    assert dtype_of(mixed) == torch.float64
    mixed.register_buffer("other", torch.zeros(1, device="meta"))
    assert device_of(mixed).type == "cpu"


def test_the_last_convolution_is_the_named_one_or_the_last_defined():
    """A linear path counts where there is no other."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU(), torch.nn.Conv2d(1, 1, 1)
    )
    assert last_convolution(network) is network[2]
    network.linear = torch.nn.Conv2d(1, 1, 1)
    assert last_convolution(network) is network[2]
    encoder = LinearEncoder(4, 3, 4)
    assert last_convolution(encoder) is encoder.linear
    assert last_convolution(torch.nn.ReLU()) is None
    network.output_layer = network[0]
    assert last_convolution(network) is network[0]


def test_outputs_are_repeated_one_by_one_or_together():
    rows = torch.arange(4)
    assert repeat_outputs(rows, 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert repeat_outputs(rows, 2, 2).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    conv = torch.nn.Conv2d(2, 4, 3)
    before = conv.weight.detach().clone()
    widen(conv, 2, 2)
    assert conv.out_channels == 8
    assert torch.equal(conv.weight, before[[0, 1, 0, 1, 2, 3, 2, 3]])
    assert conv.bias.shape == (8,)
    assert conv.weight.requires_grad


@pytest.mark.parametrize(
    ("decoder", "widths"),
    [
        (LiteVAE_Decoder(8, 4, 3, (1, 2, 3), 0), [8, 16, 24]),
        (LiteVAE_Decoder(8, 4, 3, (1, 2, 3), 0, enlarge=2), [8, 16, 24]),
        (TinyDecoder(8, blocks=(0, 0)), [8, 8]),
        (LinearDecoder(4, 3, 8), [1, 1, 1, 1]),
        (LinearDecoder(4, 3, 8, enlarge=2), [1, 1, 1, 1]),
    ],
)
def test_widths_have_a_level_for_each_doubling(decoder, widths):
    assert decoder.widths == widths


@pytest.mark.parametrize("factor", [1, 2, 3, 8, 15, 16, 17, 18, 32])
def test_a_linear_path_sees_patches_around_their_own(factor):
    """Twice as wide, where there is a middle and they are not too large."""
    encoder = LinearEncoder(6, 2, factor, factor)
    margin = factor // 2 if factor in (2, 8, 16) else 0
    assert encoder.linear.kernel_size == (factor + 2 * margin,) * 2
    assert encoder.linear.padding == (margin,) * 2
    assert encoder.linear.stride == (factor,) * 2
    assert (encoder.linear.in_channels, encoder.linear.out_channels) == (2, 3)


def test_a_linear_path_adds_to_the_means_alone():
    encoder = LinearEncoder(4, 3, 2)
    x, moments = torch.rand(1, 3, 6, 8), torch.rand(1, 4, 3, 4)
    found = encoder.with_linear_path(moments, x)
    torch.testing.assert_close(found[:, :2], moments[:, :2] + encoder.linear(x))
    assert torch.equal(found[:, 2:], moments[:, 2:])
    encoder.linear = None
    assert encoder.with_linear_path(moments, x) is moments


def test_a_mean_over_processes_is_the_value_itself_in_one(monkeypatch):
    x = torch.rand(3)
    assert mean_over_processes(x) is x
    monkeypatch.setattr(base.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(base.dist, "get_world_size", lambda: 1)
    assert mean_over_processes(x) is x
    monkeypatch.setattr(base.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(base, "all_reduce", lambda values: values + 3)
    torch.testing.assert_close(mean_over_processes(x), (x + 3) / 4)


def test_a_linear_path_is_alone_at_first():
    """Beside a network whose last convolution begins at 0; in tiles it has a reach of its own."""
    decoder = LiteVAE_Decoder(8, 4, 3, (1, 2), 0, "paper_smc", linear=True)
    z = torch.randn(1, 4, 3, 5)
    assert torch.equal(decoder(z), decoder.linear_path(z))
    network, path = decoder.paths()
    assert network[-1].run == decoder.head
    assert path == [Stage(decoder.linear_path, 1, 2)]
    assert not any(p.any() for p in last_convolution(decoder).parameters())


def test_a_decoder_that_enlarges_nothing_keeps_its_last_convolution():
    decoder = TinyDecoder(2, blocks=(0,))
    weight = last_convolution(decoder).weight
    decoder.widen_output()
    assert last_convolution(decoder).weight is weight
    assert decoder.output_patch == LinearDecoder(4, 3, 2).output_patch == 1
