import pytest
import torch

from olvae.losses.reconstruction import RECONSTRUCTION, charbonnier

X = torch.tensor([[[[0.5, -0.25], [1.0, 0.0]]]], dtype=torch.float64)
Y = torch.tensor([[[[0.25, 0.25], [-1.0, 0.0]]]], dtype=torch.float64)  # differences 0.25, -0.5, 2, 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", (0.25 + 0.5 + 2.0) / 4),
        ("l2", (0.0625 + 0.25 + 4.0) / 4),
        ("charbonnier", ((0.0625 + 1e-6) ** 0.5 + (0.25 + 1e-6) ** 0.5 + (4 + 1e-6) ** 0.5 + 1e-3) / 4),
    ],
)
def test_by_hand(name, expected):
    assert RECONSTRUCTION[name](X, Y).item() == pytest.approx(expected, rel=1e-12)
    assert RECONSTRUCTION[name](X.bfloat16(), Y.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", RECONSTRUCTION)
def test_gradients(name):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: RECONSTRUCTION[name](x, t), y)


def test_charbonnier_is_smooth_where_l1_is_not():
    y = torch.zeros(1, requires_grad=True)
    charbonnier(torch.zeros(1), y).backward()
    assert y.grad.item() == 0.0
