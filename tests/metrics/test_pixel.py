import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from olvae.metrics.pixel import psnr, ssim


@pytest.fixture
def pair():
    x = torch.randint(0, 256, (3, 3, 70, 33), dtype=torch.uint8)
    noise = torch.randint(-40, 40, x.shape)
    return x, (x.int() + noise).clamp(0, 255).to(torch.uint8)


def test_psnr_is_scikit_images(pair):
    for value, x, y in zip(psnr(*pair), *pair, strict=True):
        expected = peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255)
        assert value.item() == pytest.approx(expected, abs=1e-9)


def test_ssim_is_scikit_images(pair):
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
        assert value.item() == pytest.approx(expected, abs=1e-5)


def test_equal_images():
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.isposinf(psnr(x, x)).all()
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0])


def test_one_step_of_255_by_hand():
    x = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert psnr(x, x + 1).item() == pytest.approx(20 * np.log10(255))


def test_too_small_for_the_window():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(x, x)
