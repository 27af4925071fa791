"""Turn results into table cells and sentences: numbers with intervals, costs, conditions."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from olvae.evaluation.results import Results, Row
from olvae.metrics import METRICS

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
