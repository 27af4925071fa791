"""Bootstrap intervals: how much a number depends on the choice of images."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Statistic = Callable[[Array], Array]
"""Maps values (..., n) to one number per row (...)."""

CHUNK = 1 << 22
"""How many values are drawn at a time; it bounds memory."""


class Difference(NamedTuple):
    """One target's value minus another's on the same images, and its interval."""

    value: float
    low: float
    high: float


def mean(values: Array) -> Array:
    """The mean of each row."""
    result: Array = values.mean(-1)
    return result


def pooled_psnr(values: Array) -> Array:
    """From the PSNRs of images of one size, the PSNR of all their pixels: 10 log10(255^2 / mean MSE), in dB.

    An infinite PSNR counts as an image without error.
    """
    with np.errstate(divide="ignore"):
        result: Array = -10.0 * np.log10((10.0 ** (-values / 10.0)).mean(-1))
    return result


def confidence(
    values: Mapping[str, float], level: float = 0.95, samples: int = 1000, seed: int = 0, statistic: Statistic = mean
) -> tuple[float, float] | None:
    """The interval that holds the statistic in ``level`` of all draws of as many images, with replacement.

    Args:
        values: one per image, by key; their order makes no difference.
        statistic: :func:`mean`, :func:`pooled_psnr` of PSNRs, or another.

    Returns:
        Its ends; None for one image, or if the statistic is infinite.
    """
    drawn = _bootstrap(_array(values)[None], samples, seed, statistic)
    return None if drawn is None else _interval(drawn[0], level)


def difference(
    a: Mapping[str, float],
    b: Mapping[str, float],
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    statistic: Statistic = mean,
) -> Difference | None:
    """The statistic of ``a`` minus that of ``b``, both on the same images in every draw; None as :func:`confidence`.

    The paired interval is narrower than those of a and b suggest. If it excludes 0, the two differ by more than the
    choice of images explains.

    Raises:
        ValueError: the keys differ.
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"a paired difference needs the same images on both sides: {len(a.keys() - b.keys())} are only in the "
            f"first, {len(b.keys() - a.keys())} only in the second"
        )
    pair = np.stack([_array(a), _array(b)])  # (2, n)
    drawn = _bootstrap(pair, samples, seed, statistic)
    if drawn is None:
        return None
    first, second = statistic(pair)
    return Difference(float(first - second), *_interval(drawn[0] - drawn[1], level))


def _array(values: Mapping[str, float]) -> Array:
    return np.array([values[key] for key in sorted(values)], dtype=np.float64)


def _bootstrap(values: Array, samples: int, seed: int, statistic: Statistic) -> Array | None:
    """(targets, n) -> the statistic of every draw (targets, samples), or None if there is no interval."""
    n = values.shape[-1]
    if n == 1 or not np.isfinite(statistic(values)).all():
        return None
    rng, rows = np.random.default_rng(seed), max(1, CHUNK // n)
    draws = (rng.integers(n, size=(min(rows, samples - done), n)) for done in range(0, samples, rows))
    drawn = np.concatenate([statistic(values[:, indices]) for indices in draws], axis=-1)
    return drawn if np.isfinite(drawn).all() else None


def _interval(drawn: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)
