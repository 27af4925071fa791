"""What every discriminator does: half precision, and spectral norm where it has one."""

import pytest
import torch
from torch import nn

from olvae.modules.gigagan import GigaGAN
from olvae.modules.patchgan import PatchGAN
from olvae.modules.unetgan import SpectralConv2d, UNetGAN, power_iteration

GIGA = {"image_size": 64, "base": 256, "max_channels": 16, "heads": 2, "head_channels": 8}


SMALL = {
    "patchgan": (PatchGAN, {"base_channels": 8}),
    "unetgan": (UNetGAN, {"base_channels": 4}),
    "gigagan": (GigaGAN, GIGA),
    "gigagan, all": (GigaGAN, {**GIGA, "predictors": "all"}),
}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, arguments = SMALL[name]
    return kind(**arguments)


def nudge(net: nn.Module) -> nn.Module:
    """Away from the start, where orthogonal weights and small position embeddings hide
    differences.
    """
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


every = pytest.mark.parametrize("name", SMALL)


@every
def test_discriminators_in_bf16_are_close_to_float32(name):
    net = small(name)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    largest = max(t.abs().max() for t in expected)
    for half, full in zip(logits, expected, strict=True):
        assert (half.float() - full).abs().max() < 0.05 * largest


@pytest.mark.parametrize(
    ("name", "autocast"), [("unetgan", False), ("unetgan", True), ("gigagan", False)]
)
def test_spectral_norm_bounds_the_largest_singular_value(name, autocast):
    net = small(name)
    layers = [m for m in net.modules() if isinstance(m, SpectralConv2d)]
    with torch.no_grad():
        for layer in layers:  # far from its orthogonal start
            original = layer.parametrizations.weight.original
            original.mul_(7).add_(torch.randn_like(original))
    assert (
        max(torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item() for layer in layers)
        > 1.1
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(60):
            power_iteration(net)
    for layer in layers:
        assert 0.999 < torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item() < 1.05
