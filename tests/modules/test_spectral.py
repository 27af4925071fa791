import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.modules.unetgan import SpectralConv2d, UNetGAN, fixed_spectral_norm, power_iteration


@pytest.fixture
def small() -> UNetGAN:
    torch.manual_seed(0)
    return UNetGAN(base_channels=4)


@pytest.mark.parametrize("autocast", [False, True])
def test_spectral_norm_bounds_the_largest_singular_value(small: UNetGAN, autocast: bool):
    layers = [m for m in small.modules() if isinstance(m, SpectralConv2d)]
    with torch.no_grad():
        for layer in layers:  # far from its orthogonal start
            original = layer.parametrizations.weight.original
            original.mul_(7).add_(torch.randn_like(original))
    before = [torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item() for layer in layers]
    assert max(before) > 1.1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(60):
            small(torch.randn(1, 3, 64, 64))
    small.eval()
    for layer in layers:
        assert 0.999 < torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item() < 1.05


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


def test_autocast_is_off_around_the_power_iteration():
    layer = SpectralConv2d(8, 8, kernel_size=3)
    seen: list[bool] = []
    norm = layer.get_submodule("parametrizations.weight.0")
    norm.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 8, 9, 9))
    assert seen == [False]


def test_evaluation_leaves_the_power_iteration_alone(small: UNetGAN):
    small.eval()
    before = {k: v.clone() for k, v in small.state_dict().items()}
    small(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


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


def test_fixed_spectral_norm_lets_micro_batches_add_up():
    torch.manual_seed(0)
    net = UNetGAN(base_channels=4).double()
    _away_from_the_start(net)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with fixed_spectral_norm(net):
        assert net.training
        whole, parts = _gradients(net, [x]), _gradients(net, list(x.split(2)))
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    whole, parts = _gradients(net, [x]), _gradients(net, list(x.split(2)))  # outside, they do not
    assert max((a - b).abs().max() for a, b in zip(whole, parts, strict=True)) > 1e-6


def test_power_iteration_is_what_a_training_pass_runs(small: UNetGAN):
    _away_from_the_start(small)
    other = copy.deepcopy(small)
    small(torch.randn(1, 3, 64, 64))
    with fixed_spectral_norm(other):
        before = [b.clone() for b in other.buffers()]
        other(torch.randn(1, 3, 64, 64))
        assert all(torch.equal(a, b) for a, b in zip(other.buffers(), before, strict=True))
        power_iteration(other)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), small.buffers(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(other.buffers(), before, strict=True))


def test_state_dict_carries_everything(small: UNetGAN):
    _away_from_the_start(small)
    small(torch.randn(1, 3, 64, 64))
    other = UNetGAN(base_channels=4)
    other.load_state_dict(small.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(small.eval()(x), other.eval()(x), strict=True):
        assert torch.equal(a, b)
