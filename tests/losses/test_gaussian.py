import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from olvae.losses.gaussian import gaussian_blur, gaussian_loss


def test_the_blur_is_scipys():
    """scipy's mode "mirror" is the reflection without the border pixel; truncate 2 gives 5 taps."""
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    expected = gaussian_filter(x.numpy(), sigma=1.0, mode="mirror", truncate=2.0, axes=(2, 3))
    np.testing.assert_allclose(gaussian_blur(x).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_the_loss_is_that_of_the_residuals():
    x, y = (torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    residual_x, residual_y = (
        t - torch.from_numpy(gaussian_filter(t.numpy(), 1.0, mode="mirror", truncate=2.0, axes=(2, 3))) for t in (x, y)
    )
    expected = (residual_x - residual_y).abs().mean().item()
    assert gaussian_loss(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_low_frequencies_cost_nothing():
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert gaussian_loss(x, x + 0.3).item() == pytest.approx(0.0, abs=1e-15)


def test_the_gradient_reaches_the_pixels():
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    y = torch.rand(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gaussian_loss(x, t), y)
    gaussian_loss(x, y).backward()
    assert (y.grad.abs() > 0).all()


def test_float32_under_autocast():
    x, y = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    outside = gaussian_loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_loss(x, y), outside)
