"""MONAI's layers by hand in float64, and which blocks a form has; its records are tested with its
files, in tests/models/loading/test_monai_files.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from olvae.modules.others.monai import (
    AttentionBlock,
    Downsampling,
    MonaiDecoder,
    MonaiEncoder,
    ResidualBlock,
    TransposedUpsampling,
    Upsampling,
    conv,
)

FORM: dict[str, Any] = {
    "channels": 4,
    "channel_mult": [1, 2, 3],
    "num_res_blocks": [1, 2, 1],
    "norm_groups": 2,
    "attention_levels": [1],
}


def normed(x: np.ndarray, groups: int, eps: float, norm: torch.nn.Module) -> np.ndarray:
    """Group norm of (C, h, w), with its scales and shifts."""
    grouped = x.reshape(groups, -1)
    mean, deviation = grouped.mean(1, keepdims=True), np.sqrt(grouped.var(1, keepdims=True) + eps)
    scaled = ((grouped - mean) / deviation).reshape(x.shape)
    scale, shift = (p.detach().numpy()[:, None, None] for p in (norm.weight, norm.bias))
    return scaled * scale + shift


def drawn(module: torch.nn.Module) -> Any:
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_attention_is_of_one_head_over_all_positions(combined, output):
    block = drawn(AttentionBlock(4, 2, 1e-3, output=output, combined=combined))
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    positions = normed(x[0].numpy(), 2, 1e-3, block.norm).reshape(4, 6).T  # (6, C)

    def linear(name: str, value: np.ndarray) -> np.ndarray:
        layer = block.attn[name]
        return value @ layer.weight.numpy().T + layer.bias.numpy()

    if combined:
        q, k, v = np.split(linear("qkv", positions), 3, axis=1)
    else:
        q, k, v = (linear(name, positions) for name in ("to_q", "to_k", "to_v"))
    weights = np.exp(q @ k.T / math.sqrt(4))
    mixed = weights / weights.sum(1, keepdims=True) @ v
    if output:
        mixed = linear("out_proj", mixed)
    expected = x[0].numpy() + mixed.T.reshape(4, 2, 3)
    np.testing.assert_allclose(block(x)[0].numpy(), expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("width", [4, 6])
def test_a_residual_block_widens_its_input_by_a_convolution(width):
    block = drawn(ResidualBlock(4, width, 2, 1e-6))
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)

    def layer(h: np.ndarray, norm: torch.nn.Module, convolution: torch.nn.Module) -> torch.Tensor:
        h = normed(h, 2, 1e-6, norm)
        h = h / (1 + np.exp(-h))  # SiLU
        inner = convolution.conv
        return F.conv2d(torch.from_numpy(h)[None], inner.weight, inner.bias, padding=1)

    h = layer(x[0].numpy(), block.norm1, block.conv1)
    h = layer(h[0].numpy(), block.norm2, block.conv2)
    skip = x
    if width != 4:
        kernel = block.nin_shortcut.conv
        skip = torch.einsum("oi,bihw->bohw", kernel.weight[:, :, 0, 0], x)
        skip = skip + kernel.bias[:, None, None]
    torch.testing.assert_close(block(x), skip + h, rtol=1e-10, atol=1e-12)
    assert isinstance(block.nin_shortcut, torch.nn.Identity) == (width == 4)


@torch.no_grad()
def test_levels_are_halved_with_zeros_at_the_bottom_and_right_and_doubled():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    down = Downsampling(1)
    down.conv.conv.weight.zero_()
    down.conv.conv.weight[..., 2, 2] = 1.0  # the pixel two below and two to the right
    down.conv.conv.bias.zero_()
    assert down(x).tolist() == [[[[10.0, 0.0], [0.0, 0.0]]]]
    assert down(torch.zeros(1, 1, 5, 7)).shape == (1, 1, 2, 3)
    assert [conv(1, 1, size).conv.padding for size in (1, 3, 5)] == [(0, 0), (1, 1), (2, 2)]

    up = Upsampling(1)
    up.postconv.conv.weight.zero_()
    up.postconv.conv.weight[..., 1, 1] = 1.0
    up.postconv.conv.bias.fill_(0.5)
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3) + 0.5)

    patches = TransposedUpsampling(1)
    patches.deconv.weight.copy_(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    patches.deconv.bias.zero_()
    assert torch.equal(
        patches(x), torch.kron(x[0, 0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[None, None]
    )


def kinds(module: Any) -> list[str]:
    return [type(block).__name__ for block in module.blocks]


def test_blocks_stand_in_the_order_of_the_form():
    """Attention after each block of its level; the middle at the latent's end."""
    res, attention = "ResidualBlock", "AttentionBlock"
    first, levels = (
        "Named",
        [res, "Downsampling", res, attention, res, attention, "Downsampling", res],
    )
    end = ["GroupNorm", "Named"]
    middle = [res, attention, res]
    assert kinds(MonaiEncoder(4, **FORM)) == [first, *levels, *middle, *end]
    assert kinds(MonaiEncoder(4, attention=False, **FORM)) == [first, *levels, *end]
    back = [res, "Upsampling", res, attention, res, attention, "Upsampling", res]
    assert kinds(MonaiDecoder(z_channels=2, **FORM)) == [first, *middle, *back, *end]
    transposed = MonaiDecoder(z_channels=2, attention=False, convtranspose=True, **FORM)
    patched = [kind.replace("Upsampling", "TransposedUpsampling") for kind in back]
    assert kinds(transposed) == [first, *patched, *end]
    everywhere = MonaiEncoder(4, attention=False, **{**FORM, "attention_levels": [0, 1, 2]})
    assert kinds(everywhere).count(attention) == 4


def test_shapes_follow_from_the_levels_and_each_weight_learns():
    encoder = MonaiEncoder(6, in_channels=2, **FORM)
    decoder = MonaiDecoder(z_channels=3, out_channels=2, **FORM)
    x = torch.randn(2, 2, 16, 24)
    moments = encoder(x)
    assert moments.shape == (2, 6, 4, 6)
    assert (encoder.latent_dim, encoder.in_channels) == (6, 2)
    assert (decoder.z_channels, decoder.out_channels) == (3, 2)
    y = decoder(moments[:, :3])
    assert y.shape == x.shape
    (y.square().sum() + moments.square().sum()).backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_values_of_images_are_converted_at_both_ends():
    """From [-1, 1] to the network's, and back: by the weights that take [0, 1] of [0, 255]."""
    torch.manual_seed(0)
    usual = MonaiEncoder(4, **FORM).double()
    other = MonaiEncoder(4, values=(0, 255), **FORM).double()
    state = usual.state_dict()
    state["blocks.0.conv.weight"] = state["blocks.0.conv.weight"] / 255
    other.load_state_dict(state)
    x = torch.rand(1, 1, 16, 16, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(other(x), usual(x), rtol=1e-9, atol=1e-12)
    seen: list[torch.Tensor] = []
    shifted = MonaiEncoder(4, values=(2, 10), **FORM)
    shifted.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    shifted(torch.tensor([-1.0, 0.5]).repeat(8, 4)[None, None])
    assert seen[0][0, 0, 0, :2].tolist() == [2.0, 8.0]

    near = MonaiDecoder(z_channels=2, **FORM).double()
    far = MonaiDecoder(z_channels=2, values=(-1, 1), **FORM).double()
    far.load_state_dict(near.state_dict())
    z = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    # Of the same output of the network, v: 2 v - 1, and v itself.
    torch.testing.assert_close(near(z), 2 * far(z) - 1, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_res_blocks": [1, 2]}, "there are 3 levels, from 0 on"),
        ({"attention_levels": [3]}, "there are 3 levels, from 0 on"),
        ({"num_res_blocks": [1, 0, 1]}, "num_res_blocks"),
        ({"channels": 0}, "channels"),
    ],
)
def test_forms_that_can_not_be_built_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MonaiEncoder(4, **{**FORM, **wrong})
    with pytest.raises(ValueError, match=message):
        MonaiDecoder(z_channels=2, **{**FORM, **wrong})


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_every_level_of_monais_after_the_first_doubles_the_image(levels):
    form = {"channel_mult": [1] * levels, "num_res_blocks": [1] * levels, "norm_groups": 2}
    form |= {"channels": 4, "attention_levels": []}
    assert MonaiEncoder(**form).downscale == MonaiDecoder(**form).upscale == 2 ** (levels - 1)
