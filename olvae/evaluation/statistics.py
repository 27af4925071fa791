"""Bootstrap intervals of a metric's mean, and of the difference between two targets.

Slices of one patient are alike: drawn one by one, they would make intervals too narrow. So groups
are drawn whole, as in a cluster bootstrap.
"""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Difference(NamedTuple):
    """Mean difference of two targets on the same images, with its interval."""

    value: float
    low: float
    high: float


def confidence(
    values: Mapping[str, float],
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> tuple[float, float] | None:
    """Return the bootstrap interval of the mean over images; None for fewer than two images.

    ``values`` are by image key, in any order. Images with an infinite value are left out. With
    ``groups``, by image key as well, whole groups are drawn; an image without one is its own.
    """
    drawn = _bootstrap([values], samples, seed, groups)
    if drawn is None:
        return None
    return _interval(drawn[0], level)


def difference(
    a: Mapping[str, float],
    b: Mapping[str, float],
    samples: int = 1000,
    groups: Mapping[str, str] | None = None,
) -> Difference | None:
    """Return mean(a) - mean(b) with a paired interval; None for fewer than two images.

    Each draw takes the same images for both, so this 95 % interval is narrower than the intervals
    of a and b suggest. If it excludes 0, they differ by more than the choice of images explains.
    With ``groups``, whole groups are drawn, as by :func:`confidence`.
    """
    drawn = _bootstrap([a, b], samples, 0, groups)
    if drawn is None:
        return None
    first, second = finite(a, b).mean(-1)
    return Difference(float(first - second), *_interval(drawn[0] - drawn[1], 0.95))


def finite(*rows: Mapping[str, float]) -> NDArray[np.float64]:
    """Return (targets, n): values sorted by key, without images that have an infinite one."""
    values, _ = _finite(rows)
    return values


def _finite(rows: Sequence[Mapping[str, float]]) -> tuple[NDArray[np.float64], list[str]]:
    """The values of :func:`finite`, and the images' keys."""
    keys = sorted(rows[0])
    values = []
    for row in rows:
        values.append([row[key] for key in keys])
    array = np.array(values)
    kept = np.isfinite(array).all(0)
    return array[:, kept], list(compress(keys, kept))


def _bootstrap(
    rows: Sequence[Mapping[str, float]], samples: int, seed: int, groups: Mapping[str, str] | None
) -> NDArray[np.float64] | None:
    """Draw images or groups with replacement: means (targets, samples); None of fewer than two."""
    # A target's values side by side: finite() leaves those of one image so, and numpy reads and
    # adds numbers that lie apart six times slower, and adds them less exactly.
    found, keys = _finite(rows)
    values = np.ascontiguousarray(found)
    n = values.shape[-1]

    # Of groups, their sums; a draw's mean is over all of its images, however many these are.
    counts = None
    if groups is not None:
        _, members = np.unique([groups.get(key, key) for key in keys], return_inverse=True)
        counts = np.bincount(members)
        n = len(counts)
        values = np.stack([np.bincount(members, weights=row) for row in values])
    if n < 2:
        return None

    rng = np.random.default_rng(seed)
    means = np.empty((len(values), samples))
    for sample in range(samples):
        drawn = rng.integers(n, size=n)
        images = n if counts is None else counts.take(drawn).sum()
        means[:, sample] = values.take(drawn, axis=1).sum(-1) / images
    return means


def _interval(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)
