"""Which images the report shows: the worst, the median and the best by one metric, and an arbitrary few."""

import hashlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["Example", "Gallery"]


class Example(NamedTuple):
    """One image of a gallery: its key, its value of the metric, input and reconstruction as uint8 (C, H, W)."""

    key: str
    value: float
    x: Tensor
    y: Tensor


class Gallery:
    """Keeps a few images of one target on the CPU, out of all that it is shown.

    It keeps the values of all images, and the pixels of the worst, the best, and a pool of those whose keys have the
    smallest hashes. So batches, their order and the number of processes make no difference, and a key counts once.

    Args:
        better: which values of the metric are better.
        each: images per group.
        pool: images from which the median group is chosen, and the most that :meth:`spread` can return; at least three
            groups, so that none stays empty.
    """

    def __init__(self, better: Literal["higher", "lower"], each: int = 4, pool: int = 64) -> None:
        assert pool >= 3 * each
        self._sign = 1.0 if better == "higher" else -1.0
        self._each = each
        self._pool = pool
        self._values: dict[str, float] = {}
        self._images: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, keys: Sequence[str], values: Sequence[float], x: Tensor, y: Tensor) -> None:
        """Add images.

        Args:
            keys: of the B images.
            values: of the metric, one per image; may be infinite.
            x, y: inputs and reconstructions, uint8 (B, C, H, W), on any device.
        """
        fresh = {key: i for i, key in enumerate(keys) if key not in self._values}
        for key, value in zip(keys, values, strict=True):
            self._values.setdefault(key, value)
        wanted = self._wanted([*self._images, *fresh])
        copies = {key: (x[i].cpu().clone(), y[i].cpu().clone()) for key, i in fresh.items() if key in wanted}
        self._images = {key: pair for key, pair in (self._images | copies).items() if key in wanted}

    def merge(self, other: "Gallery") -> None:
        """Add what another process has seen."""
        self._values = other._values | self._values
        together = other._images | self._images
        wanted = self._wanted(together)
        self._images = {key: pair for key, pair in together.items() if key in wanted}

    def examples(self) -> dict[str, list[Example]]:
        """The groups "worst", "median" and "best", each from worse to better; no image is in two of them.

        The median is that of all images; the group has the images of the pool that are nearest to it. If there are
        too few images for three groups, the groups are smaller; a single image is the median.
        """
        n = len(self._values)
        each = min(self._each, max(n // 3, 1))
        ranked = self._ranked(self._images)
        if n < 3:
            groups = {"worst": ranked[: n // 2], "median": ranked[: n % 2], "best": ranked[n - n // 2 :]}
        else:
            worst, best = ranked[:each], ranked[-each:]
            rest = [key for key in sorted(self._images, key=_hash)[: self._pool] if key not in {*worst, *best}]
            groups = {"worst": worst, "median": self._ranked(self._nearest(rest)[:each]), "best": best}
        return {name: [self._example(key) for key in keys] for name, keys in groups.items()}

    def spread(self, n: int) -> list[Example]:
        """The n images whose keys have the smallest hashes, or all if there are fewer: an arbitrary choice."""
        assert n <= self._pool
        return [self._example(key) for key in sorted(self._images, key=_hash)[:n]]

    def _wanted(self, keys: Iterable[str]) -> set[str]:
        ranked = self._ranked(keys)
        return {*ranked[: self._each], *ranked[-self._each :], *sorted(ranked, key=_hash)[: self._pool]}

    def _ranked(self, keys: Iterable[str]) -> list[str]:
        """From worst to best; ties by hash."""
        return sorted(keys, key=lambda key: (self._sign * self._values[key], _hash(key)))

    def _nearest(self, keys: Iterable[str]) -> list[str]:
        """By distance to the median of all values; ties by hash."""
        middle = statistics.median_low(self._values.values())
        distance = {key: 0.0 if self._values[key] == middle else abs(self._values[key] - middle) for key in keys}
        return sorted(distance, key=lambda key: (distance[key], _hash(key)))

    def _example(self, key: str) -> Example:
        return Example(key, self._values[key], *self._images[key])


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
