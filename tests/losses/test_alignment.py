"""VA-VAE's terms, element by element."""

import math

import numpy as np
import pytest
import torch

from olvae.losses.terms import marginal_cosine_loss, marginal_distance_loss


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_cosine_term_is_the_formula(margin):
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
def test_the_distance_term_is_the_formula(margin):
    z, f = torch.randn(2, 3, 2, 3, dtype=torch.float64), torch.randn(2, 7, 2, 3, dtype=torch.float64)
    terms = []
    for b in range(2):
        for i in range(6):
            for j in range(6):
                of_z, of_f = (cosine(t[b, :, i // 3, i % 3].numpy(), t[b, :, j // 3, j % 3].numpy()) for t in (z, f))
                terms.append(max(0.0, abs(of_z - of_f) - margin))
    assert marginal_distance_loss(z, f, margin).item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert marginal_distance_loss(f, 3 * f, margin).item() == pytest.approx(0.0, abs=1e-12)


def test_by_hand():
    """Two positions: features at right angles and the latents in line; a projection at 60 degrees and one at 0."""
    z = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]], dtype=torch.float64)  # (1, 2, 1, 2): (1, 0) and (2, 0)
    f = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]], dtype=torch.float64)  # (3, 0) and (0, 1)
    assert marginal_distance_loss(z, f).item() == pytest.approx(2 * (1 - 0.25) / 4)
    projected = torch.tensor([[[[1.0, 0.0]], [[math.sqrt(3), 5.0]]]], dtype=torch.float64)
    assert marginal_cosine_loss(projected, f, 0.25).item() == pytest.approx((1 - 0.25 - 0.5) / 2)


@pytest.mark.parametrize("loss", [marginal_cosine_loss, marginal_distance_loss])
def test_gradients(loss):
    z, f = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, 0.1), (z, f))


@pytest.mark.parametrize("loss", [marginal_cosine_loss, marginal_distance_loss])
def test_float32_under_autocast(loss):
    z, f = torch.randn(2, 2, 8, 4, 4)
    outside = loss(z, f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(z, f), outside)
    assert loss(z.bfloat16(), f.bfloat16()).dtype == torch.float32
