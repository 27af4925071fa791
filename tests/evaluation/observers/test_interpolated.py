"""Neighbours and interpolations of latents against scipy's distances and hand-written formulas."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import softmax

from olvae.evaluation.observers import interpolated
from olvae.evaluation.observers.interpolated import (
    drawn_neighbours,
    nearest_neighbours,
    normalise_channels,
    share_of_wrong,
    slerp_halfway,
)


@pytest.mark.parametrize(("n", "block"), [(2, 1024), (50, 7), (50, 1024), (300, 128)])
def test_nearest_neighbours_are_scipys(n, block):
    """Far from zero and close together, as latents with a large mean are,
    where float32's squares lose digits.
    """
    z = 300.0 + torch.randn(n, 40) * torch.logspace(-2, 1, 40)
    nearest, distances = nearest_neighbours(z, block=block)
    direct = cdist(z.double().numpy(), z.double().numpy())
    np.fill_diagonal(direct, np.inf)
    assert nearest.tolist() == direct.argmin(1).tolist()
    assert distances.numpy() == pytest.approx(direct.min(1), rel=1e-12)


def test_share_of_wrong_neighbours_is_that_of_scipy(monkeypatch):
    """One candidate, on a sphere that is large for the distances,
    where float32's products can't tell.
    """
    monkeypatch.setattr(interpolated, "CANDIDATES", 1)
    z = 1e4 * torch.nn.functional.normalize(torch.randn(2, 40)).repeat_interleave(
        50, 0
    ) + torch.randn(100, 40)
    nearest, distances = nearest_neighbours(z, block=30)
    direct = cdist(z.double().numpy(), z.double().numpy()) + np.diag(np.full(100, np.inf))
    wrong = (direct.argmin(1) != nearest.numpy())[::3].mean()
    assert share_of_wrong(z, distances, torch.arange(0, 100, 3)) == pytest.approx(wrong)
    assert wrong > 0.1


def test_equal_latents_are_each_others_nearest_neighbours():
    nearest, distances = nearest_neighbours(torch.tensor([[1.0, 2.0], [9.0, 9.0], [1.0, 2.0]]))
    assert (nearest[[0, 2]].tolist(), distances[[0, 2]].tolist()) == ([2, 0], [0.0, 0.0])


@pytest.mark.parametrize(("n", "block"), [(5, 1024), (60, 17)])
def test_drawn_neighbours_are_of_the_ten_most_similar_by_chance(n, block):
    z = torch.randn(n, 12, generator=torch.Generator().manual_seed(1)) + 0.5
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drawn, distances, farthest = drawn_neighbours(z, uniform, block=block)
    rows = z.double().numpy()
    cosine = 1.0 - cdist(rows, rows, "cosine")
    np.fill_diagonal(cosine, -np.inf)
    amount = min(10, n - 1)
    for i in range(n):
        similar = np.argsort(-cosine[i])[:amount]
        chances = softmax(-((rows[i] - rows[similar]) ** 2).mean(1))
        expected = similar[np.searchsorted(chances.cumsum(), uniform[i].item())]
        assert drawn[i] == expected
        assert distances[i].item() == pytest.approx(np.linalg.norm(rows[i] - rows[expected]))
        assert farthest[i].item() == pytest.approx((2.0 - 2.0 * cosine[i, similar[-1]]) ** 0.5)
    assert len(set(drawn.tolist())) > 1
    checked = torch.arange(n)
    assert share_of_wrong(z, farthest, checked, amount, directions=True) == 0.0
    assert share_of_wrong(z, 1.1 * farthest, checked, amount, directions=True) == 1.0


def test_slerp_halfway_is_the_textbook_formula():
    a, b = torch.randn(6, 4, 2, 2).double(), torch.randn(6, 4, 2, 2).double()
    middle = slerp_halfway(a, b)
    for x, y, found in zip(a, b, middle, strict=True):
        omega = torch.acos((x * y).sum() / (x.norm() * y.norm()))
        expected = (torch.sin(0.5 * omega) * x + torch.sin(0.5 * omega) * y) / torch.sin(omega)
        torch.testing.assert_close(found, expected)
    unit = torch.nn.functional.normalize(a.flatten(1)), torch.nn.functional.normalize(b.flatten(1))
    torch.testing.assert_close(slerp_halfway(*unit).norm(dim=1), torch.ones(6).double())
    torch.testing.assert_close(slerp_halfway(a, a), a)
    assert torch.equal(slerp_halfway(a, -a), torch.zeros_like(a))


def test_channels_are_normalised_and_back():
    z = torch.randn(50, 3, 4, 4) * torch.tensor([0.1, 1.0, 9.0])[:, None, None] + 5.0
    before = z.clone()
    shift, scale = normalise_channels(z)
    flat = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(3))
    torch.testing.assert_close(z * scale + shift, before)
