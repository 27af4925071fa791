"""Terms of the objective by hand and against other libraries."""

import math

import numpy as np
import pytest
import pywt
import torch
from scipy.ndimage import gaussian_filter

from olvae.losses.terms import (
    RECONSTRUCTION,
    gaussian_loss,
    kl_loss,
    latent_loss,
    local_correlation,
    logvar_loss,
    marginal_cosine_loss,
    marginal_distance_loss,
    semantics_loss,
    structure_loss,
    wavelet_loss,
)
from olvae.modules.distributions import DiagonalGaussian

X = torch.tensor([[[[0.5, -0.25], [1.0, 0.0]]]], dtype=torch.float64)


# Differences 0.25, -0.5, 2, 0.
Y = torch.tensor([[[[0.25, 0.25], [-1.0, 0.0]]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", (0.25 + 0.5 + 2.0) / 4),
        ("l2", (0.0625 + 0.25 + 4.0) / 4),
        (
            "charbonnier",
            ((0.0625 + 1e-6) ** 0.5 + (0.25 + 1e-6) ** 0.5 + (4 + 1e-6) ** 0.5 + 1e-3) / 4,
        ),
    ],
)
def test_pixel_losses_by_hand(name, expected):
    assert RECONSTRUCTION[name](X, Y).item() == pytest.approx(expected, rel=1e-12)
    assert RECONSTRUCTION[name](X.bfloat16(), Y.bfloat16()).dtype == torch.float32


def test_wavelet_loss_is_pywavelets_in_float64():
    x, y = (torch.rand(2, 3, 8, 10, dtype=torch.float64) for _ in range(2))
    _, details = pywt.dwt2((x - y).numpy(), "haar")
    expected = np.mean([np.sqrt(band**2 + 1e-6).mean() for band in details])
    assert wavelet_loss(x, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("size", "sigma"), [(5, 1.0), (7, 0.75)])
def test_gaussian_loss_is_that_of_scipys_residuals(size, sigma):
    x, y = (torch.randn(2, 3, 8, 6, dtype=torch.float64) for _ in range(2))
    ends = (size // 2) / sigma
    residual_x, residual_y = (
        t
        - torch.from_numpy(
            gaussian_filter(t.numpy(), sigma, mode="mirror", truncate=ends, axes=(2, 3))
        )
        for t in (x, y)
    )
    expected = (residual_x - residual_y).abs().mean().item()
    assert gaussian_loss(x, y, size, sigma).item() == pytest.approx(expected, rel=1e-10)


def test_kl_loss_by_hand():
    """Of two images of 12 values: latent values of mean 1 and 0, variance 4 and 1;
    and of mean 3 and 0, variance 1.
    """
    moments = torch.tensor(
        [[1.0, 0.0, math.log(4.0), 0.0], [3.0, 0.0, 0.0, 0.0]], dtype=torch.float64
    )
    expected = 0.5 * ((1 + 4 - 1 - math.log(4.0)) + 9) / 2 / 12
    posterior = DiagonalGaussian(moments.view(2, 4, 1, 1))
    assert kl_loss(posterior, torch.zeros(2, 3, 2, 2)).item() == pytest.approx(expected, rel=1e-12)
    one = DiagonalGaussian(moments[1:].view(1, 4, 1, 1))
    assert kl_loss(one, torch.zeros(1, 3, 2, 2)).item() == pytest.approx(4.5 / 12, rel=1e-12)


def test_latent_loss_by_hand():
    """Two channels of 1x2, whose deviations are 0.5 and 4."""
    mean = torch.tensor([[[[1.0, 2.0]], [[0.0, 8.0]]]], dtype=torch.float64)
    target = torch.tensor([[[[0.5, 2.0]], [[2.0, 0.0]]]], dtype=torch.float64)
    std = torch.tensor([0.5, 4.0], dtype=torch.float64)
    expected = (1.0**2 + 0.0 + 0.5**2 + 2.0**2) / 4
    assert latent_loss(mean, target, std).item() == pytest.approx(expected, rel=1e-12)
    assert latent_loss(mean.bfloat16(), target, std).dtype == torch.float64
    assert latent_loss(mean.bfloat16(), target.bfloat16(), std.float()).dtype == torch.float32


def test_logvar_loss_is_torchs_divergence_at_equal_means():
    """KL(target || ours), in nats per element."""
    logvar, target = (2 * torch.randn(3, 4, 2, 5, dtype=torch.float64) for _ in range(2))
    mean = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    ours, theirs = (
        torch.distributions.Normal(mean, (0.5 * value).exp()) for value in (logvar, target)
    )
    expected = torch.distributions.kl_divergence(theirs, ours).mean().item()
    assert logvar_loss(logvar, target).item() == pytest.approx(expected, rel=1e-10)
    assert logvar_loss(target, target).item() == 0.0
    assert logvar_loss(logvar.bfloat16(), target.bfloat16()).dtype == torch.float32


# VA-VAE's terms
def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


@pytest.mark.parametrize(("window", "sides"), [(2, (4, 6)), (2, (5, 3)), (4, (8, 4))])
def test_local_correlation_is_numpys_of_each_pair_in_a_window(window, sides):
    z = torch.randn(2, 5, *sides, dtype=torch.float64, requires_grad=True)
    found = []
    for latent in z.detach().numpy():
        for top in range(0, sides[0] - window + 1, window):
            for left in range(0, sides[1] - window + 1, window):
                positions = latent[:, top : top + window, left : left + window].reshape(5, -1)
                matrix = np.corrcoef(positions.T)
                found.append(matrix[np.triu_indices(window**2, 1)].mean())
    assert local_correlation(z, window).item() == pytest.approx(np.mean(found), rel=1e-9)
    assert torch.autograd.gradcheck(lambda z: local_correlation(z, window), z)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_marginal_cosine_loss_is_the_formula(margin):
    z, f = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    terms = [
        max(0.0, 1 - margin - cosine(z[b, :, i, j].numpy(), f[b, :, i, j].numpy()))
        for b in range(2)
        for i in range(3)
        for j in range(4)
    ]
    assert marginal_cosine_loss(z, f, margin).item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert marginal_cosine_loss(f, f, margin).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_marginal_distance_loss_is_the_formula(margin):
    z = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    f = torch.randn(2, 7, 2, 3, dtype=torch.float64)
    terms = []
    for b in range(2):
        for i in range(6):
            for j in range(6):
                of_z, of_f = (
                    cosine(t[b, :, i // 3, i % 3].numpy(), t[b, :, j // 3, j % 3].numpy())
                    for t in (z, f)
                )
                terms.append(max(0.0, abs(of_z - of_f) - margin))
    assert marginal_distance_loss(z, f, margin).item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert marginal_distance_loss(f, 3 * f, margin).item() == pytest.approx(0.0, abs=1e-12)


def test_structure_loss_is_the_formula():
    z = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    f = torch.randn(2, 7, 2, 3, dtype=torch.float64)
    squares = []
    for b in range(2):
        of_z, of_f = (t[b].flatten(1).T.numpy() for t in (z, f))
        squares += [
            (cosine(of_z[i], of_z[j]) - cosine(of_f[i], of_f[j])) ** 2
            for i in range(6)
            for j in range(6)
        ]
    assert structure_loss(z, f).item() == pytest.approx(np.mean(squares), rel=1e-12)


def test_semantics_loss_is_the_formula():
    projected, f = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    whole, each = [], []
    for b in range(2):
        of_p, of_f = (t[b].flatten(1).T.numpy() for t in (projected, f))
        whole.append(1 - cosine(of_p.mean(0), of_f.mean(0)))
        each += [1 - cosine(of_p[i], of_f[i]) for i in range(12)]
    expected = np.mean(whole) + np.mean(each)
    assert semantics_loss(projected, f).item() == pytest.approx(expected, rel=1e-12)


LOSSES = [
    *RECONSTRUCTION.values(),
    wavelet_loss,
    gaussian_loss,
    logvar_loss,
    marginal_cosine_loss,
    marginal_distance_loss,
    structure_loss,
    semantics_loss,
]


every = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


@every
def test_loss_terms_pass_gradcheck(loss):
    x, y = torch.randn(2, 2, 2, 4, 4, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(loss, (x, y))


@every
def test_loss_terms_are_float32_under_autocast(loss):
    x, y = torch.randn(2, 2, 8, 4, 4)
    outside = loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x, y), outside)
    assert loss(x.bfloat16(), y.bfloat16()).dtype == torch.float32
