"""The objective of transparent images, by hand in float64, and what it does not see."""

import numpy as np
import pytest
import torch

from olvae.losses.alpha import AlphaObjective, over
from olvae.modules.distributions import DiagonalGaussian


def rgba(seed: int) -> torch.Tensor:
    return torch.rand(6, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_compositing_by_hand():
    image, background = rgba(0).double(), torch.tensor([0.5, -1.0, 1.0])[None, :, None, None]
    alpha = (image[:, 3:] + 1) / 2
    levels = 255 * ((image[:, :3] + 1) / 2 * alpha + (background + 1) / 2 * (1 - alpha))  # as everybody does, in 0..255
    np.testing.assert_allclose(over(image, background) * 127.5 + 127.5, levels, atol=1e-4)


def test_terms_and_their_sum():
    objective = AlphaObjective(alpha_weight=3, lpips_weight=0, kl_weight=0.5, wavelet_weight=0, gaussian_weight=0)
    x, y, posterior = rgba(0), rgba(1).requires_grad_(), DiagonalGaussian(torch.randn(6, 4, 2, 2))
    total, terms = objective(x, y, posterior)
    assert terms["alpha"].item() == pytest.approx((x - y)[:, 3].abs().mean().item(), rel=1e-5)
    assert terms["kl"].item() == pytest.approx(posterior.kl().mean().item() / (4 * 16 * 16), rel=1e-5)
    assert total.item() == pytest.approx(sum(objective.weights[n] * terms[n].item() for n in terms), rel=1e-5)
    total.backward()
    assert y.grad.abs().amin((0, 2, 3)).min() >= 0
    assert (y.grad.abs().amax((0, 2, 3)) > 0).all()


def test_what_is_invisible_costs_nothing_and_backgrounds_change():
    objective = AlphaObjective(lpips_weight=0, kl_weight=0, wavelet_weight=0, gaussian_weight=0)
    x = rgba(0)
    x[:, 3] = -1
    y = torch.cat((rgba(1)[:, :3], x[:, 3:]), dim=1)
    assert objective(x, y, None)[0].item() == 0
    y[:, 3] = 1  # opaque where it should be clear: how wrong that is depends on what is behind
    assert len({round(objective(x, y, None)[1]["rec"].item(), 4) for _ in range(5)}) == 5


def test_mistakes():
    with pytest.raises(ValueError, match="take Objective for opaque images"):
        AlphaObjective(alpha_weight=0, lpips_weight=0)
    with pytest.raises(ValueError, match=r"not 3: set data\.params\.channels=4"):
        AlphaObjective(lpips_weight=0)(rgba(0)[:, :3], rgba(0)[:, :3], DiagonalGaussian(torch.zeros(6, 4, 2, 2)))
