import math

import pytest
import torch

from olvae.losses.kl import kl_loss
from olvae.modules.distributions import DiagonalGaussian


def test_by_hand():
    """Two latent values of mean 1 and 0, variance 4 and 1, for an image of 12 values."""
    moments = torch.tensor([1.0, 0.0, math.log(4.0), 0.0], dtype=torch.float64).view(1, 4, 1, 1)
    expected = 0.5 * (1 + 4 - 1 - math.log(4.0)) / 12
    assert kl_loss(DiagonalGaussian(moments), torch.zeros(1, 3, 2, 2)).item() == pytest.approx(expected, rel=1e-12)


def test_the_weight_means_what_it_means_in_latent_diffusion():
    """There: (sum of |d| over the batch + w * sum of kl) / batch. Ours times C H W, at the same w."""
    x, y = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)
    posterior = DiagonalGaussian(torch.randn(3, 8, 1, 1))
    w = 1e-2
    theirs = ((x - y).abs().sum() + w * posterior.kl().sum()) / 3
    ours = (x - y).abs().mean() + w * kl_loss(posterior, x)
    assert (ours * 3 * 8 * 8).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_gradients():
    moments = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: kl_loss(DiagonalGaussian(m), torch.zeros(2, 3, 4, 4)), moments)
