"""Bootstrap intervals of a metric's mean, and of the difference between two targets."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Difference(NamedTuple):
    """Mean difference of two targets on the same images, with its interval."""

    value: float
    low: float
    high: float


def confidence(
    values: Mapping[str, float], level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Return the bootstrap interval of the mean over images; None for fewer than two images.

    ``values`` are by image key, in any order. Images with an infinite value are left out.
    """
    drawn = _bootstrap(finite(values), samples, seed)
    if drawn is None:
        return None
    return _interval(drawn[0], level)


def difference(
    a: Mapping[str, float], b: Mapping[str, float], samples: int = 1000
) -> Difference | None:
    """Return mean(a) - mean(b) with a paired interval; None for fewer than two images.

    Each draw takes the same images for both, so this 95 % interval is narrower than the intervals
    of a and b suggest. If it excludes 0, they differ by more than the choice of images explains.
    """
    pair = finite(a, b)
    drawn = _bootstrap(pair, samples, 0)
    if drawn is None:
        return None
    first, second = pair.mean(-1)
    return Difference(float(first - second), *_interval(drawn[0] - drawn[1], 0.95))


def finite(*rows: Mapping[str, float]) -> NDArray[np.float64]:
    """Return (targets, n): values sorted by key, without images that have an infinite one."""
    keys = sorted(rows[0])
    values = []
    for row in rows:
        values.append([row[key] for key in keys])
    array = np.array(values)
    return array[:, np.isfinite(array).all(0)]


def _bootstrap(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64] | None:
    """Draw images with replacement: (targets, n) -> means (targets, samples); None if n < 2."""
    n = values.shape[-1]
    if n < 2:
        return None
    # A target's values side by side: finite() leaves those of one image so, and numpy reads and
    # adds numbers that lie apart six times slower, and adds them less exactly.
    values = np.ascontiguousarray(values)
    rng = np.random.default_rng(seed)
    means = np.empty((len(values), samples))
    for sample in range(samples):
        means[:, sample] = values.take(rng.integers(n, size=n), axis=1).mean(-1)
    return means


def _interval(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)
