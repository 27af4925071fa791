import numpy as np
import pytest
import pywt
import torch

from olvae.losses.wavelet import wavelet_loss


def test_against_pywavelets_in_float64():
    x, y = (torch.rand(2, 3, 8, 10, dtype=torch.float64) for _ in range(2))
    _, details = pywt.dwt2((x - y).numpy(), "haar")
    expected = np.mean([np.sqrt((band / 2) ** 2 + 1e-6).mean() for band in details])
    assert wavelet_loss(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_a_difference_in_brightness_alone_costs_nothing():
    x = torch.rand(1, 3, 8, 8)
    assert wavelet_loss(x, x + 0.3).item() == pytest.approx(1e-3, rel=1e-3)  # Charbonnier's eps


def test_the_gradient_reaches_the_pixels():
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    y = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: wavelet_loss(x, t), y)
    wavelet_loss(x, y).backward()
    assert (y.grad.abs() > 0).all()


def test_float32_under_autocast():
    x, y = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    outside = wavelet_loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wavelet_loss(x, y), outside)
    assert wavelet_loss(x.bfloat16(), y.bfloat16()).dtype == torch.float32
