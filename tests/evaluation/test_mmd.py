import math

import numpy as np
import pytest
import torch

from olvae.evaluation.latent_statistics import mmd2_normal, mmd2_null_std


def kernel(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    return math.exp(-sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) / (2 * sigma**2))


def pair_sum(x: np.ndarray, sigma: float) -> float:
    return sum(kernel(x[i], x[j], sigma) for i in range(len(x)) for j in range(len(x)) if i != j)


@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_the_double_loop(chunk):
    """Pairs of latents by a loop; what N(0, I) gives, in one dimension at a time, by quadrature."""
    z = torch.randn(9, 2, 3, 1) * 1.5 + 0.7
    x = z.double().flatten(1).numpy()
    grid = np.linspace(-12, 12, 4001)
    normal = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    step = grid[1] - grid[0]
    for sigma, value in zip((0.7, 3.0, 25.0), mmd2_normal(z, (0.7, 3.0, 25.0), chunk), strict=True):
        one = lambda a, s=sigma: np.sum(np.exp(-((a - grid) ** 2) / (2 * s**2)) * normal) * step  # noqa: E731
        expected_e = np.mean([math.prod(one(a) for a in row) for row in x])
        gap = np.exp(-((grid[::8, None] - grid[None, ::8]) ** 2) / (2 * sigma**2))
        expected_c = float((normal[::8] @ gap @ normal[::8]) * (8 * step) ** 2) ** 6
        expected = pair_sum(x, sigma) / (9 * 8) - 2 * expected_e + expected_c
        assert float(value) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_sampling_the_normal_instead_gives_the_same():
    """The usual two-sample estimator with many normal samples, within four of its own standard errors."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(40, 8, generator=generator, dtype=torch.float64) * 0.6 + 0.3
    y = torch.randn(2000, 8, generator=generator, dtype=torch.float64)
    sigmas = (1.0, 2.0, 5.0)
    for sigma, value in zip(sigmas, mmd2_normal(z, sigmas), strict=True):
        k = lambda a, b, s=sigma: (-torch.cdist(a, b).square() / (2 * s * s)).exp()  # noqa: E731
        zz, zy, yy = k(z, z), k(z, y).mean(0), k(y, y)
        sampled = (zz.sum() - 40) / (40 * 39) - 2 * zy.mean() + (yy.sum() - 2000) / (2000 * 1999)
        influence = 2 * (yy.mean(0) - zy)  # of one normal sample on the estimate
        assert abs(float(sampled - value)) < 4 * float(influence.std()) / math.sqrt(2000)


def test_a_shifted_gaussian_has_a_closed_form():
    """N(m, I) against N(0, I): MMD^2 = 2 (s / (s + 2))^(d/2) (1 - exp(-|m|^2 / (2 (s + 2))))."""
    d = 16
    m = 0.5
    z = torch.randn(4000, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + m
    sigmas = (2.0, 4.0, 25.0)
    parts = torch.stack([mmd2_normal(part, sigmas) for part in z.split(500)])  # eight independent estimates
    error = parts.std(0) / math.sqrt(8)
    for i, sigma in enumerate(sigmas):
        s = sigma**2
        expected = 2 * (s / (s + 2)) ** (d / 2) * (1 - math.exp(-d * m * m / (2 * (s + 2))))
        assert float(error[i]) < 0.1 * expected  # the estimate is sharp enough to mean something
        assert abs(float(parts[:, i].mean()) - expected) < 4 * float(error[i])
        assert float(mmd2_normal(z, sigmas)[i]) == pytest.approx(expected, rel=0.1)


def test_normal_latents_are_zero_within_sampling_error():
    z = torch.randn(3000, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    value, bound = mmd2_normal(z), mmd2_null_std(3000, 256)
    assert (value.abs() < 4 * bound).all()
    assert (mmd2_normal(z[:1000] + 0.1) > 20 * mmd2_null_std(1000, 256)).all()  # and a shift of a tenth is not


def test_the_sampling_error_is_the_one_of_many_draws():
    """1000 sets of 30 latents: mean 0 within its error, and the standard deviation of the formula within 10 %."""
    generator = torch.Generator().manual_seed(4)
    sigmas = (1.0, 4.0, 500.0)
    values = torch.stack([mmd2_normal(torch.randn(30, 5, generator=generator), sigmas) for _ in range(1000)])
    expected = mmd2_null_std(30, 5, sigmas)
    assert (values.mean(0).abs() < 4 * expected / math.sqrt(1000)).all()
    assert torch.allclose(values.std(0), expected, rtol=0.1)  # of 1000 draws, skewed: some 3 %


def test_a_latent_of_many_values_in_float32_and_half():
    z = torch.randn(64, 12, 32, 32, generator=torch.Generator().manual_seed(5))
    value, bound = mmd2_normal(z), mmd2_null_std(64, 12 * 32 * 32)
    assert (value.abs() < 4 * bound).all()
    assert torch.allclose(mmd2_normal(z.bfloat16()), mmd2_normal(z.bfloat16().double()), rtol=0, atol=0)
    assert torch.allclose(mmd2_normal(z.flip(0)), value, rtol=1e-6, atol=1e-14)
