"""What an evaluation leaves behind: a table, metrics.json, a figure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from olvae.evaluation.cost import Cost
from olvae.evaluation.evaluator import EQUAL, Result
from olvae.evaluation.protocol import Protocol
from olvae.figures import error_map, labelled_grid
from olvae.files import whole
from olvae.metrics.registry import METRICS

__all__ = [
    "Earlier",
    "Evaluation",
    "print_evaluations",
    "read_earlier",
    "used_weights",
    "write_figure",
    "write_metrics",
]


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
            found.append(f"{self.images['unreadable']} images could not be read and are not in these numbers")
        if self.images["enlarged"]:
            found.append(f"{self.images['enlarged']} images are smaller than the crop and were enlarged")
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


def print_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """A table for each protocol, one of costs, and what is missing and why, to standard error."""
    console = Console(stderr=True)
    missing: dict[str, list[str]] = {}
    notes: dict[str, None] = {}
    for evaluation in evaluations:
        rows = evaluation.as_dict()["results"]
        console.print(_quality(rows, evaluation.protocol))
        for row in rows:
            for name, reason in row["skipped"].items():
                label = METRICS[name].label if name in METRICS else name
                if not _is_equal(row, name) and label not in missing.setdefault(reason, []):
                    missing[reason].append(label)
        notes |= dict.fromkeys(evaluation.warnings())
    if evaluations[0].costs:
        console.print(_costs(evaluations[0].costs))
    lines = [f"skipped {', '.join(labels)}: {reason}" for reason, labels in missing.items() if labels]
    for line in (*lines, *(f"note: {note}" for note in notes)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _quality(rows: Sequence[Mapping[str, Any]], protocol: Protocol) -> Table:
    names = [name for name in METRICS if any(name in row["metrics"] or _is_equal(row, name) for row in rows)]
    counts = {row["n"] for row in rows}
    number = f", {rows[0]['n']} images" if len(counts) == 1 else ""
    table = _table(f"protocol {protocol.name} {protocol.hash()}, {protocol.size}x{protocol.size}{number}")
    for heading in (*([] if number else ["images"]), *(METRICS[name].label.replace(" ", "\n") for name in names)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row["target"]), *([] if number else [str(row["n"])]), *(_cell(row, name) for name in names)
        )
    return table


def _table(title: str) -> Table:
    """Whose numbers stay whole where it is narrow: names are folded instead."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("target", overflow="fold", min_width=8)
    return table


def _cell(row: Mapping[str, Any], name: str) -> str:
    if _is_equal(row, name):
        return "∞"
    if name not in row["metrics"]:
        return "-"
    value = row["metrics"][name]
    ends = row.get("intervals", {}).get(name)
    text = f"{value:.{METRICS[name].digits}f}" if abs(value) < 1000 else f"{value:.0f}"
    return text if ends is None or name != "psnr" else f"{text} ±{(ends[1] - ends[0]) / 2:.2f}"


def _is_equal(row: Mapping[str, Any], name: str) -> bool:
    return bool(row.get("skipped", {}).get(name) == EQUAL)


def _costs(costs: Mapping[str, Cost]) -> Table:
    first = next(iter(costs.values()))
    table = _table(f"cost: {first.device}, batches of {first.batch_size}; memory beyond weights and images")
    for heading in ("M params", "GMACs\nencode", "GMACs\ndecode", "img/s\nencode", "img/s\ndecode", "MiB\npeak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cost in costs.items():
        table.add_row(
            escape(name),
            f"{cost.parameters / 1e6:.2f}",
            f"{cost.encode_macs / 1e9:.2f}",
            f"{cost.decode_macs / 1e9:.2f}",
            *(f"{rate:.1f}" if rate else "-" for rate in (cost.encode_images_per_s, cost.decode_images_per_s)),
            "-" if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 2**20:.0f}",
        )
    return table


def write_metrics(evaluation: Evaluation, path: Path) -> None:
    """metrics.json, whole or not at all."""
    content = evaluation.as_dict()
    assert all(math.isfinite(value) for row in content["results"] for value in row["metrics"].values())
    with whole(path) as partial:
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
