import math

import numpy as np
import pytest

from olvae.evaluation.statistics import confidence, difference, pooled_psnr


def keyed(values) -> dict[str, float]:
    return {f"{i:05}": float(value) for i, value in enumerate(values)}


def test_two_images_by_hand():
    """The mean of two draws from {0, 1} is 0, 1/2 and 1 in a quarter, a half and a quarter of the cases."""
    values = keyed([0.0, 1.0])
    assert confidence(values, level=0.95, samples=4000) == (0.0, 1.0)
    assert confidence(values, level=0.4, samples=4000) == (0.5, 0.5)


def test_many_images_give_the_normal_interval():
    values = np.random.default_rng(3).gamma(4.0, size=2000)
    low, high = confidence(keyed(values), samples=8000)
    reach = 1.959964 * values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - reach, abs=0.05 * reach)
    assert high == pytest.approx(values.mean() + reach, abs=0.05 * reach)


def test_it_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(5)
    for level in (0.95, 0.8):
        inside = 0
        for trial in range(400):
            low, high = confidence(keyed(rng.normal(7.0, 2.0, size=60)), level=level, samples=300, seed=trial)
            inside += low <= 7.0 <= high
        assert inside / 400 == pytest.approx(level, abs=0.045)  # 3 standard errors of a binomial, and n is finite


def test_the_order_of_images_makes_no_difference_and_the_seed_does():
    values = keyed(np.random.default_rng(0).normal(size=50))
    backwards = dict(reversed(values.items()))
    assert confidence(values) == confidence(backwards)
    assert confidence(values) != confidence(values, seed=1)


def test_memory_is_bounded_without_changing_the_draws(monkeypatch):
    values = keyed(np.random.default_rng(0).normal(size=50))
    whole = confidence(values, samples=100)
    monkeypatch.setattr("olvae.evaluation.statistics.CHUNK", 64)  # a row at a time
    assert confidence(values, samples=100) == pytest.approx(whole, rel=1e-12)


def test_pooled_psnr_is_that_of_all_pixels():
    rng = np.random.default_rng(2)
    errors = rng.normal(scale=9.0, size=(40, 300)) * rng.uniform(0.2, 2.0, size=(40, 1))
    mse = np.square(errors).mean(1)
    values = 10.0 * np.log10(255.0**2 / mse)
    expected = 10.0 * math.log10(255.0**2 / np.square(errors).mean())
    assert pooled_psnr(values) == pytest.approx(expected, rel=1e-12)
    low, high = confidence(keyed(values), statistic=pooled_psnr, samples=4000)
    of_mse = confidence(keyed(mse), samples=4000)
    assert (low, high) == pytest.approx(tuple(10.0 * np.log10(255.0**2 / np.array(of_mse))[::-1]), abs=0.02)
    assert low < expected < high < values.mean() + 3


def test_what_has_no_interval():
    assert confidence({"a": 3.0}) is None
    assert confidence(keyed([30.0, math.inf, 31.0])) is None
    assert confidence(keyed([math.inf] * 3), statistic=pooled_psnr) is None
    assert difference({"a": 3.0}, {"a": 2.0}) is None
    assert difference(keyed([30.0, math.inf]), keyed([30.0, 31.0])) is None
    low, high = confidence(keyed([20.0] * 30 + [math.inf]), statistic=pooled_psnr)
    assert 20.0 <= low < high < 21.0  # one image without error


def test_a_difference_is_paired():
    rng = np.random.default_rng(4)
    hard = rng.normal(30.0, 5.0, size=200)  # what both find hard
    a, b = hard + rng.normal(0.3, 0.5, size=200), hard + rng.normal(0.0, 0.5, size=200)
    found = difference(keyed(a), keyed(b), samples=4000)
    assert found.value == pytest.approx((a - b).mean(), rel=1e-9)
    assert (found.low, found.high) == pytest.approx(confidence(keyed(a - b), samples=4000), rel=1e-9)
    low, high = confidence(keyed(a))
    assert found.high - found.low < (high - low) / 5
    assert found.low > 0
    other = difference(keyed(b), keyed(a), samples=4000)
    assert (other.value, other.low, other.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_a_difference_of_other_images_is_refused():
    with pytest.raises(ValueError, match="1 are only in the first, 2 only in the second"):
        difference({"a": 1.0}, {"b": 1.0, "c": 2.0})
