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
from olvae.evaluation.report import Page, side_limit
from olvae.figures import ERROR_RANGE, error_map, labelled_grid
from olvae.files import atomic_write
from olvae.metrics import METRICS

LPIPS_FROM = 32  # images of at least this many pixels a side are ranked by LPIPS, if it is known; smaller ones by PSNR
SHOWN = 8  # images of the figure, chosen by the hash of their keys alone
BESIDE = 4  # of them on the page, side by side


class Example(NamedTuple):
    """One image of a gallery: its key, its value of the metric, input and reconstruction as uint8 (C, H, W)."""

    key: str
    value: float
    x: Tensor
    y: Tensor


class Ranking:
    """A few images of one target on the CPU, out of all that were added.

    It keeps the values of all images, and the pixels of the worst, the best, and a pool of those whose keys have the
    smallest hashes. So batches, their order and the number of processes make no difference, and a key counts once. A
    group has ``each`` images; the median one is chosen from the pool, at least three groups, so that none stays empty.
    """

    def __init__(self, better: Literal["higher", "lower"], each: int = 4, pool: int = 64) -> None:
        assert pool >= 3 * each
        self._sign = 1.0 if better == "higher" else -1.0
        self._each, self._pool = each, pool
        self._values: dict[str, float] = {}
        self._images: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, keys: Sequence[str], values: Sequence[float], x: Tensor, y: Tensor) -> None:
        """Add images and reconstructions, uint8 (B, C, H, W), with their keys and values, which may be infinite."""
        new = {
            key: (x[i].cpu().clone(), y[i].cpu().clone())
            for i, key in enumerate(keys)
            if key not in self._values
        }
        self._keep(dict(zip(keys, values, strict=True)), new)

    def merge(self, other: "Ranking") -> None:
        """Add those of another process."""
        self._keep(other._values, other._images)

    def examples(self) -> dict[str, list[Example]]:
        """The groups "worst", "median" and "best", each from worse to better; no image is in two of them.

        The median is that of all images; the group has the images of the pool that are nearest to it. Fewer than three
        images are all there.
        """
        each = min(self._each, len(self._values) // 3)
        ranked = self._ranked(self._images)
        worst, best = ranked[:each], ranked[len(ranked) - each :]
        middle = statistics.median_low(self._values.values())

        def distance(key: str) -> tuple[float, bytes]:
            value = self._values[key]
            return 0.0 if value == middle else abs(value - middle), _hash(
                key
            )  # the difference of infinities is NaN

        pool = sorted(ranked, key=_hash)[: self._pool]
        nearest = sorted((key for key in pool if key not in {*worst, *best}), key=distance)
        groups = {"worst": worst, "median": self._ranked(nearest[: each or 2]), "best": best}
        return {name: [self._example(key) for key in keys] for name, keys in groups.items()}

    def arbitrary(self, n: int) -> list[Example]:
        """The n images whose keys have the smallest hashes, or all if there are fewer: an arbitrary choice."""
        assert n <= self._pool
        return [self._example(key) for key in sorted(self._images, key=_hash)[:n]]

    def _keep(
        self, values: Mapping[str, float], images: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        for key, value in values.items():
            self._values.setdefault(key, value)
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

    def _example(self, key: str) -> Example:
        return Example(key, self._values[key], *self._images[key])


class Gallery(Observer):
    """The worst, the median and the best images of each target, by LPIPS or PSNR, on the page and as a figure.

    Latents are drawn as in the first protocol. What an untrained model makes is left out.
    """

    name = "gallery"
    title = "Gallery"

    def __init__(self) -> None:
        self.rankings: dict[str, Ranking] = {}  # by target
        self._metric: str | None = None

    def update(self, batch: Observation) -> None:
        if self._metric is None:
            lpips = batch.x.shape[1] == 3 and min(batch.x.shape[2:]) >= LPIPS_FROM
            self._metric = next(
                (name for name in ["lpips"] * lpips + ["psnr"] if name in batch.values), None
            )
        metric = self._metric
        if (
            metric is not None
            and metric in batch.values
            and not batch.draw
            and batch.target != UNTRAINED
        ):
            ranking = self.rankings.setdefault(batch.target, Ranking(METRICS[metric].better))
            x, y = batch.pixel_range.picture(batch.x), batch.pixel_range.picture(batch.y)
            ranking.add(batch.keys, [batch.values[metric][key] for key in batch.keys], x, y)

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
        groups = {target: ranking.examples() for target, ranking in self.rankings.items()}
        beside = list(
            zip(*(ranking.arbitrary(BESIDE) for ranking in self.rankings.values()), strict=True)
        )
        count = sum(len(examples) for named in groups.values() for examples in named.values())
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
            limit=side_limit(3 * count + len(beside) * (1 + len(groups))),
            error_range=ERROR_RANGE,
        )

    def write(self, folder: Path, suffix: str) -> Mapping[str, Path]:
        if not self.rankings:
            return {}
        path = folder / f"reconstructions{suffix}.png"
        examples = {name: ranking.arbitrary(SHOWN) for name, ranking in self.rankings.items()}
        inputs = torch.stack([example.x for example in next(iter(examples.values()))])
        rows = {"input": inputs}
        for target, shown in examples.items():
            images = torch.stack([example.y for example in shown])
            rows[f"{target}: reconstruction"] = images
            rows[f"{target}: error, black 0 to white {ERROR_RANGE} of 255"] = error_map(
                inputs, images
            )
        with atomic_write(path) as partial:
            labelled_grid(rows).save(partial)
        return {"figure": path}


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
