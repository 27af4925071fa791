"""Beside what evaluation/test_latent_report.py and export/test_encoding.py test of moments."""

import json
import math
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch

from olvae.modules.moments import Moments


def test_moments_state_through_json_loses_no_digit():
    moments = Moments.of(torch.randn(5, 4, 6, 7), torch.rand(5, 4, 6, 7))
    again = Moments.from_state(*json.loads(json.dumps(moments.state())))
    assert torch.equal(again.std, moments.std)
    assert again.factors() == moments.factors()


@pytest.mark.parametrize("batches", [[5], [2, 3], [1, 1, 1, 1, 1]])
def test_moments_are_numpys_over_all_positions(batches):
    """Of posterior means, of samples, whose variances add up, and of all channels together."""
    mean, variance = 3 * torch.randn(5, 4, 6, 7) + 2, torch.rand(5, 4, 6, 7)
    parts = zip(mean.split(batches), variance.split(batches), strict=True)
    moments = reduce(add, (Moments.of(*part) for part in parts))
    means, variances = (t.double().numpy().swapaxes(0, 1).reshape(4, -1) for t in (mean, variance))
    assert moments.positions == 5 * 6 * 7
    np.testing.assert_allclose(moments.mean, means.mean(1), rtol=1e-12)
    np.testing.assert_allclose(moments.std_of_means, means.std(1), rtol=1e-12)
    total = means.var(1) + variances.mean(1)
    np.testing.assert_allclose(moments.std, np.sqrt(total), rtol=1e-12)
    scale, shift = moments.factors()
    assert shift == pytest.approx(means.mean(), rel=1e-12)
    assert scale == pytest.approx((means.var() + variances.mean()) ** -0.5, rel=1e-12)


def test_moments_of_a_latent_alone_and_of_one_without_a_distribution():
    z = torch.randn(4, 6, 7)
    one, batch = Moments.of(z), Moments.of(z[None], torch.zeros(1, 4, 6, 7))
    assert one.state() == batch.state()
    assert one.mean.dtype == torch.float64
    assert torch.equal(one.std, one.std_of_means)


def test_equal_latents_have_no_factors_and_no_negative_variance():
    """Rounding may leave less than nothing."""
    equal = Moments.of(torch.full((3, 2, 5, 5), 0.1))
    assert (equal.std >= 0).all()
    assert (equal.std_of_means >= 0).all()
    for value in (0.0, math.nan):
        with pytest.raises(ValueError, match="all equal"):
            Moments.of(torch.full((1, 2, 3, 3), value)).factors()
    below = Moments(1, torch.ones(1), torch.zeros(1), torch.zeros(1))
    assert below.std == below.std_of_means == 0


def test_two_channels_apart_have_the_variance_between_them():
    """Each is constant: -0.25 and 0.75 have mean 0.25 and variance 0.25."""
    z = torch.stack((torch.full((2, 2), -0.25), torch.full((2, 2), 0.75)))
    assert Moments.of(z).factors() == (2.0, 0.25)
