"""What every discriminator does: published size, gradients everywhere, half precision,
errors that name the remedy.
"""

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


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (PatchGAN, {}, 2_765_633),  # README: 2.77 M
        (GigaGAN, {}, 14_378_498),  # 14.38 M
        (GigaGAN, {"predictors": "all"}, 14_722_310),
        (GigaGAN, {"image_size": 64}, 14_407_938),
        (GigaGAN, {"image_size": 512}, 14_377_026),
        (UNetGAN, {"base_channels": 16, "image_size": 512}, 2_757_058),  # S 2.75 M, as at 256
        (UNetGAN, {"base_channels": 32}, 11_020_674),  # M 11.0 M
        (UNetGAN, {"base_channels": 64}, 44_067_586),  # L 44.1 M
        (UNetGAN, {"base_channels": 16, "image_size": 128}, 1_969_858),
        (UNetGAN, {"base_channels": 32, "image_size": 128}, 7_873_410),
        (UNetGAN, {"base_channels": 64, "image_size": 192}, 31_481_602),
    ],
)
def test_discriminator_parameters_are_the_published_numbers(meta, kind, arguments, expected):
    assert sum(p.numel() for p in kind(**arguments).parameters()) == expected


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


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("patchgan", (1, 3, 31, 64), r"at least 32x32 pixels.*31"),
        ("unetgan", (1, 3, 64, 96), r"multiples of 64.*\(1, 3, 64, 96\)"),
        ("gigagan", (1, 3, 128, 128), r"takes images \(B, C, 64, 64\).*its image_size"),
        ("gigagan", (1, 3, 64, 128), r"takes images \(B, C, 64, 64\)"),
    ],
)
def test_discriminators_refuse_images_that_do_not_fit(name, shape, message):
    with pytest.raises(ValueError, match=message):
        small(name)(torch.empty(shape))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (PatchGAN, {"n_layers": 0}, "n_layers must be at least 1"),
        (UNetGAN, {"image_size": 100}, "image_size must be a multiple of 64, got 100"),
        *(
            (GigaGAN, {"image_size": size}, f"power of two from 64, got {size}")
            for size in (32, 96, 0)
        ),
        (
            GigaGAN,
            {**GIGA, "attention": (8, 64)},
            r"levels of \[32, 16, 8, 4\] px: attention cannot be at \[64\]",
        ),
        (GigaGAN, {"image_size": 64, "base": 32}, "base at least image_size = 64"),
        (GigaGAN, {"predictors": "some"}, "predictors must be one of ends, all"),
    ],
)
def test_discriminators_refuse_arguments_that_cannot_be(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
