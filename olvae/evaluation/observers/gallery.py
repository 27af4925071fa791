"""Observe which images are reconstructed worst, about as usual, and best, and show them."""

import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor

from olvae.evaluation.observers.observer import UNTRAINED, Observation, Observer
from olvae.evaluation.page import Page, side_limit
from olvae.figures import ERROR_RANGE, error_map, labelled_grid
from olvae.files import atomic_write
from olvae.metrics import METRICS

# Images of at least this many pixels a side are ranked by LPIPS, if known; smaller ones by PSNR.
LPIPS_FROM = 32
SHOWN = 8  # images of the figure, chosen by the hash of their keys alone
BESIDE = 4  # of them on the page, side by side


class Example(NamedTuple):
    """One image of a gallery: its value of the metric, and two pictures, uint8 (C, H, W)."""

    key: str
    value: float
    x: Tensor  # the input
    y: Tensor  # its reconstruction


class Ranking:
    """A few images of one target on the CPU, out of all that were added.

    It keeps the values of all images, and the pixels of the worst, the best, and a pool: the images
    whose keys have the smallest hashes. So batches, their order and the number of processes make
    no difference, and a key counts once. A group has ``each`` images; the median one is chosen
    from the pool, which has room for three groups, so that none stays empty.
    """

    def __init__(self, better: Literal["higher", "lower"], each: int = 4, pool: int = 64) -> None:
        assert pool >= 3 * each
        self._sign = 1.0 if better == "higher" else -1.0
        self._each = each
        self._pool = pool
        self._values: dict[str, float] = {}
        self._images: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, keys: Sequence[str], values: Sequence[float], x: Tensor, y: Tensor) -> None:
        """Add images and reconstructions, uint8 (B, C, H, W), with their keys and values.

        Values may be infinite.
        """
        new = {}
        for i, key in enumerate(keys):
            if key not in self._values:
                new[key] = (x[i].cpu().clone(), y[i].cpu().clone())
        self._keep(dict(zip(keys, values, strict=True)), new)

    def merge(self, other: "Ranking") -> None:
        """Add the images of another process."""
        self._keep(other._values, other._images)

    def examples(self) -> dict[str, list[Example]]:
        """The groups "worst", "median" and "best", each from worse to better, without overlap.

        The median is taken over all images; its group has the images of the pool that are nearest
        to it. Fewer than three images are all there.
        """
        # Both ends of the ranking.
        each = min(self._each, len(self._values) // 3)
        ranked = self._ranked(self._images)
        worst = ranked[:each]
        best = ranked[len(ranked) - each :]

        # The images of the pool around the median.
        middle = statistics.median_low(self._values.values())

        def distance(key: str) -> tuple[float, bytes]:
            value = self._values[key]
            # The difference of two infinities would be NaN.
            gap = 0.0 if value == middle else abs(value - middle)
            return gap, _hash(key)

        pool = sorted(ranked, key=_hash)[: self._pool]
        others = [key for key in pool if key not in {*worst, *best}]
        median = self._ranked(sorted(others, key=distance)[: each or 2])
        return {
            "worst": self._with_pixels(worst),
            "median": self._with_pixels(median),
            "best": self._with_pixels(best),
        }

    def arbitrary(self, n: int) -> list[Example]:
        """The n images whose keys have the smallest hashes, or all if there are fewer."""
        assert n <= self._pool
        return self._with_pixels(sorted(self._images, key=_hash)[:n])

    def _keep(
        self, values: Mapping[str, float], images: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        for key, value in values.items():
            self._values.setdefault(key, value)

        # Of all pixels, only the groups' and the pool's stay; what was kept first wins.
        together = {**images, **self._images}
        ranked = self._ranked(together)
        wanted = {
            *ranked[: self._each],
            *ranked[-self._each :],
            *sorted(ranked, key=_hash)[: self._pool],
        }
        self._images = {key: pair for key, pair in together.items() if key in wanted}

    def _ranked(self, keys: Iterable[str]) -> list[str]:
        """From worst to best; ties by hash."""
        return sorted(keys, key=lambda key: (self._sign * self._values[key], _hash(key)))

    def _with_pixels(self, keys: Iterable[str]) -> list[Example]:
        return [Example(key, self._values[key], *self._images[key]) for key in keys]


class Gallery(Observer):
    """The worst, the median and the best images of each target, by LPIPS or PSNR.

    They are shown on the page and as a figure. Latents are drawn as in the first protocol. An
    untrained model is left out.
    """

    name = "gallery"
    title = "Gallery"

    def __init__(self) -> None:
        self.rankings: dict[str, Ranking] = {}  # by target
        self._metric: str | None = None

    def update(self, batch: Observation) -> None:
        # The first batch decides on the metric.
        if self._metric is None:
            for_lpips = batch.x.shape[1] == 3 and min(batch.x.shape[2:]) >= LPIPS_FROM
            if for_lpips and "lpips" in batch.values:
                self._metric = "lpips"
            elif "psnr" in batch.values:
                self._metric = "psnr"
        metric = self._metric
        if metric is None or metric not in batch.values:
            return
        if batch.draw or batch.target == UNTRAINED:
            return

        ranking = self.rankings.setdefault(batch.target, Ranking(METRICS[metric].better))
        values = [batch.values[metric][key] for key in batch.keys]
        x = batch.pixel_range.picture(batch.x)
        y = batch.pixel_range.picture(batch.y)
        ranking.add(batch.keys, values, x, y)

    def state(self) -> Any:
        return self._metric, self.rankings

    def merge(self, state: Any) -> None:
        metric, rankings = state
        self._metric = self._metric or metric
        for target, ranking in rankings.items():
            self.rankings.setdefault(target, ranking).merge(ranking)

    def section(self, page: Page) -> Markup | None:
        if self._metric is None or not self.rankings:
            return None
        # The groups of each target, and a few arbitrary images of all targets side by side.
        groups = {target: ranking.examples() for target, ranking in self.rankings.items()}
        arbitrary = [ranking.arbitrary(BESIDE) for ranking in self.rankings.values()]
        beside = list(zip(*arbitrary, strict=True))

        # The number of pictures on the page limits their size.
        count = len(beside) * (1 + len(groups))
        for named in groups.values():
            count += 3 * sum(map(len, named.values()))
        metric, _, unit = METRICS[self._metric].label.partition(", ")

        def triple(example: Example) -> dict[str, Tensor]:
            error = error_map(example.x[None], example.y[None])[0]
            return {"input": example.x, "reconstruction": example.y, "error": error}

        return page.render(
            "gallery.html",
            groups=groups,
            beside=beside,
            metric=metric,
            unit=unit,
            triple=triple,
            limit=side_limit(count),
            error_range=ERROR_RANGE,
        )

    def write(self, folder: Path, suffix: str) -> Mapping[str, Path]:
        if not self.rankings:
            return {}
        path = folder / f"reconstructions{suffix}.png"
        examples = {name: ranking.arbitrary(SHOWN) for name, ranking in self.rankings.items()}
        first = next(iter(examples.values()))  # all targets have the same inputs
        inputs = torch.stack([example.x for example in first])
        rows = {"input": inputs}
        for target, shown in examples.items():
            images = torch.stack([example.y for example in shown])
            error = f"{target}: error, black 0 to white {ERROR_RANGE} of 255"
            rows[f"{target}: reconstruction"] = images
            rows[error] = error_map(inputs, images)
        with atomic_write(path) as partial:
            labelled_grid(rows).save(partial)
        return {"figure": path}


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
