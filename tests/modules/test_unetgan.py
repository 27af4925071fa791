import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.modules.unetgan import (
    SpectralConv2d,
    UNetGAN,
    power_iteration,
    shared_weights,
    stop_power_iterations,
)


@pytest.fixture
def small() -> UNetGAN:
    torch.manual_seed(0)
    return UNetGAN(base_channels=4)


def _conv(layer: torch.nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


@pytest.mark.parametrize("image_size", [128, 256])
@torch.no_grad()
def test_unetgan_function_by_hand(image_size: int):
    """The U written out: pooled and unpooled pixel by pixel, skips paired by their size."""
    torch.manual_seed(0)
    net = UNetGAN(base_channels=4, image_size=image_size).double().eval()
    x = torch.randn(2, 3, 64, 128, dtype=torch.float64)
    h, by_size = x, {}
    for i, block in enumerate(net.down):
        z = h if i == 0 else h.clamp(min=0)
        z = _conv(block.conv2, _conv(block.conv1, z).clamp(min=0)) + _conv(block.shortcut, h)
        h = (z[..., ::2, ::2] + z[..., 1::2, ::2] + z[..., ::2, 1::2] + z[..., 1::2, 1::2]) / 4
        by_size[h.shape[-1]] = h
    bottom = h
    image_logits = (
        bottom.clamp(min=0).sum((2, 3)) @ net.image_head.weight.flatten(1).T + net.image_head.bias
    )
    for block in net.up:
        if h is not bottom:
            h = torch.cat((h, by_size[h.shape[-1]]), 1)
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        z = _conv(block.conv1, h.clamp(min=0)).clamp(min=0)
        h = _conv(block.conv2, z) + _conv(block.shortcut, h)
    pixels, image = net(x)
    torch.testing.assert_close(pixels, _conv(net.pixel_head, h))
    torch.testing.assert_close(image, image_logits)


@pytest.mark.parametrize("image_size", [128, 256])
@pytest.mark.parametrize("size", [(64, 64), (64, 192), (128, 64)])
def test_unetgan_takes_any_multiple_of_64(image_size: int, size: tuple[int, int]):
    net = UNetGAN(in_channels=1, base_channels=4, image_size=image_size)
    pixels, image = net(torch.randn(2, 1, *size))
    assert pixels.shape == (2, 1, *size)
    assert image.shape == (2, 1)


def test_unetgan_orthogonal_init_and_where_spectral_norm_is(small: UNetGAN):
    for name, layer in small.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            matrix = layer.weight.flatten(1)
            short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            torch.testing.assert_close(short @ short.T, torch.eye(len(short)), rtol=0, atol=1e-4)
            assert torch.nn.utils.parametrize.is_parametrized(layer) == (name != "pixel_head")
            assert not layer.bias.any()


def test_spectral_weight_is_float32_under_autocast():
    """The norm divides the float32 weight; only the product with the input is in half precision."""
    torch.manual_seed(0)
    layer = SpectralConv2d(8, 8, kernel_size=3).eval()
    x = torch.randn(1, 8, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = F.conv2d(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    assert torch.equal(y, expected)


def _away_from_the_start(net: torch.nn.Module) -> None:
    """Where the largest singular value stands out, and a power iteration changes something."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("original"):
                p.add_(0.5 * torch.randn_like(p))


def _gradients(net: UNetGAN, batches: list[Tensor]) -> list[Tensor]:
    net.zero_grad()
    for x in batches:
        (sum(t.square().mean() for t in net(x)) / len(batches)).backward()
    return [p.grad.clone() for p in net.parameters()]


def test_micro_batches_add_up_between_two_power_iterations():
    torch.manual_seed(0)
    net = UNetGAN(base_channels=4).double()
    _away_from_the_start(net)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for stopped in (False, True):
        if stopped:
            stop_power_iterations(net)
        whole, parts = _gradients(net, [x]), _gradients(net, list(x.split(2)))
        largest = max((a - b).abs().max() for a, b in zip(whole, parts, strict=True))
        assert largest < 1e-9 if stopped else largest > 1e-6
    power_iteration(net)
    changed = _gradients(net, [x])
    assert max((a - b).abs().max() for a, b in zip(whole, changed, strict=True)) > 1e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_a_power_iteration_is_what_a_training_pass_runs(small: UNetGAN, autocast: bool):
    _away_from_the_start(small)
    with torch.no_grad():  # a product shorter than 1 is made longer
        small.image_head.parametrizations.weight.original.mul_(1e-3)
    other, x = copy.deepcopy(small), torch.randn(1, 3, 64, 64)
    before = [b.clone() for b in small.buffers()]
    stop_power_iterations(small)
    small(x)
    other.eval()(x)
    for net in (small, other):
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))
    power_iteration(small)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        other.train()(x)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), small.buffers(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(other.buffers(), before, strict=True))


def test_weights_shared_by_passes_give_the_same_gradients(monkeypatch):
    """As on a GPU: the sum of the passes' gradients goes through the normalisation once;
    frozen ones get none of it.
    """
    torch.manual_seed(0)
    net = UNetGAN(base_channels=2, image_size=64).double()
    stop_power_iterations(net)
    x, gradients = torch.randn(2, 3, 64, 64, dtype=torch.float64), []
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
        net.zero_grad()
        with shared_weights(net):
            assert (net.image_head.kept is not None) == on_gpu
            net.requires_grad_(False)
            assert not net(x)[0].requires_grad
            net.requires_grad_(True)
            with shared_weights(net):  # does nothing
                loss = sum(t.square().mean() for t in net(x))
            loss = loss + sum(t.square().mean() for t in net(x.flip(0) + 1))
        loss.backward()
        assert net.image_head.kept is None
        gradients.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("base", "image_size", "expected"),
    [
        (16, 512, 2_757_058),  # S 2.75 M, as at 256
        (32, 256, 11_020_674),  # M 11.0 M
        (64, 256, 44_067_586),  # L 44.1 M
        (16, 128, 1_969_858),
        (32, 128, 7_873_410),
        (64, 192, 31_481_602),
    ],
)
def test_unetgan_has_the_published_numbers_of_parameters(meta, base, image_size, expected):
    net = UNetGAN(base_channels=base, image_size=image_size)
    assert sum(p.numel() for p in net.parameters()) == expected


def test_unetgan_refuses_sides_that_are_no_multiples_of_64(small: UNetGAN):
    for size in (0, 32, 100):
        with pytest.raises(ValueError, match=f"image_size must be a multiple of 64, got {size}"):
            UNetGAN(image_size=size)
    for shape in ((1, 3, 64, 96), (1, 3, 96, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match="multiples of 64"):
            small(torch.empty(shape))
