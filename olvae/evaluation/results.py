"""Hold an evaluation's results, with bootstrap intervals, and put them in words: for metrics.json, tables and page."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from olvae.data.source import MIN_VAL_IMAGES
from olvae.evaluation.protocol import Cost
from olvae.metrics import METRICS

if TYPE_CHECKING:  # observers import this file
    from olvae.evaluation.observers.observer import Observer

INFINITE = "infinite: every image equals its reconstruction to the pixel"  # under ``skipped``: JSON has no infinity

FIXED = ("target", "n", "metrics", "skipped", "intervals", "details", "cost", "weights", "baseline")
"""Names in a row of metrics.json; others are of observers."""

NONE = "-"
MINUS = "\N{MINUS SIGN}"
INFINITY = "\N{INFINITY}"

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
    drawn = _bootstrap(finite(values), samples, seed)
    return None if drawn is None else _interval(drawn[0], level)


def difference(
    a: Mapping[str, float], b: Mapping[str, float], samples: int = 1000
) -> Difference | None:
    """The mean of ``a`` minus that of ``b``, both on the same images in every draw; None as :func:`confidence`.

    This 95 % interval is narrower than those of a and b suggest. If it excludes 0, the two differ by more than the
    choice of images explains.
    """
    pair = finite(a, b)
    drawn = _bootstrap(pair, samples, 0)
    if drawn is None:
        return None
    first, second = pair.mean(-1)
    return Difference(float(first - second), *_interval(drawn[0] - drawn[1], 0.95))


def finite(*rows: Mapping[str, float]) -> NDArray[np.float64]:
    """(targets, n): the values by the order of their keys, without the images that have an infinite one."""
    values = np.array([[row[key] for key in sorted(rows[0])] for row in rows])
    return values[:, np.isfinite(values).all(0)]


def _bootstrap(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64] | None:
    """(targets, n) -> the mean of every draw (targets, samples), or None if there is no interval."""
    n = values.shape[-1]
    if n < 2:
        return None
    rng, rows = np.random.default_rng(seed), max(1, CHUNK // n)
    draws = (
        rng.integers(n, size=(min(rows, samples - done), n)) for done in range(0, samples, rows)
    )
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
    intervals: Mapping[str, tuple[float, float]] = field(
        default_factory=dict
    )  # by metric, 95 % bootstrap over images
    details: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # by metric, weights, subsets, a warning
    cost: Cost | None = None
    observed: Mapping[str, Any] = field(default_factory=dict)  # the observers' entries by name
    baseline: bool = False  # what targets are compared with: bicubic resampling, an untrained model
    per_image: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict
    )  # by metric, values by key
    differences: Mapping[str, Difference] = field(
        default_factory=dict
    )  # by metric, from the first row's images
    weights: str | None = None  # their checksum, by which an export knows its own

    def as_dict(self) -> dict[str, Any]:
        """The row of metrics.json."""
        infinite = {name: INFINITE for name, value in self.metrics.items() if math.isinf(value)}
        return {
            "target": self.target,
            "n": self.n,
            "metrics": {
                name: value for name, value in self.metrics.items() if name not in infinite
            },
            "skipped": {**infinite, **self.skipped},
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "details": {name: details for name, details in self.details.items() if details},
            "cost": asdict(self.cost) if self.cost else None,
            **self.observed,
            **({"weights": self.weights} if self.weights else {}),
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
            {
                str(name): (float(low), float(high))
                for name, (low, high) in (row.get("intervals") or {}).items()
            },
            {str(name): dict(details) for name, details in row.get("details", {}).items()},
            Cost(**row["cost"]) if row.get("cost") else None,
            {name: entry for name, entry in row.items() if name not in FIXED},
            bool(row.get("baseline")),
            weights=row.get("weights"),
        )


@dataclass(frozen=True)
class Results:
    """All numbers of an evaluation under one protocol."""

    protocol: Mapping[str, Any]  # Protocol.as_dict()
    protocol_hash: str  # two results are comparable only if it is the same
    images: Mapping[
        str, Any
    ]  # source, n, sha256 of the pixels, how many were unreadable or enlarged
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
    def read(cls, path: Path, observers: "Sequence[Observer]" = ()) -> "Results":
        """Read a metrics.json that can be shown: its protocol has a name, these observers have words for its entries.

        FileNotFoundError if there is none, ValueError if the file is something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such metrics.json")
        try:
            content = json.loads(path.read_text())
            rows = [Row.from_dict(row) for row in content["results"]]
            protocol, images = dict(content.get("protocol", {})), dict(content.get("images", {}))
            if unnamed := {"name", "version"} - protocol.keys():
                raise KeyError(*unnamed)
            for observer in observers:
                list(observer.lines(rows))
                for row in rows:
                    if (entry := row.observed.get(observer.name)) is not None:
                        observer.columns(entry)
            return cls(protocol, str(content["protocol_hash"]), images, rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a metrics.json: {type(error).__name__} {error}"
            ) from error

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
                raise ValueError(
                    f"{path}: has results of {what}, which are not comparable with these; {anyway}"
                )
            for row in earlier.table:
                marked = f"{row.target} [{what}]" if what else row.target
                names = chain([marked], (f"{marked} ({again})" for again in count(2)))
                name = next(name for name in names if name not in taken)
                taken.add(name)
                added.append(replace(row, target=name))
        return replace(self, earlier=[*self.earlier, *added])

    def warnings(self) -> list[str]:
        """Sentences for the reader."""
        found = [
            str(d["warning"]) for row in self.rows for d in row.details.values() if "warning" in d
        ]
        for row in self.rows:
            if equal := row.details.get("psnr", {}).get("equal_images"):
                found.append(
                    f"{row.target} gives {equal} of {row.n} images back exactly: they are not in its PSNR"
                )
        if few := next((row for row in self.rows if row.n < MIN_VAL_IMAGES), None):
            found.append(f"few images, {few.n}: other ones give other numbers")
        if self.images["unreadable"]:
            found.append(
                f"unreadable images, which are not in these numbers: {self.images['unreadable']}"
            )
        if self.images["enlarged"]:
            found.append(
                f"images smaller than the crop, which were enlarged: {self.images['enlarged']}"
            )
        for name, file in used_weights(self.rows).items():
            if not file["published"]:
                other = f"rests on a {file['file']} that is not the published file"
                found.append(
                    f"{METRICS[name].label} {other}: its values are not comparable with published ones"
                )
        return list(dict.fromkeys(found))

    def not_comparable(self, earlier: "Results") -> str:
        """What differs; empty if they are comparable."""
        if earlier.protocol_hash != self.protocol_hash:
            both = {**self.protocol, **earlier.protocol}
            keys = [
                k for k in both if k != "name" and earlier.protocol.get(k) != self.protocol.get(k)
            ]
            return f"another protocol ({', '.join(keys)})"
        if earlier.images.get("sha256") != self.images["sha256"]:
            return "other images"
        theirs, ours = used_weights(earlier.rows), used_weights(self.rows)
        names = [
            METRICS[n].label
            for n in ours
            if n in theirs and theirs[n].get("sha256") != ours[n]["sha256"]
        ]
        return f"other weights of the networks behind {', '.join(names)}" if names else ""


def used_weights(rows: Iterable[Row]) -> dict[str, Mapping[str, Any]]:
    """By metric, the file of pretrained weights that its values rest on."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        for name, details in row.details.items():
            if name in METRICS and isinstance(details.get("weights"), Mapping):
                found.setdefault(name, details["weights"])
    return found


@dataclass(frozen=True)
class Evaluated:
    """The results under one protocol, and the observers that show more of them; protocols of one pass share those."""

    results: Results
    observers: "Sequence[Observer]" = ()


# Numbers as text


class Cell(NamedTuple):
    """A number as text; its interval in brackets and as ± half its width; a mark: "best", "better", "worse"."""

    text: str
    interval: str = ""
    spread: str = ""
    mark: str = ""


Table = Mapping[
    str, Mapping[str, Cell]
]  # by target, cells by heading; where one lacks another's, a dash is shown


def headings(table: Table) -> list[str]:
    """The columns of a table in order."""
    return list(dict.fromkeys(heading for cells in table.values() for heading in cells))


def texts(rows: Mapping[str, Mapping[str, str]]) -> Table:
    """A table of plain texts."""
    return {
        target: {heading: Cell(text) for heading, text in cells.items()}
        for target, cells in rows.items()
    }


def number(value: float, digits: int) -> str:
    """Format a number with fixed decimals; without any from 1000 on; with an exponent if they would all be 0."""
    if math.isinf(value):
        return INFINITY if value > 0 else f"{MINUS}{INFINITY}"
    if 0.0 < abs(value) < 0.5 * 10.0**-digits:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{digits if abs(value) < 1000 else 0}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def significant(value: float | None) -> str:
    """Three significant digits, without an exponent where that is readable: 0.0312, 71,234, 3.39e+38."""
    if value is None:
        return NONE
    if math.isinf(value):
        return INFINITY
    if value == 0.0 or not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def scores(results: Results) -> Table:
    """Columns of a table: metrics with a value in at least one row."""
    rows = results.table
    names = [name for name in METRICS if any(name in row.metrics for row in rows)]
    best = {name: _best(name, rows) for name in names}

    def cell(row: Row, name: str) -> Cell:
        value, digits = row.metrics.get(name), METRICS[name].digits
        if value is None:
            return Cell(NONE)
        interval = spread = ""
        if ends := row.intervals.get(name):
            interval = f"[{', '.join(number(end, digits) for end in ends)}]"
            spread = (
                f"±{(ends[1] - ends[0]) / 2:.2f}" if name == "psnr" else ""
            )  # the others' would not fit
        return Cell(number(value, digits), interval, spread, "best" if value == best[name] else "")

    return {row.target: {METRICS[name].label: cell(row, name) for name in names} for row in rows}


def _best(name: str, rows: Sequence[Row]) -> float | None:
    """None if no two values differ."""
    values = {row.metrics[name] for row in rows if name in row.metrics}
    if len(values) < 2:
        return None
    return max(values) if METRICS[name].better == "higher" else min(values)


def differences(results: Results) -> Table:
    """Metrics minus those of the first row, which were computed on the same images."""

    def cell(row: Row, name: str) -> Cell:
        found, kind = row.differences[name], METRICS[name]
        value, low, high = (("+" if end > 0 else "") + number(end, kind.digits) for end in found)
        mark = ""
        if not found.low <= 0.0 <= found.high:
            mark = "better" if (found.low > 0.0) == (kind.better == "higher") else "worse"
        return Cell(value, f"[{low}, {high}]", mark=mark)

    rows = {
        row.target: {
            METRICS[name].label: cell(row, name) for name in METRICS if name in row.differences
        }
        for row in results.rows[1:]
    }
    return rows if any(rows.values()) else {}


def meaning(results: Results) -> str:
    """The first row's PSNR in one sentence, in 8-bit steps and beside the best of the others; empty without one."""
    first, *rest = results.rows
    psnr = first.metrics.get("psnr", math.inf)
    if math.isinf(psnr):
        return ""
    text = f"{first.target} misses a pixel's values by about {255 * 10 ** (-psnr / 20):.1f} of 255 (PSNR {psnr:.2f} dB)"
    others = {row.target: row.differences["psnr"] for row in rest if "psnr" in row.differences}
    if others:
        name = max(others, key=lambda target: others[target].value)
        value, low, high = others[name]
        chance = ", which other images may reverse" if low <= 0.0 <= high else ""
        gap = (
            f"{abs(value):.2f} dB {'better' if value > 0 else 'worse'}{chance}"
            if round(value, 2)
            else "as good"
        )
        text += f"; the best of the others is {gap}: {name}"
    return f"{text}."


COSTS: Mapping[str, Callable[[Cost], float | None]] = {
    "M params": lambda cost: cost.parameters / 1e6,
    "GMACs encode": lambda cost: None if cost.encode_macs is None else cost.encode_macs / 1e9,
    "GMACs decode": lambda cost: None if cost.decode_macs is None else cost.decode_macs / 1e9,
    "img/s encode": lambda cost: cost.encode_images_per_s,
    "img/s decode": lambda cost: cost.decode_images_per_s,
    "MiB peak": lambda cost: (
        None if cost.peak_memory_bytes is None else cost.peak_memory_bytes / 2**20
    ),
}


def costs(rows: Iterable[Row]) -> Table:
    """The costs of the rows that have any; without what was not measured, as memory on a CPU."""
    found = {}
    for row in rows:
        if row.cost:
            values = {heading: value(row.cost) for heading, value in COSTS.items()}
            found[row.target] = {
                h: Cell(significant(value)) for h, value in values.items() if value is not None
            }
    return found


def conditions(rows: Sequence[Row]) -> str:
    """What the costs were measured on; earlier results may be from another machine."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.cost:
            found.setdefault(f"{row.cost.device}, batches of {row.cost.batch_size}", []).append(
                row.target
            )
    parts = [
        f"{where} ({', '.join(names)})" if len(found) > 1 else where
        for where, names in found.items()
    ]
    if any(row.cost and row.cost.peak_memory_bytes is not None for row in rows):
        parts.append("memory beyond weights and images")
    return "; ".join(parts)
