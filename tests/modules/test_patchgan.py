import pytest
import torch
import torch.nn.functional as F

from olvae.modules.patchgan import PatchGAN


@pytest.fixture
def small() -> PatchGAN:
    torch.manual_seed(0)
    return PatchGAN(base_channels=8)


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
