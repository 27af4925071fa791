"""Format an evaluation's numbers: one way for the terminal, for Markdown and for the page."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from olvae.evaluation.results import Results, Row
from olvae.evaluation.roundtrip import Cost
from olvae.metrics.registry import METRICS

NONE = "-"
MINUS = "\N{MINUS SIGN}"
INFINITY = "\N{INFINITY}"


class Cell(NamedTuple):
    """A number as text; its interval in brackets and as ± half its width; a mark: "best", "better", "worse"."""

    text: str
    interval: str = ""
    spread: str = ""
    mark: str = ""


class Table(NamedTuple):
    """Headings, and by target a row of as many cells."""

    headings: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]


def number(value: float, digits: int) -> str:
    """With a fixed number of decimals; without any from 1000 on; with an exponent if they would all be 0."""
    if math.isinf(value):
        return INFINITY if value > 0 else f"{MINUS}{INFINITY}"
    if 0.0 < abs(value) < 0.5 * 10.0**-digits:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{digits if abs(value) < 1000 else 0}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def signed(value: float, digits: int) -> str:
    """As :func:`number`, with a plus."""
    return ("+" if value > 0 else "") + number(value, digits)


def significant(value: float | None) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value is None:
        return NONE
    if math.isinf(value):
        return INFINITY
    if value == 0.0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def magnitude(value: float) -> str:
    """Of an activation: 71,234, 3.14, or 3.39e+38."""
    return f"{value:.2e}" if value >= 1e9 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def texts(rows: Mapping[str, Mapping[str, str]]) -> Table:
    """A table of texts: by target, its cells by heading; a cell that is missing gets a dash."""
    headings = list(dict.fromkeys(heading for cells in rows.values() for heading in cells))
    return Table(headings, {name: [Cell(cells.get(h, NONE)) for h in headings] for name, cells in rows.items()})


def joined(first: Table, second: Table) -> Table:
    """Two tables side by side, with the targets of the first."""
    blank = [Cell(NONE)] * len(second.headings)
    rows = {name: [*cells, *second.rows.get(name, blank)] for name, cells in first.rows.items()}
    return Table([*first.headings, *second.headings], rows)


def scores(results: Results) -> Table:
    """Metrics with a value in at least one row."""
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
            spread = f"±{(ends[1] - ends[0]) / 2:.2f}" if name == "psnr" else ""  # the others' would not fit
        return Cell(number(value, digits), interval, spread, "best" if value == best[name] else "")

    return Table([METRICS[name].label for name in names], {row.target: [cell(row, n) for n in names] for row in rows})


def differences(results: Results) -> Table:
    """Metrics minus those of the first row, which were computed on the same images."""
    names = [name for name in METRICS if any(name in row.differences for row in results.rows)]

    def cell(row: Row, name: str) -> Cell:
        if (found := row.differences.get(name)) is None:
            return Cell(NONE)
        value, low, high = (signed(end, METRICS[name].digits) for end in found)
        mark = ""
        if not found.low <= 0.0 <= found.high:
            mark = "better" if (found.low > 0.0) == (METRICS[name].better == "higher") else "worse"
        return Cell(value, f"[{low}, {high}]", mark=mark)

    rows = {row.target: [cell(row, name) for name in names] for row in results.rows[1:]}
    return Table([METRICS[name].label for name in names], rows if names else {})


COSTS: Mapping[str, Callable[[Cost], float | None]] = {
    "M params": lambda cost: cost.parameters / 1e6,
    "GMACs encode": lambda cost: cost.encode_macs / 1e9,
    "GMACs decode": lambda cost: cost.decode_macs / 1e9,
    "img/s encode": lambda cost: cost.encode_images_per_s,
    "img/s decode": lambda cost: cost.decode_images_per_s,
    "MiB peak": lambda cost: None if cost.peak_memory_bytes is None else cost.peak_memory_bytes / 2**20,
}


def costs(rows: Sequence[Row]) -> Table:
    """The costs of the rows that have any; without columns that none has, as memory on a CPU."""
    known = {row.target: row.cost for row in rows if row.cost}
    columns = {h: value for h, value in COSTS.items() if any(value(cost) is not None for cost in known.values())}
    cells = {name: [Cell(significant(value(cost))) for value in columns.values()] for name, cost in known.items()}
    return Table(list(columns), cells)


def conditions(rows: Sequence[Row]) -> str:
    """What the costs were measured on; earlier results may be from another machine."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.cost:
            found.setdefault(f"{row.cost.device}, batches of {row.cost.batch_size}", []).append(row.target)
    parts = [f"{where} ({', '.join(names)})" if len(found) > 1 else where for where, names in found.items()]
    if any(row.cost and row.cost.peak_memory_bytes is not None for row in rows):
        parts.append("memory beyond weights and images")
    return "; ".join(parts)


def _best(name: str, rows: Sequence[Row]) -> float | None:
    """None if no two values differ."""
    values = [row.metrics[name] for row in rows if name in row.metrics]
    if len(set(values)) < 2:
        return None
    return max(values) if METRICS[name].better == "higher" else min(values)
