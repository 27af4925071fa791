"""A frozen vision encoder as encoder: timm's features, normalised, and what is trained of it."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F

from olvae.modules.base import last_convolution
from olvae.modules.others.representation import RepresentationEncoder

timm = pytest.importorskip("timm")


def with_weights(vit: str, **params) -> RepresentationEncoder:
    torch.manual_seed(0)
    encoder = RepresentationEncoder("test_vit", **{"latent_dim": 128, **params})
    encoder.network[1].load_state_dict(torch.load(vit))
    return encoder


def test_latents_are_timms_features_normalised_at_each_position(vit):
    """RAE's: the last norm without its weight and bias; patches of 16 pixels see images whole."""
    encoder = with_weights(vit).double()
    theirs = timm.create_model("test_vit", checkpoint_path=vit, dynamic_img_size=True)
    theirs = theirs.eval().double()
    torch.nn.init.ones_(theirs.norm.weight)
    torch.nn.init.zeros_(theirs.norm.bias)
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        tokens = theirs.forward_features(x)[:, 1:]  # the model's own mean and deviation are 0.5
    moments = encoder(x)
    assert moments.shape == (2, 128, 4, 6)
    torch.testing.assert_close(moments[:, :64], tokens.transpose(1, 2).unflatten(2, (4, 6)))
    torch.testing.assert_close(moments[:, :64].mean(1), torch.zeros(2, 4, 6).double())
    assert encoder.deterministic
    assert encoder.output_layer is None
    assert (encoder.latent_dim, encoder.in_channels) == (128, 3)


def test_features_of_a_network_of_stages_are_its_last():
    encoder = RepresentationEncoder("test_efficientnet", 128)
    assert (encoder.width, encoder.stride, encoder.depth) == (64, 32, 5)


def test_reduced_latents_by_hand(vit):
    """One attention layer with a shortcut, of one head here, and a linear layer to the moments."""
    encoder = with_weights(vit, latent_dim=10, attention=True).double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    tokens = encoder.features(x).flatten(2).transpose(1, 2)  # (B, 4, 64)
    layer = encoder.attention
    h = F.layer_norm(tokens, (64,), layer.norm.weight, layer.norm.bias, 1e-6)
    q, k, v = (h @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=2)
    weights = (q @ k.transpose(1, 2) / 8).softmax(dim=2)
    tokens = tokens + (weights @ v) @ layer.proj.weight.T + layer.proj.bias
    wanted = tokens @ encoder.conv_out.weight[:, :, 0, 0].T + encoder.conv_out.bias
    found = encoder(x)
    assert found.shape == (2, 10, 2, 2)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), wanted)
    assert not encoder.deterministic
    assert encoder.conv_out.bias[5:].tolist() == [-4.0] * 5
    assert (encoder.conv_out.bias[:5].abs() < 1).all()
    assert not encoder.attention.qkv.bias.any()
    assert last_convolution(encoder) is encoder.output_layer is encoder.conv_out


def test_the_network_is_frozen_and_the_rest_is_trained(vit):
    encoder = with_weights(vit, latent_dim=10, attention=True).train()
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"attention", "conv_out"}
    assert not any(module.training for module in encoder.network.modules())
    assert encoder.attention.training
    assert not copy.deepcopy(encoder).eval().attention.training
    encoder(torch.rand(2, 3, 32, 32)).square().sum().backward()
    for name, p in encoder.named_parameters():
        assert (p.grad is not None) == (name in trained)
    assert not [p for p in with_weights(vit).parameters() if p.requires_grad]


def test_copies_have_weights_of_their_own(vit):
    """Exports in half precision are of a copy."""
    encoder = with_weights(vit)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    before = encoder(x)
    other = copy.deepcopy(encoder).to(torch.bfloat16)
    assert other.network[1].blocks[0].norm1.weight.dtype == torch.bfloat16
    assert torch.equal(encoder(x), before)


def test_checkpointing_gives_the_same_gradients(vit):
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    gradients = []
    for on in (False, True):
        encoder = with_weights(vit, latent_dim=10, attention=True).train()
        encoder.checkpoint_steps(on)
        encoder(x).square().sum().backward()
        gradients.append(encoder.attention.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("test_vit", {"latent_dim": 64}, "test_vit has 64 channels: set embed_dim and z_channels"),
        ("test_vit", {"latent_dim": 128, "in_channels": 1}, "images of 3 channels, got 1"),
        ("test_vit3", {"latent_dim": 8, "attention": True}, "heads have 64 channels, which 96"),
        ("vit_of_nowhere", {"latent_dim": 128}, "timm has no model vit_of_nowhere"),
    ],
)
def test_representation_refuses_what_does_not_fit(name, params, message):
    with pytest.raises(ValueError, match=message):
        RepresentationEncoder(name, **params)


def test_representation_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="test_vit needs timm: pip install timm"):
        RepresentationEncoder("test_vit", 128)


def test_representation_refuses_sizes_that_are_no_multiple_of_16(vit):
    with pytest.raises(ValueError, match=r"32x40 .*16"):
        with_weights(vit)(torch.zeros(1, 3, 32, 40))
