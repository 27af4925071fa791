import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from olvae.modules.unetgan import UNetGAN


@pytest.fixture
def small() -> UNetGAN:
    torch.manual_seed(0)
    return UNetGAN(base_channels=4)


@pytest.mark.parametrize(
    ("base", "image_size", "expected"),
    [
        (16, 256, 2_757_058),  # README: S 2.75 M
        (32, 256, 11_020_674),  # M 11.0 M
        (64, 256, 44_067_586),  # L 44.1 M
        (16, 512, 2_757_058),
        (16, 128, 1_969_858),
        (32, 128, 7_873_410),
        (64, 192, 31_481_602),
    ],
)
def test_parameters(meta: None, base: int, image_size: int, expected: int):
    net = UNetGAN(base_channels=base, image_size=image_size)
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize(("base", "published"), [(16, 2.31e9), (32, 9.13e9), (64, 36.34e9)])
def test_macs_are_the_readmes(meta: None, base: int, published: float):
    with FlopCounterMode(display=False) as counter:
        UNetGAN(base_channels=base)(torch.empty(1, 3, 256, 256))
    assert counter.get_total_flops() / 2 == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("image_size", "down", "up"),
    [
        (256, [(3, 1), (1, 2), (2, 4), (4, 8), (8, 8), (8, 16)], [(16, 8), (16, 8), (16, 4), (8, 2), (4, 1), (2, 1)]),
        (128, [(3, 1), (1, 2), (2, 4), (4, 8), (8, 16)], [(16, 8), (16, 4), (8, 2), (4, 1), (2, 1)]),
    ],
)
def test_widths(image_size: int, down: list[tuple[int, int]], up: list[tuple[int, int]]):
    """In units of base_channels, the image's three channels apart; a block's hidden width is its output's."""
    ch = 4
    net = UNetGAN(base_channels=ch, image_size=image_size)
    for blocks, expected in ((net.down, down), (net.up, up)):
        for block, (c_in, c_out) in zip(blocks, expected, strict=True):
            first = c_in if block is net.down[0] else c_in * ch
            assert block.conv1.weight.shape == (c_out * ch, first, 3, 3)
            assert block.conv2.weight.shape == (c_out * ch, c_out * ch, 3, 3)
            assert block.shortcut.weight.shape == (c_out * ch, first, 1, 1)


def _conv(layer: torch.nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


@pytest.mark.parametrize("image_size", [128, 256])
@torch.no_grad()
def test_function_by_hand(image_size: int):
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
    image_logits = bottom.clamp(min=0).sum((2, 3)) @ net.image_head.weight.flatten(1).T + net.image_head.bias
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
def test_any_multiple_of_64(image_size: int, size: tuple[int, int]):
    net = UNetGAN(in_channels=1, base_channels=4, image_size=image_size)
    pixels, image = net(torch.randn(2, 1, *size))
    assert pixels.shape == (2, 1, *size)
    assert image.shape == (2, 1)


def test_samples_do_not_see_each_other(small: UNetGAN):
    small.eval()
    x = torch.randn(3, 3, 64, 64)
    for together, alone in zip(small(x), small(x[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient(small: UNetGAN):
    sum(t.square().mean() for t in small(torch.randn(2, 3, 64, 64))).backward()
    for name, p in small.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_orthogonal_init_and_where_spectral_norm_is(small: UNetGAN):
    for name, layer in small.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            matrix = layer.weight.flatten(1)
            short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            torch.testing.assert_close(short @ short.T, torch.eye(len(short)), rtol=0, atol=1e-4)
            assert torch.nn.utils.parametrize.is_parametrized(layer) == (name != "pixel_head")


def test_two_passes_then_one_backward(small: UNetGAN):
    """Real and fake go through one after the other; the power iteration in between must not break the graph."""
    real, fake = small(torch.randn(1, 3, 64, 64)), small(torch.randn(1, 3, 64, 64))
    (fake[0].mean() - real[0].mean()).backward()
    assert small.down[0].conv1.parametrizations.weight.original.grad.isfinite().all()


def test_bf16_is_close_to_float32(small: UNetGAN):
    small.eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = small(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = small(x)
    for half, full in zip(logits, expected, strict=True):
        assert (half.float() - full).abs().max() < 0.05 * full.abs().max()


def test_errors_name_the_remedy(small: UNetGAN):
    with pytest.raises(ValueError, match=r"multiples of 64.*\(1, 3, 64, 96\).*resize or crop"):
        small(torch.randn(1, 3, 64, 96))
    with pytest.raises(ValueError, match="image_size must be a multiple of 64, got 100"):
        UNetGAN(image_size=100)
    assert UNetGAN.num_outputs == 2
