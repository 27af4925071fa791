import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from olvae.metrics.metric import (
    Unavailable,
    mean_absolute_error,
    ms_ssim,
    psnr,
    ssim,
    ssim_uniform,
)
from tests.metrics.conftest import pairs


@pytest.fixture
def pair():
    x = torch.randint(0, 256, (3, 3, 70, 33), dtype=torch.uint8)
    noise = torch.randint(-40, 40, x.shape)
    return x, (x.int() + noise).clamp(0, 255).to(torch.uint8)


def of_kind(pair, kind):
    """Make two images larger than a tile, bright, flat or not whole; as they are if of noise."""
    if kind == "large":
        return [image.repeat(1, 1, 4, 9) for image in pair]
    if kind == "bright":
        return [255 - image // 64 for image in pair]
    if kind == "flat":
        return [torch.full((2, 3, 64, 64), level, dtype=torch.uint8) for level in (255, 254)]
    if kind == "float":
        return [image + torch.rand(image.shape) * 0.9 for image in pair]
    return pair


def test_psnr_is_scikit_images(pair):
    for value, x, y in zip(psnr(*pair), *pair, strict=True):
        expected = peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255)
        assert value.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["noise", "large", "bright", "flat"])
def test_ssim_is_scikit_images(pair, kind):
    """Also of more than one tile, and where a variance is a small difference of large squares."""
    pair = of_kind(pair, kind)
    if kind == "flat":
        assert ssim(pair[0], pair[0]).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    for value, x, y in zip(ssim(*pair), *pair, strict=True):
        expected = structural_similarity(
            x.numpy().astype(np.float64),
            y.numpy().astype(np.float64),
            data_range=255,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["noise", "large", "bright", "flat", "float"])
def test_ssim_with_a_uniform_window_is_scikit_images(pair, kind, monkeypatch):
    """By its defaults; it computes uint8 images in float64, and float32 ones in float32."""
    pair = of_kind(pair, kind)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    values = ssim_uniform(*pair)
    assert values.dtype == torch.float64
    for value, x, y in zip(values, *pair, strict=True):
        expected = structural_similarity(
            x.double().numpy(), y.double().numpy(), data_range=255, channel_axis=0
        )
        assert value.item() == pytest.approx(expected, abs=1e-12)
        assert kind != "noise" or abs(value.item() - expected) < 1e-15


def direct(x: np.ndarray, y: np.ndarray) -> float:
    """Wang's formula in float64, by separable filters, of one image (C, H, W)."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def mean(a):
        return correlate1d(
            correlate1d(a, window, axis=1, mode="mirror"), window, axis=2, mode="mirror"
        )

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
        x, y = (
            a[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2).mean((2, 4))
            for a in (x, y)
        )
    return value


def test_ms_ssim_is_the_formula():
    _, x, y = pairs(3, 190)
    y[0] = (x[0] // 2) + 40  # another contrast besides noise
    for value, a, b in zip(ms_ssim(x, y), x, y, strict=True):
        expected = direct(a.numpy().astype(float), b.numpy().astype(float))
        assert 0.3 < expected < 0.999
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_ms_ssim_of_opposite_images_is_zero():
    _, x, _ = pairs(2, 176)
    assert ms_ssim(x, 255 - x).tolist() == [0.0, 0.0]  # a negative contrast term has no fifth root


def test_psnr_and_mean_absolute_error_by_hand():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert psnr(x, x + 1).tolist() == pytest.approx([20 * np.log10(255)] * 2)
    y = x.clone()
    y[0] = 255
    y[1, 0] = 51
    assert mean_absolute_error(x, y).tolist() == pytest.approx([1.0, 0.2 / 3])
    # No wrap-around of uint8.
    assert mean_absolute_error(y, x).tolist() == mean_absolute_error(x, y).tolist()


@pytest.mark.parametrize(("metric", "least"), [(ssim, 11), (ssim_uniform, 7), (ms_ssim, 176)])
def test_ssim_and_ms_ssim_refuse_images_that_are_too_small(metric, least):
    for shape in ((1, 3, least - 1, 200), (1, 3, 200, least - 1)):
        x = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(Unavailable, match=f"{least} pixels"):
            metric(x, x)
