"""Predictors of a latent, against values that are known."""

import numpy as np
import pytest
import torch

from study.latent_maps import fit
from study.predictors import (
    Wiener,
    equivariance_error,
    local_correlation,
    precision,
    share_of_high_frequencies,
    spectrum_divergence,
    velocity_losses,
)


@pytest.fixture
def white():
    return torch.randn(400, 12, 8, 8, generator=torch.Generator().manual_seed(0))


def test_white_noise_has_three_quarters_high_and_no_correlation(white):
    assert share_of_high_frequencies(white) == pytest.approx(48 / 63, abs=0.01)  # without the mean
    assert local_correlation(white) == pytest.approx(0.0, abs=0.01)
    constant = white[:, :, :1, :1].expand_as(white)
    assert local_correlation(constant) == pytest.approx(1.0, abs=1e-6)


def test_correlation_is_pearsons(white):
    z = white[:, :3, :4, :4]
    shifted = (z.transpose(0, 1).flatten(1)).double()
    normal = (z.double() - shifted.mean(1)[:, None, None]) / shifted.std(1)[:, None, None]
    found = []
    for latent in normal.numpy():
        matrix = np.corrcoef(latent.reshape(3, 16).T)
        found.append(matrix[np.triu_indices(16, 1)].mean())
    assert local_correlation(z) == pytest.approx(np.mean(found), abs=1e-9)


def test_divergence_is_zero_at_the_target_alone(white):
    rising = torch.arange(1, 9).float()
    images = white[:, :3]
    assert spectrum_divergence(white, images) > 0.01  # the target rises, noise does not
    assert spectrum_divergence(fit("E", white, images).apply(white), images) < 1e-6
    assert spectrum_divergence(white * rising, images) > 0


def test_equivariance_error_of_a_decoder_that_repeats():
    z = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8)

    def decode(latents):
        return latents.repeat_interleave(8, 2).repeat_interleave(8, 3)

    images = decode(z)
    expected = (decode(torch.nn.functional.avg_pool2d(z.double(), 2))
                - torch.nn.functional.avg_pool2d(images.double(), 2)).square().mean()  # fmt: skip
    found = equivariance_error(z.double(), decode, images)
    assert found == pytest.approx(float(expected / images.double().var() / 2))


def test_precision_of_equal_and_of_far_sets():
    images = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    assert precision(images, images) == 1.0
    assert precision(images + 100, images) == 0.0


def test_no_denoiser_of_a_normal_distribution_beats_wieners():
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([0.2, 1.0, 2.0, 0.5])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    z = ((torch.randn(20000, 4, generator=generator) * deviations) @ turn).view(-1, 1, 2, 2) + 0.3
    wiener = Wiener(z)
    found, zero = velocity_losses([wiener, lambda x, t: torch.zeros_like(x)], z)
    # the closed form: variance / ((1 - t)^2 variance + t^2), averaged over the times
    t = torch.randn(20000, generator=generator).double().sigmoid()[:, None]
    variances = deviations.double().square()
    expected = (variances / ((1 - t).square() * variances + t.square())).mean()
    assert found == pytest.approx(float(expected), rel=0.02)
    assert found < zero
    # its normal draws have the same covariance
    draws = wiener.draw(20000, generator)
    torch.testing.assert_close(
        torch.cov(draws.T), torch.cov(z.double().flatten(1).T), atol=0.1, rtol=0.1
    )
