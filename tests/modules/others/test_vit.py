"""Transformers on latents: blocks and positions against torch's, timm's and diffusers' own."""

import math

import pytest
import torch
from torch import nn

from olvae.modules.base import last_convolution
from olvae.modules.others.vit import Block, ViTDecoder, ViTMapper, positions, start_as_in_mae


def copied(block: Block) -> nn.TransformerEncoderLayer:
    """torch's layer with the block's weights."""
    width, hidden = block.fc1.in_features, block.fc1.out_features
    theirs = nn.TransformerEncoderLayer(
        width,
        block.attention.heads,
        hidden,
        0.0,
        "gelu",
        block.norm.eps,
        batch_first=True,
        norm_first=True,
    )
    theirs.to(block.fc1.weight.dtype)
    names = {
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj.": "attention.proj.",
        "linear1.": "fc1.",
        "linear2.": "fc2.",
        "norm1.": "attention.norm.",
        "norm2.": "norm.",
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
    names = {
        "attn.qkv.": "attention.qkv.",
        "attn.proj.": "attention.proj.",
        "mlp.fc1.": "fc1.",
        "mlp.fc2.": "fc2.",
    }
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
    assert mapper.block.attention.heads == 1


def test_weights_start_as_in_mae():
    torch.manual_seed(0)
    block = Block(64, 1)
    start_as_in_mae(block)
    bound = math.sqrt(6 / (64 + 192))
    assert bound * 0.99 < block.attention.qkv.weight.abs().max() <= bound
    assert not block.attention.qkv.bias.any()


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


# The decoder


def test_decoder_by_hand():
    """Tokens with positions behind the learned one, torch's layer, and patches in their places."""
    torch.manual_seed(0)
    decoder = ViTDecoder(5, 3, upscale=4, width=32, depth=1, heads=4, hidden=40).double()
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.3)
    z = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    tokens = torch.einsum("dc,bcn->bnd", decoder.embed.weight[:, :, 0, 0], z.flatten(2))
    tokens = tokens + decoder.embed.bias + positions(2, 3, 32, z.device).double()
    tokens = torch.cat((decoder.first.expand(2, 1, 32), tokens), dim=1)
    tokens = copied(decoder.blocks[0])(tokens)[:, 1:]
    centred = tokens - tokens.mean(2, keepdim=True)
    normed = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
    normed = normed * decoder.norm.weight + decoder.norm.bias
    values = normed @ decoder.conv_out.weight[:, :, 0, 0].T + decoder.conv_out.bias  # (B, 6, 48)
    image = decoder(z)
    assert image.shape == (2, 3, 8, 12)
    patch = values[:, 4].unflatten(1, (3, 4, 4))  # of the second row, the second column
    torch.testing.assert_close(image[:, :, 4:8, 4:8], patch)


def test_decoder_of_rae_has_its_published_size():
    """ViT-XL; blocks of 28, as in diffusers' AutoencoderRAE."""
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    with torch.device("meta"):
        ours = ViTDecoder(768, width=1152, depth=28, heads=16, hidden=4096)
        theirs = RAEDecoder(768, 1152, 28, 16, 4096)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (ours, theirs)]
    assert sizes[0] == sizes[1]


def test_decoder_takes_any_grid_and_its_last_layer_is_found():
    decoder = ViTDecoder(4, upscale=2, width=32, depth=1, heads=1)
    assert decoder(torch.zeros(1, 4, 5, 3)).shape == (1, 3, 10, 6)
    assert (decoder.z_channels, decoder.out_channels) == (4, 3)
    assert not decoder.embed.bias.any()
    assert not decoder.first.any()
    assert last_convolution(decoder) is decoder.conv_out
    with pytest.raises(ValueError, match="depth must"):
        ViTDecoder(4, depth=0)
