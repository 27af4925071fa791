"""Moments against NumPy in float64."""

import json

import numpy as np
import pytest
import torch

from olvae.modules.scaling_factors import Moments


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor]:
    mean = 3.0 * torch.randn(5, 4, 6, 7) + torch.tensor([1.0, -2.0, 0.0, 5.0])[:, None, None]
    return mean, torch.rand(5, 4, 6, 7)


def test_moments_and_factors_are_numpys(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    mean, variance = latents
    moments = Moments.of(mean, variance)
    m, v = mean.double().numpy(), variance.double().numpy()
    np.testing.assert_allclose(moments.mean, m.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(moments.std_of_means, m.std((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(moments.std, np.sqrt(m.var((0, 2, 3)) + v.mean((0, 2, 3))), rtol=1e-12)
    scaling, shift = moments.factors()
    assert shift == pytest.approx(m.mean(), rel=1e-12)
    assert scaling == pytest.approx((m.var() + v.mean()) ** -0.5, rel=1e-12)


def test_images_add_up_to_the_batch(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    mean, variance = latents
    whole, first, *others = Moments.of(mean, variance), *(Moments.of(m, v) for m, v in zip(mean, variance, strict=True))
    total = sum(others, start=first)
    assert total.positions == whole.positions == 5 * 6 * 7
    torch.testing.assert_close(total.std, whole.std, rtol=1e-12, atol=0.0)


def test_deterministic_latents_have_no_variance_of_their_own(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    moments = Moments.of(latents[0])
    assert torch.equal(moments.std, moments.std_of_means)


def test_a_state_through_json_loses_no_digit(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    moments = Moments.of(*latents)
    again = Moments.from_state(*json.loads(json.dumps(moments.state())))
    assert torch.equal(again.std, moments.std)
    assert again.factors() == moments.factors()


def test_equal_latents_have_no_scaling_factor() -> None:
    with pytest.raises(ValueError, match="all equal"):
        Moments.of(torch.ones(1, 4, 2, 2)).factors()
