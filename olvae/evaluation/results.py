"""Hold an evaluation's results, with bootstrap intervals: what tables, page and metrics.json show."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from olvae.data.source import MIN_VAL_IMAGES
from olvae.evaluation.roundtrip import Cost
from olvae.metrics import METRICS

INFINITE = "infinite: every image equals its reconstruction to the pixel"  # under ``skipped``: JSON has no infinity

FIXED = ("target", "n", "metrics", "skipped", "intervals", "details", "cost", "baseline")  # others are of observers

CHUNK = 1 << 22  # values that the bootstrap draws at a time; it bounds memory


class Difference(NamedTuple):
    """One target's value minus another's on the same images, and its interval."""

    value: float
    low: float
    high: float


def confidence(
    values: Mapping[str, float], level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """The interval that holds the mean in ``level`` of all draws of as many images, with replacement.

    ``values`` are by the images' keys, in any order; infinite ones are left out. None for one image.
    """
    drawn = _bootstrap(_finite(values), samples, seed)
    return None if drawn is None else _interval(drawn[0], level)


def difference(
    a: Mapping[str, float], b: Mapping[str, float], level: float = 0.95, samples: int = 1000, seed: int = 0
) -> Difference | None:
    """The mean of ``a`` minus that of ``b``, both on the same images in every draw; None as :func:`confidence`.

    The paired interval is narrower than those of a and b suggest. If it excludes 0, the two differ by more than the
    choice of images explains.
    """
    pair = _finite(a, b)
    drawn = _bootstrap(pair, samples, seed)
    if drawn is None:
        return None
    first, second = pair.mean(-1)
    return Difference(float(first - second), *_interval(drawn[0] - drawn[1], level))


def _finite(*rows: Mapping[str, float]) -> NDArray[np.float64]:
    """(targets, n): the values by the order of their keys, without the images that have an infinite one."""
    values = np.array([[row[key] for key in sorted(rows[0])] for row in rows])
    return values[:, np.isfinite(values).all(0)]


def _bootstrap(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64] | None:
    """(targets, n) -> the mean of every draw (targets, samples), or None if there is no interval."""
    n = values.shape[-1]
    if n < 2:
        return None
    rng, rows = np.random.default_rng(seed), max(1, CHUNK // n)
    draws = (rng.integers(n, size=(min(rows, samples - done), n)) for done in range(0, samples, rows))
    return np.concatenate([values[:, indices].mean(-1) for indices in draws], axis=-1)


def _interval(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)


@dataclass(frozen=True)
class Row:
    """All that is known about one target; the last two are not in metrics.json."""

    target: str
    n: int  # images
    metrics: Mapping[str, float]  # PSNR may be infinite
    skipped: Mapping[str, str] = field(default_factory=dict)  # by metric, why it has no value
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # by metric, 95 % bootstrap over images
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by metric, weights, subsets, a warning
    cost: Cost | None = None
    observed: Mapping[str, Any] = field(default_factory=dict)  # the observers' entries by name
    baseline: bool = False  # what targets are compared with: bicubic resampling, an untrained model
    per_image: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by metric, values by key
    differences: Mapping[str, Difference] = field(default_factory=dict)  # by metric, from the first row's images

    def as_dict(self) -> dict[str, Any]:
        """The row of metrics.json."""
        infinite = {name: INFINITE for name, value in self.metrics.items() if math.isinf(value)}
        return {
            "target": self.target,
            "n": self.n,
            "metrics": {name: value for name, value in self.metrics.items() if name not in infinite},
            "skipped": {**infinite, **self.skipped},
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "details": {name: details for name, details in self.details.items() if details},
            "cost": asdict(self.cost) if self.cost else None,
            **self.observed,
            **({"baseline": True} if self.baseline else {}),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Row":
        """The inverse of :meth:`as_dict`; ValueError, KeyError, TypeError or AttributeError if it is something else."""
        metrics = {str(name): float(value) for name, value in row["metrics"].items()}
        if not all(math.isfinite(value) for value in metrics.values()):
            raise ValueError("it has metrics that are not finite")
        skipped = {str(name): str(reason) for name, reason in row.get("skipped", {}).items()}
        return cls(
            str(row["target"]),
            int(row["n"]),
            metrics | {name: math.inf for name, reason in skipped.items() if reason == INFINITE},
            {name: reason for name, reason in skipped.items() if reason != INFINITE},
            {str(name): (float(low), float(high)) for name, (low, high) in (row.get("intervals") or {}).items()},
            {str(name): dict(details) for name, details in row.get("details", {}).items()},
            Cost(**row["cost"]) if row.get("cost") else None,
            {name: entry for name, entry in row.items() if name not in FIXED},
            bool(row.get("baseline")),
        )


@dataclass(frozen=True)
class Results:
    """All numbers of an evaluation under one protocol."""

    protocol: Mapping[str, Any]  # Protocol.as_dict()
    protocol_hash: str  # two results are comparable only if it is the same
    images: Mapping[str, Any]  # source, n, sha256 of the pixels, how many were unreadable or enlarged
    rows: Sequence[Row]
    earlier: Sequence[Row] = ()  # rows of earlier results, added by beside()

    @property
    def table(self) -> list[Row]:
        """All rows: the new ones, the earlier ones, and the baselines of both."""
        return sorted([*self.rows, *self.earlier], key=lambda row: row.baseline)

    def as_dict(self) -> dict[str, Any]:
        """The contents of metrics.json."""
        return {
            "protocol": self.protocol,
            "protocol_hash": self.protocol_hash,
            "images": self.images,
            "results": [row.as_dict() for row in self.table],
        }

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a metrics.json; FileNotFoundError if there is none, ValueError if the file is something else."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such metrics.json")
        try:
            content = json.loads(path.read_text())
            rows = [Row.from_dict(row) for row in content["results"]]
            protocol, images = dict(content.get("protocol", {})), dict(content.get("images", {}))
            return cls(protocol, str(content["protocol_hash"]), images, rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a metrics.json: {type(error).__name__} {error}") from error

    def beside(self, files: Mapping[Path, "Results"], mix: bool = False) -> "Results":
        """These results, with the rows of earlier ones below, by file. A name that is taken gets a number.

        Those that are not comparable, of another protocol or other images, are marked with ``mix``, else ValueError.
        """
        taken = {row.target for row in self.table}
        added = []
        for path, earlier in files.items():
            what = self.not_comparable(earlier)
            if what and not mix:
                anyway = "to show them in one table anyway, set `mix_protocols`"
                raise ValueError(f"{path}: has results of {what}, which are not comparable with these; {anyway}")
            for row in earlier.table:
                marked = f"{row.target} [{what}]" if what else row.target
                names = chain([marked], (f"{marked} ({again})" for again in count(2)))
                name = next(name for name in names if name not in taken)
                taken.add(name)
                added.append(replace(row, target=name))
        return replace(self, earlier=[*self.earlier, *added])

    def warnings(self) -> list[str]:
        """Sentences for the reader."""
        found = [str(d["warning"]) for row in self.rows for d in row.details.values() if "warning" in d]
        for row in self.rows:
            if equal := row.details.get("psnr", {}).get("equal_images"):
                found.append(f"{row.target} gives {equal} of {row.n} images back exactly: they are not in its PSNR")
        if few := next((row for row in self.rows if row.n < MIN_VAL_IMAGES), None):
            found.append(f"few images, {few.n}: other ones give other numbers")
        if self.images["unreadable"]:
            found.append(f"unreadable images, which are not in these numbers: {self.images['unreadable']}")
        if self.images["enlarged"]:
            found.append(f"images smaller than the crop, which were enlarged: {self.images['enlarged']}")
        for name, file in used_weights(self.rows).items():
            if not file["published"]:
                other = f"rests on a {file['file']} that is not the published file"
                found.append(f"{METRICS[name].label} {other}: its values are not comparable with published ones")
        return list(dict.fromkeys(found))

    def not_comparable(self, earlier: "Results") -> str:
        """What differs; empty if they are comparable."""
        if earlier.protocol_hash != self.protocol_hash:
            return "another protocol"
        if earlier.images.get("sha256") != self.images["sha256"]:
            return "other images"
        theirs, ours = used_weights(earlier.rows), used_weights(self.rows)
        names = [METRICS[n].label for n in ours if n in theirs and theirs[n].get("sha256") != ours[n]["sha256"]]
        return f"other weights of the networks behind {', '.join(names)}" if names else ""


def used_weights(rows: Iterable[Row]) -> dict[str, Mapping[str, Any]]:
    """By metric, the file of pretrained weights that its values rest on."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        for name, details in row.details.items():
            if name in METRICS and isinstance(details.get("weights"), Mapping):
                found.setdefault(name, details["weights"])
    return found
