"""What colour reconstructions lack, against NumPy."""

import numpy as np
import pytest
import torch

from study.measure import AXES, Unexplained


def test_the_unexplained_share_along_each_axis_is_numpys():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (6, 3, 16, 24)).astype(np.uint8)
    y = np.clip(x + rng.normal(0, 9, x.shape), 0, 255).astype(np.uint8)
    found = Unexplained()
    for part in (slice(0, 4), slice(4, 6)):
        found.update(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    means, others = (a.astype(float).reshape(6, 3, 2, 8, 3, 8).mean((3, 5)) for a in (x, y))
    for name, axis in AXES.items():
        along, other = ((m * np.array(axis)[:, None, None]).sum(1) for m in (means, others))
        assert found.compute()[name] == pytest.approx(
            ((other - along) ** 2).mean() / along.var(), rel=1e-9
        )


def test_gray_reconstructions_lack_all_colour():
    x = torch.rand(4, 3, 32, 32)
    found = Unexplained()
    found.update(x, x.mean(1, keepdim=True).expand_as(x))
    luma, red_blue, green_magenta = found.compute().values()
    assert luma == pytest.approx(0, abs=1e-9)
    assert min(red_blue, green_magenta) >= 1  # the colours' mean is missing, too
