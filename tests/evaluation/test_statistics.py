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


@pytest.fixture
def slices():
    """Values of 12 patients with 5 to 27 slices each, which are alike, and their patients."""
    rng = np.random.default_rng(1)
    sizes = range(5, 29, 2)
    means = rng.normal(30.0, 3.0, size=12)
    values, groups = {}, {}
    for patient, (size, mean) in enumerate(zip(sizes, means, strict=True)):
        for number in range(size):
            key = f"{number}/{patient}"
            values[key] = float(rng.normal(mean, 0.5))
            groups[key] = f"p{patient:02}"
    return values, groups


def test_groups_are_drawn_whole(slices):
    """By hand, one patient after the other: the mean over all slices of the patients drawn."""
    values, groups = slices
    names = sorted(set(groups.values()))
    rng = np.random.default_rng(5)
    means = []
    for _ in range(200):
        drawn = []
        for place in rng.integers(12, size=12):
            drawn += [values[key] for key in values if groups[key] == names[place]]
        means.append(np.mean(drawn))
    expected = np.quantile(means, (0.025, 0.975))
    found = confidence(values, samples=200, seed=5, groups=groups)
    assert found == pytest.approx(tuple(expected), rel=1e-12)


def test_the_interval_over_patients_is_the_clustered_one_and_wider_than_over_slices(slices):
    """Near the normal one with the variance of a ratio of sums over clusters."""
    values, groups = slices
    low, high = confidence(values, samples=8000, groups=groups)
    mean = np.mean(list(values.values()))
    residuals = dict.fromkeys(groups.values(), 0.0)
    for key, value in values.items():
        residuals[groups[key]] += value - mean
    reach = 1.959964 * math.sqrt(sum(r * r for r in residuals.values())) / len(values)
    assert (high - low) / 2 == pytest.approx(reach, rel=0.1)
    alone = confidence(values, samples=8000)
    assert high - low > 2.5 * (alone[1] - alone[0])
    paired = difference(values, dict.fromkeys(values, 0.0), samples=8000, groups=groups)
    assert paired[1:] == pytest.approx((low, high), rel=1e-12)


def test_groups_of_one_image_give_the_interval_over_images(slices):
    """Keys sort as their groups do, so the same ones are drawn."""
    values, _ = slices
    expected = pytest.approx(confidence(values), rel=1e-12)
    assert confidence(values, groups={key: key for key in values}) == expected
    assert confidence(values, groups={}) == expected
    assert confidence(values, groups=dict.fromkeys(values, "one")) is None
