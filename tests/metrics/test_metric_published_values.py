"""Values that other projects' tests and documentation state, typed in with their source."""

import numpy as np
import pytest
import torch
from skimage.data import camera
from torch import Tensor

from olvae.metrics.metric import ms_ssim, psnr, ssim, ssim_uniform


@pytest.fixture(scope="module")
def noisy() -> tuple[Tensor, Tensor]:
    """The photograph and the noise of scikit-image's tests of its metrics."""
    picture = camera()
    noise = 20.0 * np.random.RandomState(5).randn(*picture.shape)
    changed = np.clip(picture + noise, 0, 255).astype(np.uint8)
    return torch.from_numpy(picture)[None, None], torch.from_numpy(changed)[None, None]


def test_psnr_is_imdiffs(noisy):
    """By the C program of IPOL (2011, g_lmii), as scikit-image's test_PSNR_vs_IPOL has it
    (0.18 to 0.25, September 2020), which compares four decimals.
    """
    assert psnr(*noisy).item() == pytest.approx(22.409353363576034, abs=1e-5)


def test_ssim_is_imdiffs(noisy):
    """By the same program, whose borders differ: scikit-image's
    test_gaussian_structural_similarity_vs_IPOL compares three decimals.
    """
    assert ssim(*noisy).item() == pytest.approx(0.357959091663361, abs=1.5e-3)


def test_ssim_of_a_uniform_window_is_scikit_images_of_0_17(noisy):
    """Of its test_mssim_vs_legacy; seven pixels, variances of samples."""
    assert ssim_uniform(*noisy).item() == pytest.approx(0.3674518327910367, abs=1e-7)


def test_psnr_is_the_one_of_torchmetrics_documentation():
    """Of 1.9: PeakSignalNoiseRatio(data_range=3) of [[0, 1], [2, 3]] and [[3, 2], [1, 0]]."""
    x = 85 * torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    assert psnr(x[None, None], x.flip(0, 1)[None, None]).item() == pytest.approx(2.5527, abs=5e-5)


@pytest.mark.parametrize(("metric", "value"), [(ssim, 0.9219), (ms_ssim, 0.9628)])
def test_ssim_of_three_quarters_of_noise_is_the_one_of_torchmetrics_documentation(metric, value):
    """Of 1.9, from images of 256 pixels without a seed; so three decimals."""
    x = 255 * torch.rand(3, 3, 256, 256)
    assert metric(x, 0.75 * x).mean().item() == pytest.approx(value, abs=1e-3)
