"""Bootstrap intervals of means and of paired differences."""

import math
import tracemalloc

import numpy as np
import pytest

from olvae.evaluation.statistics import confidence, difference


def keyed(values) -> dict[str, float]:
    return {f"{i:05}": float(value) for i, value in enumerate(values)}


def test_confidence_interval_of_two_images_by_hand():
    """The mean of two draws from {0, 1} is 0 in 1/4, 1/2 in 1/2, and 1 in 1/4 of the cases."""
    values = keyed([0.0, 1.0])
    assert confidence(values, level=0.95, samples=4000) == (0.0, 1.0)
    assert confidence(values, level=0.4, samples=4000) == (0.5, 0.5)


def test_confidence_interval_of_many_images_is_the_normal_one():
    values = np.random.default_rng(3).gamma(4.0, size=2000)
    low, high = confidence(keyed(values), samples=8000)
    reach = 1.959964 * values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - reach, abs=0.05 * reach)
    assert high == pytest.approx(values.mean() + reach, abs=0.05 * reach)


def test_confidence_interval_depends_on_the_seed_and_not_on_the_order():
    values = keyed(np.random.default_rng(0).normal(size=50))
    backwards = dict(reversed(values.items()))
    assert confidence(values) == confidence(backwards)
    assert confidence(values) != confidence(values, seed=1)


def test_bootstrap_draws_images_with_replacement():
    """The means of the values at the places that numpy draws, to the bit for one target."""
    values = np.random.default_rng(0).normal(size=(2, 50))
    drawn = np.random.default_rng(7).integers(50, size=(100, 50))
    expected = np.quantile(values[0][drawn].mean(1), (0.025, 0.975))
    assert confidence(keyed(values[0]), samples=100, seed=7) == tuple(expected)
    drawn = np.random.default_rng(0).integers(50, size=(100, 50))
    means = (values[0] - values[1])[drawn].mean(1)
    found = difference(keyed(values[0]), keyed(values[1]), samples=100)
    assert found[1:] == pytest.approx(np.quantile(means, (0.025, 0.975)), rel=1e-12)


def test_bootstrap_holds_a_few_numbers_an_image():
    a, b = (keyed(np.random.default_rng(seed).normal(size=10_000)) for seed in range(2))
    tracemalloc.start()
    difference(a, b, samples=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 10_000


def test_two_targets_are_averaged_like_one():
    """To the bit, so in a row: numpy adds values that lie apart slower and less exactly."""
    values = keyed(np.random.default_rng(0).normal(size=10_000))
    found = difference(values, dict.fromkeys(values, 0.0), samples=50)
    assert found[1:] == confidence(values, samples=50)


def test_one_or_infinite_values_have_no_confidence_interval():
    assert confidence({"a": 3.0}) is None
    assert confidence(keyed([30.0, math.inf])) is None
    assert difference({"a": 3.0}, {"a": 2.0}) is None
    assert difference(keyed([30.0, math.inf]), keyed([30.0, 31.0])) is None


def test_infinite_values_are_left_out_of_intervals_and_differences():
    a = [30.0, 33.0, 31.0]
    b = [30.5, 32.0, 31.0]
    assert confidence(keyed([*a, math.inf])) == confidence(keyed(a))
    assert difference(keyed([*a, math.inf, 9.0]), keyed([*b, 9.0, math.inf])) == difference(
        keyed(a), keyed(b)
    )


def test_difference_of_two_rows_is_paired():
    rng = np.random.default_rng(4)
    hard = rng.normal(30.0, 5.0, size=200)  # what both find hard
    a = hard + rng.normal(0.3, 0.5, size=200)
    b = hard + rng.normal(0.0, 0.5, size=200)
    found = difference(keyed(a), keyed(b), samples=4000)
    assert found.value == pytest.approx((a - b).mean(), rel=1e-9)
    assert (found.low, found.high) == pytest.approx(
        confidence(keyed(a - b), samples=4000), rel=1e-9
    )
    low, high = confidence(keyed(a))
    assert found.high - found.low < (high - low) / 5
    assert found.low > 0
    other = difference(keyed(b), keyed(a), samples=4000)
    assert (other.value, other.low, other.high) == pytest.approx(
        (-found.value, -found.high, -found.low)
    )
