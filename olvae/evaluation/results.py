"""Hold an evaluation's results: a row for each target, and metrics.json."""

import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from olvae.data.source import MIN_VAL_IMAGES
from olvae.evaluation.round_trip import Cost
from olvae.evaluation.statistics import Difference
from olvae.metrics import METRICS

# A reason under ``skipped``: JSON has no infinity.
INFINITE = "infinite: every image equals its reconstruction to the pixel"

# Names of a row's fields in metrics.json. All other names are entries of observers.
FIXED = ("target", "n", "metrics", "skipped", "intervals", "details", "cost", "weights", "baseline")


@dataclass(frozen=True)
class Row:
    """Everything known about one target. metrics.json lacks ``per_image`` and ``differences``."""

    target: str
    n: int  # number of images
    metrics: Mapping[str, float]  # PSNR may be infinite
    skipped: Mapping[str, str] = field(default_factory=dict)  # by metric, why it has no value
    # By metric, the 95 % bootstrap interval over images or, where they have some, over groups.
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    # By metric: pretrained weights, subsets, a warning.
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cost: Cost | None = None
    observed: Mapping[str, Any] = field(default_factory=dict)  # entries by the observer's name
    baseline: bool = False  # something to compare targets with: bicubic, an untrained model
    # By metric, values by image key.
    per_image: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # By metric, this row minus the first row, on the same images.
    differences: Mapping[str, Difference] = field(default_factory=dict)
    weights: str | None = None  # checksum of the model's weights: an export finds its rows by it

    def as_dict(self) -> dict[str, Any]:
        """Return the row of metrics.json."""
        infinite = {name: INFINITE for name, value in self.metrics.items() if math.isinf(value)}
        metrics = {name: self.metrics[name] for name in self.metrics if name not in infinite}

        # The order of fields is the order in the file; the last two are written only if set.
        row: dict[str, Any] = {
            "target": self.target,
            "n": self.n,
            "metrics": metrics,
            "skipped": {**infinite, **self.skipped},
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "details": {name: details for name, details in self.details.items() if details},
            "cost": asdict(self.cost) if self.cost else None,
            **self.observed,
        }
        if self.weights:
            row["weights"] = self.weights
        if self.baseline:
            row["baseline"] = True
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Row":
        """Read a row of metrics.json, the inverse of :meth:`as_dict`.

        ValueError, KeyError, TypeError or AttributeError if it is something else.
        """
        # Metrics: finite values, and the infinite ones that ``skipped`` names.
        metrics = {name: float(value) for name, value in row["metrics"].items()}
        if not all(map(math.isfinite, metrics.values())):
            raise ValueError("it has metrics that are not finite")
        skipped = {}
        for name, reason in row.get("skipped", {}).items():
            if reason == INFINITE:
                metrics[name] = math.inf
            else:
                skipped[name] = str(reason)

        # All other fields may be absent, but for the target and the number of images.
        target = str(row["target"])
        n = int(row["n"])
        intervals = {}
        for name, (low, high) in (row.get("intervals") or {}).items():
            intervals[name] = (float(low), float(high))
        details = {name: dict(found) for name, found in row.get("details", {}).items()}
        cost = row.get("cost")
        return cls(
            target,
            n,
            metrics,
            skipped,
            intervals,
            details,
            Cost(**cost) if cost else None,
            {name: entry for name, entry in row.items() if name not in FIXED},
            bool(row.get("baseline")),
            weights=row.get("weights"),
        )


class Wording(typing.Protocol):
    """How an observer puts its entries into words: what :meth:`Results.read` needs of it."""

    name: str

    def columns(self, entry: Any) -> Mapping[str, str]: ...

    def lines(self, rows: Sequence[Row]) -> Iterator[str]: ...


@dataclass(frozen=True)
class Results:
    """All numbers of an evaluation under one protocol."""

    protocol: Mapping[str, Any]  # as_dict() of evaluation.protocol.Protocol
    protocol_hash: str  # two results are comparable only if it is the same
    # Source, n, groups if they have some, sha256 of the pixels, how many unreadable or enlarged.
    images: Mapping[str, Any]
    rows: Sequence[Row]
    earlier: Sequence[Row] = ()  # rows of earlier results, added by beside()

    @property
    def table(self) -> list[Row]:
        """All rows: new ones, earlier ones, and the baselines of both last."""
        return sorted([*self.rows, *self.earlier], key=lambda row: row.baseline)

    def as_dict(self) -> dict[str, Any]:
        """Return the contents of metrics.json."""
        return {
            "protocol": self.protocol,
            "protocol_hash": self.protocol_hash,
            "images": self.images,
            "results": [row.as_dict() for row in self.table],
        }

    @classmethod
    def read(cls, path: Path, observers: Sequence[Wording] = ()) -> "Results":
        """Read a metrics.json; its protocol has a name, and these observers can show its entries.

        FileNotFoundError if it is missing, ValueError if the file is something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such metrics.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row.from_dict(row) for row in content["results"]]
            protocol = dict(content.get("protocol", {}))
            images = dict(content.get("images", {}))
            unnamed = {"name", "version"} - protocol.keys()
            if unnamed:
                raise KeyError(*unnamed)

            # Put every entry into words: what fails must fail here, not after an evaluation.
            for observer in observers:
                list(observer.lines(rows))
                for row in rows:
                    entry = row.observed.get(observer.name)
                    if entry is not None:
                        observer.columns(entry)
            return cls(protocol, str(content["protocol_hash"]), images, rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            kind = type(error).__name__
            raise ValueError(f"{path}: not a metrics.json: {kind} {error}") from error

    def beside(self, files: Mapping[Path, "Results"], mix: bool = False) -> "Results":
        """Add the rows of earlier results, by file. A row whose name is taken gets a number.

        Results of another protocol or of other images raise ValueError; with ``mix`` their rows
        are added with the reason in their names.
        """
        taken = {row.target for row in self.table}
        added = []
        for path, earlier in files.items():
            what = self.not_comparable(earlier)
            if what and not mix:
                anyway = "to show them in one table anyway, set `mix_protocols`"
                raise ValueError(
                    f"{path}: has results of {what}, which are not comparable with these; {anyway}"
                )
            for row in earlier.table:
                marked = f"{row.target} [{what}]" if what else row.target
                name = marked
                count = 1
                while name in taken:
                    count += 1
                    name = f"{marked} ({count})"
                taken.add(name)
                added.append(replace(row, target=name))
        return replace(self, earlier=[*self.earlier, *added])

    def warnings(self) -> list[str]:
        """Return sentences that limit what the numbers mean, each once."""
        # Warnings of metrics, and images that have no PSNR.
        found = []
        for row in self.rows:
            for details in row.details.values():
                if "warning" in details:
                    found.append(str(details["warning"]))
        for row in self.rows:
            equal = row.details.get("psnr", {}).get("equal_images")
            if equal:
                images = f"{equal} of {row.n} images"
                found.append(f"{row.target} gives {images} back exactly: they are not in its PSNR")

        # The images: too few, unreadable, enlarged.
        few = [row.n for row in self.rows if row.n < MIN_VAL_IMAGES]
        if few:
            found.append(f"few images, {few[0]}: other ones give other numbers")
        groups = self.images.get("groups")
        if groups is not None and groups < MIN_VAL_IMAGES:
            found.append(
                f"few groups, {groups}: intervals over so few are too narrow; of one there are none"
            )
        unreadable = self.images["unreadable"]
        if unreadable:
            found.append(f"unreadable images, which are not in these numbers: {unreadable}")
        enlarged = self.images["enlarged"]
        if enlarged:
            found.append(f"images smaller than the crop, which were enlarged: {enlarged}")

        # The networks behind the metrics.
        for name, file in used_weights(self.rows).items():
            if not file["published"]:
                rests = f"{METRICS[name].label} rests on a {file['file']}"
                found.append(
                    f"{rests} that is not the published file: its values are not comparable with "
                    "published ones"
                )
        return list(dict.fromkeys(found))

    def not_comparable(self, earlier: "Results") -> str:
        """Say what differs from earlier results; empty if they are comparable."""
        if earlier.protocol_hash != self.protocol_hash:
            keys = []
            for key in {**self.protocol, **earlier.protocol}:
                if key != "name" and earlier.protocol.get(key) != self.protocol.get(key):
                    keys.append(key)
            return f"another protocol ({', '.join(keys)})"
        if earlier.images.get("sha256") != self.images["sha256"]:
            return "other images"
        theirs = used_weights(earlier.rows)
        labels = []
        for name, file in used_weights(self.rows).items():
            if name in theirs and theirs[name].get("sha256") != file["sha256"]:
                labels.append(METRICS[name].label)
        return f"other weights of the networks behind {', '.join(labels)}" if labels else ""


def used_weights(rows: Iterable[Row]) -> dict[str, Mapping[str, Any]]:
    """Return, by metric, the file of pretrained weights that its values rest on."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        for name, details in row.details.items():
            if name in METRICS and isinstance(details.get("weights"), Mapping):
                found.setdefault(name, details["weights"])
    return found
