"""Transformers on latents: blocks and positions against torch's, timm's and diffusers' own."""

import math

import pytest
import torch
from torch import nn

from olvae.modules.others.vit import Block, ViTMapper, positions, start_as_in_mae


def copied(block: Block) -> nn.TransformerEncoderLayer:
    """torch's layer with the block's weights."""
    width, hidden = block.fc1.in_features, block.fc1.out_features
    theirs = nn.TransformerEncoderLayer(
        width, block.heads, hidden, 0.0, "gelu", block.norm1.eps, batch_first=True, norm_first=True
    )
    theirs.to(block.fc1.weight.dtype)
    names = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "proj.",
        "linear1.": "fc1.",
        "linear2.": "fc2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    state = block.state_dict()
    for name in theirs.state_dict():
        old = next(old for old in names if name.startswith(old))
        theirs.state_dict()[name].copy_(state[names[old] + name.removeprefix(old)])
    return theirs


@pytest.mark.parametrize(("hidden", "eps"), [(None, 1e-6), (40, 1e-12)])
def test_block_is_torchs_layer(hidden, eps):
    torch.manual_seed(0)
    block = Block(32, 4, hidden, eps).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x), copied(block)(x))


def test_block_is_timms():
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    block = Block(32, 4).double()
    theirs = timm_vit.Block(32, 4, qkv_bias=True).double()
    names = {"attn.qkv.": "qkv.", "attn.proj.": "proj.", "mlp.fc1.": "fc1.", "mlp.fc2.": "fc2."}
    for old, new in names.items():
        for kind in ("weight", "bias"):
            theirs.state_dict()[old + kind].copy_(block.state_dict()[new + kind])
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x), theirs(x))


@pytest.mark.parametrize("side", [4, 16, 20])
def test_positions_are_those_of_diffusers(side):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(24, side, output_type="pt")
    ours = positions(side, side, 24, torch.device("cpu"))
    torch.testing.assert_close(ours[0], theirs.float(), rtol=1e-5, atol=1e-5)


def test_positions_of_a_grid_that_is_no_square():
    """The first half of the channels has the column, the second the row, of 16 each."""
    found = positions(2, 4, 4, torch.device("cpu"))
    for row in range(2):
        for column in range(4):
            x, y = column * 4.0, row * 8.0
            wanted = [math.sin(x), math.cos(x), math.sin(y), math.cos(y)]
            assert found[0, 4 * row + column].tolist() == pytest.approx(wanted, abs=1e-6)


def test_mapper_by_hand():
    """An embedding with positions, torch's layer, and the MLP; each token in its place."""
    torch.manual_seed(0)
    mapper = ViTMapper(5, 64).double()
    z = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    tokens = torch.einsum("dc,bcn->bnd", mapper.embed.weight[:, :, 0, 0], z.flatten(2))
    tokens = tokens + positions(2, 3, 64, z.device).double()
    tokens = copied(mapper.block)(tokens)
    for place in (0, 2, 4):
        tokens = tokens @ mapper.mlp[place].weight.T + mapper.mlp[place].bias
        if place < 4:
            tokens = tokens * tokens.sigmoid()
    found = mapper(z)
    assert found.shape == (2, 64, 2, 3)
    torch.testing.assert_close(found[:, :, 1, 2], tokens[:, 5])
    torch.testing.assert_close(found.flatten(2), tokens.transpose(1, 2))
    assert mapper.block.heads == 1


def test_weights_start_as_in_mae():
    torch.manual_seed(0)
    block = Block(64, 1)
    start_as_in_mae(block)
    bound = math.sqrt(6 / (64 + 192))
    assert bound * 0.99 < block.qkv.weight.abs().max() <= bound
    assert not block.qkv.bias.any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Block(32, 5), "heads must divide the width 32, got 5"),
        (lambda: ViTMapper(4, 96), "features of a multiple of that, not to 96"),
        (lambda: positions(2, 2, 6, torch.device("cpu")), "a width that 4 divides, got 6"),
    ],
)
def test_vit_refuses_widths_that_do_not_divide(build, message):
    with pytest.raises(ValueError, match=message):
        build()
