"""What is known after an evaluation, and what it leaves behind: metrics.json, a figure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from olvae.evaluation.protocol import Protocol
from olvae.evaluation.roundtrip import Cost
from olvae.figures import error_map, labelled_grid
from olvae.files import atomic_write
from olvae.metrics.registry import METRICS

__all__ = [
    "EQUAL",
    "Earlier",
    "Evaluation",
    "Result",
    "read_earlier",
    "used_weights",
    "write_figure",
    "write_metrics",
]


@dataclass(frozen=True)
class Result:
    """The metrics of one contender under one protocol.

    Args:
        target: the contender's name.
        n: images.
        metrics: values by name.
        skipped: for those that could not be had, the reason.
        details: by metric, what its number rests on.
        per_image: by metric, the images' values by key.
    """

    target: str
    n: int
    metrics: dict[str, float]
    skipped: dict[str, str]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_image: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All that is known after a pass, under one protocol.

    Args:
        images: which ones they were: source, n, sha256 of the pixels, and how many could not be read or were enlarged.
        results: in the order of the targets.
        costs: by target, where there are any.
        intervals: by target and metric, the ends of the 95 % bootstrap interval of the mean over images.
        extras: by target, what else its row in metrics.json has: errors per wavelet band, test patterns.
        before: rows of earlier results, as metrics.json has them.
    """

    protocol: Protocol
    images: dict[str, Any]
    results: Sequence[Result]
    costs: Mapping[str, Cost] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    before: Sequence[dict[str, Any]] = ()

    def with_rows(self, before: Sequence[dict[str, Any]]) -> "Evaluation":
        """The same with rows of earlier results; those whose names are taken are counted."""
        taken = {result.target for result in self.results}
        rows = []
        for row in before:
            name, again = row["target"], 2
            while name in taken:
                name, again = f"{row['target']} ({again})", again + 1
            taken.add(name)
            rows.append({**row, "target": name})
        return replace(self, before=rows)

    def as_dict(self) -> dict[str, Any]:
        """The contents of metrics.json."""
        return {
            "protocol": self.protocol.as_dict(),
            "protocol_hash": self.protocol.hash(),
            "images": self.images,
            "results": [*(self._row(result) for result in self.results), *self.before],
        }

    def warnings(self) -> list[str]:
        """Sentences for the reader."""
        found = [str(d["warning"]) for result in self.results for d in result.details.values() if "warning" in d]
        if self.images["unreadable"]:
            found.append(f"unreadable images, which are not in these numbers: {self.images['unreadable']}")
        if self.images["enlarged"]:
            found.append(f"images smaller than the crop, which were enlarged: {self.images['enlarged']}")
        for name, file in used_weights(result.details for result in self.results).items():
            if not file["published"]:
                found.append(
                    f"{METRICS[name].label} rests on a {file['file']} that is not the published file: it compares with "
                    "no one else's"
                )
        return list(dict.fromkeys(found))

    def _row(self, result: Result) -> dict[str, Any]:
        cost = self.costs.get(result.target)
        return {
            "target": result.target,
            "n": result.n,
            "metrics": result.metrics,
            "skipped": result.skipped,
            "intervals": {name: list(ends) for name, ends in self.intervals.get(result.target, {}).items()},
            "details": {name: details for name, details in result.details.items() if details},
            "cost": cost.as_dict() if cost else None,
            **self.extras.get(result.target, {}),
        }


@dataclass(frozen=True)
class Earlier:
    """The results of an earlier metrics.json."""

    path: Path
    protocol_hash: str
    images: str | None
    rows: list[dict[str, Any]]

    def beside(self, evaluation: Evaluation, mix: bool) -> list[dict[str, Any]]:
        """Its rows, to stand in one table with these results.

        Args:
            mix: whether results of another protocol or other images may; they are marked then.

        Raises:
            ValueError: they do not compare.
        """
        what = ""
        if self.protocol_hash != evaluation.protocol.hash():
            what = "another protocol"
        elif self.images != evaluation.images["sha256"]:
            what = "other images"
        elif names := self._other_networks(evaluation):
            what = f"other weights of the networks behind {', '.join(names)}"
        if not what:
            return self.rows
        if not mix:
            raise ValueError(
                f"{self.path}: has results of {what}, which do not compare with these; to put them into one table "
                "all the same, add --mix-protocols"
            )
        return [{**row, "target": f"{row['target']} [{what}]"} for row in self.rows]

    def _other_networks(self, evaluation: Evaluation) -> list[str]:
        theirs = used_weights(row.get("details", {}) for row in self.rows)
        ours = used_weights(result.details for result in evaluation.results)
        return [METRICS[n].label for n in ours if n in theirs and theirs[n].get("sha256") != ours[n]["sha256"]]


def read_earlier(path: Path) -> Earlier:
    """Read a metrics.json.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such metrics.json")
    try:
        content = json.loads(path.read_text())
        rows = [
            {
                **row,
                "target": str(row["target"]),
                "n": int(row["n"]),
                "metrics": {str(name): float(value) for name, value in row["metrics"].items()},
                "skipped": {str(name): str(reason) for name, reason in row.get("skipped", {}).items()},
                "cost": Cost(**row["cost"]).as_dict() if row.get("cost") else None,
            }
            for row in content["results"]
        ]
        if not all(math.isfinite(value) for row in rows for value in row["metrics"].values()):
            raise ValueError("it has metrics that are not finite")
        return Earlier(path, str(content["protocol_hash"]), content.get("images", {}).get("sha256"), rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a metrics.json: {type(error).__name__} {error}") from error


def used_weights(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """From the details of several targets' metrics: by metric, which file of weights its numbers rest on."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        for name, details in row.items():
            if name in METRICS and isinstance(details, Mapping) and isinstance(details.get("weights"), Mapping):
                found.setdefault(name, details["weights"])
    return found


def write_metrics(evaluation: Evaluation, path: Path) -> None:
    """metrics.json, whole or not at all."""
    content = evaluation.as_dict()
    assert all(math.isfinite(value) for row in content["results"] for value in row["metrics"].values())
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def write_figure(inputs: Tensor, reconstructions: Mapping[str, Tensor], path: Path) -> None:
    """Inputs, then each target's reconstructions and errors.

    Args:
        inputs: uint8 (N, 3, H, W).
        reconstructions: the same images by each target.
    """
    rows = {"input, held out": inputs}
    for target, images in reconstructions.items():
        rows[f"{target}: reconstruction"] = images
        rows[f"{target}: error, black 0 to white 64 of 255"] = error_map(inputs, images)
    labelled_grid(rows).save(path)


EQUAL = "infinite: an image is equal to its reconstruction to the pixel"
