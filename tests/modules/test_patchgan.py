import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from olvae.modules.patchgan import PatchGAN


@pytest.fixture
def small() -> PatchGAN:
    torch.manual_seed(0)
    return PatchGAN(base_channels=8)


def test_parameters_are_the_readmes():
    with torch.device("meta"):
        assert sum(p.numel() for p in PatchGAN().parameters()) == 2_765_633  # README: 2.77 M


def test_macs_are_the_readmes():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        PatchGAN()(torch.empty(1, 3, 256, 256))
    assert counter.get_total_flops() / 2 == pytest.approx(3.15e9, rel=0.01)


def test_layers_by_hand(small: PatchGAN):
    """The function written out from the state dict: five convolutions, three batch norms."""
    w = small.state_dict()
    x = torch.randn(2, 3, 48, 64)
    h = F.leaky_relu(F.conv2d(x, w["first.weight"], w["first.bias"], stride=2, padding=1), 0.2)
    for i, stride in enumerate((2, 2, 1)):
        h = F.conv2d(h, w[f"layers.{i}.conv.weight"], stride=stride, padding=1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, unbiased=False)
        scale, shift = (w[f"layers.{i}.norm.{k}"].view(1, -1, 1, 1) for k in ("weight", "bias"))
        h = F.leaky_relu((h - mean) / (var + 1e-5).sqrt() * scale + shift, 0.2)
    expected = F.conv2d(h, w["last.weight"], w["last.bias"], padding=1)
    (logits,) = small(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_logit_sees_70_by_70_pixels():
    torch.manual_seed(0)
    net = PatchGAN(base_channels=4).eval()
    x = torch.randn(1, 3, 160, 160, requires_grad=True)
    (logits,) = net(x)
    logits[0, 0, 9, 9].backward()
    seen = x.grad[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70
    assert columns.max() - columns.min() + 1 == 70


def test_initial_weights():
    torch.manual_seed(0)
    net = PatchGAN()
    assert net.layers[2].conv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert net.layers[2].norm.weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert net.layers[2].norm.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert net.last.bias.item() == 0.0


@pytest.mark.parametrize(
    ("layers", "size", "expected"), [(3, (32, 32), (2, 2)), (3, (33, 100), (2, 10)), (1, (8, 8), (2, 2))]
)
def test_smallest_and_odd_sizes(layers: int, size: tuple[int, int], expected: tuple[int, int]):
    net = PatchGAN(base_channels=4, n_layers=layers)
    (logits,) = net(torch.randn(2, 3, *size))
    assert logits.shape == (2, 1, *expected)
    assert logits.isfinite().all()


def test_other_channels():
    (logits,) = PatchGAN(in_channels=5, base_channels=4)(torch.randn(2, 5, 32, 32))
    assert logits.shape == (2, 1, 2, 2)


def test_every_parameter_gets_a_gradient(small: PatchGAN):
    small(torch.randn(2, 3, 64, 64))[0].square().mean().backward()
    for name, p in small.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_bf16_is_close_to_float32(small: PatchGAN):
    x = torch.randn(2, 3, 64, 64)
    (expected,) = small(x)
    with torch.autocast("cpu", torch.bfloat16):
        (logits,) = small(x)
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match=r"at least 32x32 pixels.*31.*smaller n_layers"):
        PatchGAN(base_channels=4)(torch.randn(1, 3, 31, 64))
    with pytest.raises(ValueError, match="n_layers of at least 1"):
        PatchGAN(n_layers=0)
    assert PatchGAN.num_outputs == 1
