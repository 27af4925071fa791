"""Hold an evaluation's results, with bootstrap intervals; format them for tables and the page."""

import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from olvae.data.source import MIN_VAL_IMAGES
from olvae.evaluation.protocol import Cost
from olvae.metrics import METRICS

# Statistics over images: bootstrap intervals of means and of paired differences.

# Values that the bootstrap draws at a time. It bounds memory.
CHUNK = 1 << 22


class Difference(NamedTuple):
    """Mean difference of two targets on the same images, with its interval."""

    value: float
    low: float
    high: float


def confidence(
    values: Mapping[str, float], level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Return the bootstrap interval of the mean over images; None for fewer than two images.

    ``values`` are by image key, in any order. Images with an infinite value are left out.
    """
    drawn = _bootstrap(finite(values), samples, seed)
    if drawn is None:
        return None
    return _interval(drawn[0], level)


def difference(
    a: Mapping[str, float], b: Mapping[str, float], samples: int = 1000
) -> Difference | None:
    """Return mean(a) - mean(b) with a paired interval; None for fewer than two images.

    Each draw takes the same images for both, so this 95 % interval is narrower than the intervals
    of a and b suggest. If it excludes 0, they differ by more than the choice of images explains.
    """
    pair = finite(a, b)
    drawn = _bootstrap(pair, samples, 0)
    if drawn is None:
        return None
    first, second = pair.mean(-1)
    return Difference(float(first - second), *_interval(drawn[0] - drawn[1], 0.95))


def finite(*rows: Mapping[str, float]) -> NDArray[np.float64]:
    """Return (targets, n): values sorted by key, without images that have an infinite one."""
    keys = sorted(rows[0])
    values = []
    for row in rows:
        values.append([row[key] for key in keys])
    array = np.array(values)
    return array[:, np.isfinite(array).all(0)]


def _bootstrap(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64] | None:
    """Draw images with replacement: (targets, n) -> means (targets, samples); None if n < 2."""
    n = values.shape[-1]
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // n)
    means = []
    for done in range(0, samples, rows):
        indices = rng.integers(n, size=(min(rows, samples - done), n))
        means.append(values[:, indices].mean(-1))
    return np.concatenate(means, axis=-1)


def _interval(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)


# Rows: the numbers of each target, and the contents of metrics.json.

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
    # By metric, the 95 % bootstrap interval over images.
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
    # Source, n, sha256 of the pixels, how many were unreadable or enlarged.
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
            content = json.loads(path.read_text())
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


# Cells: numbers as text, and tables of them.

NONE = "-"
MINUS = "\N{MINUS SIGN}"
INFINITY = "\N{INFINITY}"


class Cell(NamedTuple):
    """A number as text, with its interval in brackets, and as ± half its width.

    The mark is "best", "better" or "worse".
    """

    text: str
    interval: str = ""
    spread: str = ""
    mark: str = ""


# By target, cells by heading. A target that lacks another's heading shows a dash.
Table = Mapping[str, Mapping[str, Cell]]


def headings(table: Table) -> list[str]:
    """Return the columns of a table in order."""
    return list(dict.fromkeys(heading for cells in table.values() for heading in cells))


def texts(rows: Mapping[str, Mapping[str, str]]) -> Table:
    """Make a table of plain texts."""
    table = {}
    for target, cells in rows.items():
        table[target] = {heading: Cell(text) for heading, text in cells.items()}
    return table


def number(value: float, digits: int) -> str:
    """Format a number with fixed decimals, without any from 1000 on.

    It gets an exponent if all its decimals would be 0.
    """
    if math.isinf(value):
        return INFINITY if value > 0 else f"{MINUS}{INFINITY}"
    if 0.0 < abs(value) < 0.5 * 10.0**-digits:
        text = f"{value:.1e}"
    elif abs(value) < 1000:
        text = f"{value:.{digits}f}"
    else:
        text = f"{value:.0f}"
    # Only the sign: an exponent keeps its ASCII minus.
    return text.replace("-", MINUS, 1) if value < 0 else text


def significant(value: float | None) -> str:
    """Format three significant digits, with an exponent if needed: 0.0312, 71,234, 3.39e+38."""
    if value is None:
        return NONE
    if math.isinf(value):
        return INFINITY
    if value == 0.0 or not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def scores(results: Results) -> Table:
    """Make a column for each metric that has a value in at least one row; mark the best values."""
    rows = results.table
    table: dict[str, dict[str, Cell]] = {row.target: {} for row in rows}
    for name, kind in METRICS.items():
        values = {row.metrics[name] for row in rows if name in row.metrics}
        if not values:
            continue

        # Without two different values, none is the best.
        best = None
        if len(values) > 1:
            best = max(values) if kind.better == "higher" else min(values)

        for row in rows:
            value = row.metrics.get(name)
            if value is None:
                table[row.target][kind.label] = Cell(NONE)
                continue
            interval = spread = ""
            ends = row.intervals.get(name)
            if ends:
                low, high = ends
                interval = f"[{number(low, kind.digits)}, {number(high, kind.digits)}]"
                # Only PSNR has room for it on a terminal.
                if name == "psnr":
                    spread = f"±{(high - low) / 2:.2f}"
            mark = "best" if value == best else ""
            cell = Cell(number(value, kind.digits), interval, spread, mark)
            table[row.target][kind.label] = cell
    return table


def differences(results: Results) -> Table:
    """Make a table of metrics minus the first row's, on the same images; empty without any."""
    table = {}
    for row in results.rows[1:]:
        cells = {}
        for name, kind in METRICS.items():
            if name not in row.differences:
                continue
            found = row.differences[name]

            # All three with a sign, also a plus.
            signed = []
            for end in found:
                plus = "+" if end > 0 else ""
                signed.append(plus + number(end, kind.digits))
            value, low, high = signed

            # A mark only if the interval excludes 0.
            mark = ""
            if not found.low <= 0.0 <= found.high:
                is_better = (found.low > 0.0) == (kind.better == "higher")
                mark = "better" if is_better else "worse"
            cells[kind.label] = Cell(value, f"[{low}, {high}]", mark=mark)
        table[row.target] = cells
    return table if any(table.values()) else {}


def meaning(results: Results) -> str:
    """Return one sentence: the first target's PSNR as an 8-bit error, and the best other target.

    Empty if the first target has no finite PSNR.
    """
    first, *rest = results.rows
    psnr = first.metrics.get("psnr", math.inf)
    if math.isinf(psnr):
        return ""
    error = f"{255 * 10 ** (-psnr / 20):.1f} of 255 (PSNR {psnr:.2f} dB)"
    text = f"{first.target} misses a pixel's values by about {error}"

    others = {row.target: row.differences["psnr"] for row in rest if "psnr" in row.differences}
    if not others:
        return f"{text}."
    name = max(others, key=lambda target: others[target].value)
    value, low, high = others[name]
    gap = "as good"
    if round(value, 2):
        gap = f"{abs(value):.2f} dB {'better' if value > 0 else 'worse'}"
        if low <= 0.0 <= high:
            gap += ", which other images may reverse"
    return f"{text}; the best of the others is {gap}: {name}."


# By heading, a field of Cost and the unit that it is shown in.
COSTS = {
    "M params": ("parameters", 1e6),
    "GMACs encode": ("encode_macs", 1e9),
    "GMACs decode": ("decode_macs", 1e9),
    "img/s encode": ("encode_images_per_s", 1.0),
    "img/s decode": ("decode_images_per_s", 1.0),
    "MiB peak": ("peak_memory_bytes", 2.0**20),
}


def costs(rows: Iterable[Row]) -> Table:
    """Make a table of the rows that have costs, without what was not measured (memory on a CPU)."""
    table = {}
    for row in rows:
        if row.cost:
            cells = {}
            for heading, (name, unit) in COSTS.items():
                value = getattr(row.cost, name)
                if value is not None:
                    cells[heading] = Cell(significant(value / unit))
            table[row.target] = cells
    return table


def conditions(rows: Sequence[Row]) -> str:
    """Say what the costs were measured on. Earlier results may be from another machine."""
    found: dict[str, list[str]] = {}
    has_memory = False
    for row in rows:
        if row.cost:
            where = f"{row.cost.device}, batches of {row.cost.batch_size}"
            found.setdefault(where, []).append(row.target)
            if row.cost.peak_memory_bytes is not None:
                has_memory = True

    # Targets are named only where the machines differ.
    parts = list(found)
    if len(found) > 1:
        parts = [f"{where} ({', '.join(names)})" for where, names in found.items()]
    if has_memory:
        parts.append("memory beyond weights and images")
    return "; ".join(parts)
