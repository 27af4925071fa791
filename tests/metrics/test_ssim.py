import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor

from olvae.metrics.metric import Unavailable
from olvae.metrics.pixel import l1, ms_ssim
from tests.metrics.conftest import pairs


def direct(x: np.ndarray, y: np.ndarray) -> float:
    """Wang's formula in float64, by separable filters, of one image (C, H, W)."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def mean(a):
        return correlate1d(correlate1d(a, window, axis=1, mode="mirror"), window, axis=2, mode="mirror")

    value = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        contrast = (2 * cov + 58.5225) / (vx + vy + 58.5225)
        if scale < 4:
            term = contrast[:, 5:-5, 5:-5].mean()
        else:
            term = (contrast * (2 * mx * my + 6.5025) / (mx**2 + my**2 + 6.5025)).mean()
        value *= term**weight
        c, h, w = x.shape
        x, y = (a[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2).mean((2, 4)) for a in (x, y))
    return value


def test_ms_ssim_is_the_formula():
    _, x, y = pairs(3, 190)
    y[0] = (x[0] // 2) + 40  # another contrast besides noise
    for value, a, b in zip(ms_ssim(x, y), x, y, strict=True):
        expected = direct(a.numpy().astype(float), b.numpy().astype(float))
        assert 0.3 < expected < 0.999
        assert value.item() == pytest.approx(expected, abs=1e-5)


def test_equal_and_opposite_images():
    _, x, _ = pairs(1, 176)
    assert ms_ssim(x, x).item() == pytest.approx(1.0, abs=1e-6)
    assert ms_ssim(x, 255 - x).item() == 0.0  # a negative contrast term has no fifth root


@pytest.mark.parametrize("shape", [(1, 3, 175, 300), (1, 3, 300, 175)])
def test_too_small_for_five_scales(shape):
    x = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(Unavailable, match="at least 176 pixels"):
        ms_ssim(x, x)


def test_l1_by_hand():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    y: Tensor = x.clone()
    y[0] = 255
    y[1, 0] = 51
    assert l1(x, y).tolist() == pytest.approx([1.0, 0.2 / 3])
    assert l1(y, x).tolist() == l1(x, y).tolist()  # no wrap-around of uint8
