"""Hold an evaluation's results: one object behind the tables, the page and metrics.json, and read back from it."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from olvae.data.source import MIN_VAL_IMAGES
from olvae.evaluation.roundtrip import Cost
from olvae.evaluation.statistics import Difference
from olvae.files import write_json
from olvae.metrics.registry import METRICS

INFINITE = "infinite: an image is equal to its reconstruction to the pixel"
"""Where a metric is infinite, metrics.json has this under ``skipped``: JSON has no infinity."""

FIXED = ("target", "n", "metrics", "skipped", "intervals", "details", "cost", "baseline")
"""Keys of a row of metrics.json; the others are observers' entries."""


@dataclass(frozen=True)
class Row:
    """All that is known about one target.

    Args:
        target: its name.
        n: images.
        metrics: values by name; PSNR may be infinite.
        skipped: by metric, why it has no value.
        intervals: by metric, the ends of the 95 % bootstrap interval over images.
        details: by metric, what its value depends on: weights, subsets, a warning.
        cost: parameters, operations, speed and memory.
        observed: the observers' entries by name, as JSON has them.
        baseline: no target, but what targets are compared with: bicubic resampling, an untrained model.
        per_image: by metric, the values by key; not in metrics.json.
        differences: by metric, the value minus the first row's, on the same images; not in metrics.json.
    """

    target: str
    n: int
    metrics: Mapping[str, float]
    skipped: Mapping[str, str] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cost: Cost | None = None
    observed: Mapping[str, Any] = field(default_factory=dict)
    baseline: bool = False
    per_image: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    differences: Mapping[str, Difference] = field(default_factory=dict)

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
        """The inverse of :meth:`as_dict`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: this is not a row of metrics.json.
        """
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
    """All numbers of an evaluation under one protocol.

    Args:
        protocol: :meth:`olvae.evaluation.protocol.Protocol.as_dict`.
        protocol_hash: two results are comparable only if it is the same.
        images: which images: source, n, sha256 of the pixels, how many were unreadable or enlarged.
        rows: one per target.
        earlier: rows of earlier results, added by :meth:`beside`.
    """

    protocol: Mapping[str, Any]
    protocol_hash: str
    images: Mapping[str, Any]
    rows: Sequence[Row]
    earlier: Sequence[Row] = ()

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

    def write(self, path: Path) -> None:
        """Write metrics.json, whole or not at all."""
        write_json(self.as_dict(), path)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a metrics.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such metrics.json")
        try:
            content = json.loads(path.read_text())
            rows = [Row.from_dict(row) for row in content["results"]]
            protocol, images = dict(content.get("protocol", {})), dict(content.get("images", {}))
            return cls(protocol, str(content["protocol_hash"]), images, rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a metrics.json: {type(error).__name__} {error}") from error

    def beside(self, earlier: "Results", mix: bool = False) -> "Results":
        """These results, with the rows of earlier ones below. A name that is taken gets a number.

        Args:
            mix: allow results that are not comparable (another protocol, other images); their rows are marked.

        Raises:
            ValueError: they are not comparable.
        """
        what = self._not_comparable(earlier)
        if what and not mix:
            raise ValueError(
                f"has results of {what}, which are not comparable with these; to show them in one table anyway, set "
                "`mix_protocols`"
            )
        mark = f" [{what}]" if what else ""
        taken = {row.target for row in self.table}
        added = []
        for row in earlier.table:
            name, again = row.target + mark, 2
            while name in taken:
                name, again = f"{row.target}{mark} ({again})", again + 1
            taken.add(name)
            added.append(replace(row, target=name))
        return replace(self, earlier=[*self.earlier, *added])

    def warnings(self) -> list[str]:
        """Sentences for the reader."""
        found = [str(d["warning"]) for row in self.rows for d in row.details.values() if "warning" in d]
        if few := next((row for row in self.rows if row.n < MIN_VAL_IMAGES), None):
            kinds = [(METRICS[name], ends) for name, ends in few.intervals.items()]
            ends = [
                f"{k.label.partition(',')[0]} {low:.{k.digits}f} to {high:.{k.digits}f}" for k, (low, high) in kinds
            ]
            intervals = f"; 95 % bootstrap intervals for {few.target}: {', '.join(ends)}" if ends else ""
            found.append(f"few images, {few.n}: other ones give other numbers{intervals}")
        if self.images["unreadable"]:
            found.append(f"unreadable images, which are not in these numbers: {self.images['unreadable']}")
        if self.images["enlarged"]:
            found.append(f"images smaller than the crop, which were enlarged: {self.images['enlarged']}")
        for name, file in used_weights(self.rows).items():
            if not file["published"]:
                found.append(
                    f"{METRICS[name].label} rests on a {file['file']} that is not the published file: its values "
                    "are not comparable with published ones"
                )
        return list(dict.fromkeys(found))

    def _not_comparable(self, earlier: "Results") -> str:
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
