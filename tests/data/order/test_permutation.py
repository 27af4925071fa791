"""A permutation that is computed: each number once, in an order that looks random."""

import numpy as np
import pytest

from olvae.data.order import permutation
from olvae.data.order.permutation import Permutation, draws


def listed(length: int, seed: int = 0, epoch: int = 0, first: int | None = None) -> np.ndarray:
    order = Permutation(length, (seed, epoch, 1))
    return np.array([order[i] for i in range(length if first is None else first)])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 4097, 65_536])
def test_each_number_comes_once(length):
    assert sorted(listed(length)) == list(range(length))
    assert len(Permutation(length, (0,))) == length


@pytest.mark.parametrize("index", [-1, 7])
def test_what_is_beyond_the_length_is_an_error(index):
    with pytest.raises(IndexError):
        Permutation(7, (0,))[index]


def test_each_seed_and_epoch_has_an_order_of_its_own():
    orders = [listed(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert (order == other).sum() < 10  # 1 by chance
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.15  # 4.7 standard deviations
    assert (listed(1000, 1, 2) == orders[5]).all()


@pytest.mark.parametrize("computed", [False, True])
def test_draws_are_positions_with_their_epochs_order(computed, monkeypatch):
    """From any position on, with gaps; a small order is listed, a large one is computed."""
    monkeypatch.setattr(permutation, "MOST_LISTED", 6 if computed else 7)
    orders = []
    for epoch in range(3):
        by_numpy = np.random.default_rng((5, epoch, 1)).permutation(7)
        orders += listed(7, 5, epoch).tolist() if computed else by_numpy.tolist()
    assert list(draws(5, 7, range(21))) == list(enumerate(orders))
    for places in (range(9, 21, 4), [0, 20], [7], []):
        assert list(draws(5, 7, places)) == [(place, orders[place]) for place in places]
    by_numpy = np.random.default_rng((5, 0, 1)).permutation(7).tolist()
    assert [number for _, number in draws(5, 7, range(7), listed=True)] == by_numpy


def chi_square(found: np.ndarray) -> float:
    """Deviation from equal numbers, in standard deviations of the statistic."""
    expected = found.sum() / found.size
    freedom = found.size - 1
    return float((((found - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("length", [2**20 + 1, 3_000_000, 10**8])
def test_an_order_of_millions_looks_random(length):
    """Also numpy's permutation passes these; a counter, an LCG or two rounds do not."""
    order = listed(length, seed=5, first=60_000)
    share = order / length
    assert chi_square(np.bincount(np.diff(order) % length * 64 // length, minlength=64)) < 5
    assert chi_square(np.histogram2d(share[:-1], share[1:], 16)[0]) < 5
    assert chi_square(np.bincount(order % 64, minlength=64)) < 5
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(share[:-lag], share[lag:])[0, 1]) < 5 / np.sqrt(len(order))
    assert abs(np.corrcoef(np.arange(len(order)), share)[0, 1]) < 5 / np.sqrt(len(order))


def test_an_order_is_the_same_in_every_version():
    """Runs that are resumed rely on it."""
    order = Permutation(10**8, (3, 1, 1))
    assert [order[i] for i in (0, 1, 99_999_999)] == [46_965_060, 8_536_943, 15_238_792]
