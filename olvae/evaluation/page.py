"""Format an evaluation's numbers for terminal, Markdown and page alike, and render the page's HTML."""

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from olvae.evaluation.results import Results, Row
from olvae.evaluation.roundtrip import Cost
from olvae.figures import rgb
from olvae.metrics import METRICS

NONE = "-"
MINUS = "\N{MINUS SIGN}"
INFINITY = "\N{INFINITY}"
ARROWS = {"higher": "\N{NO-BREAK SPACE}↑", "lower": "\N{NO-BREAK SPACE}↓"}

SIDES = (96, 256)  # the longest side of a photograph, in pixels: as small as it may become, and at most


class Cell(NamedTuple):
    """A number as text; its interval in brackets and as ± half its width; a mark: "best", "better", "worse"."""

    text: str
    interval: str = ""
    spread: str = ""
    mark: str = ""


Table = Mapping[str, Mapping[str, Cell]]  # by target, cells by heading; where one lacks another's, a dash is shown


def headings(table: Table) -> list[str]:
    """The columns of a table in order."""
    return list(dict.fromkeys(heading for cells in table.values() for heading in cells))


def texts(rows: Mapping[str, Mapping[str, str]]) -> Table:
    """A table of plain texts."""
    return {target: {heading: Cell(text) for heading, text in cells.items()} for target, cells in rows.items()}


def number(value: float, digits: int) -> str:
    """With a fixed number of decimals; without any from 1000 on; with an exponent if they would all be 0."""
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
        row.target: {METRICS[name].label: cell(row, name) for name in METRICS if name in row.differences}
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
        gap = f"{abs(value):.2f} dB {'better' if value > 0 else 'worse'}{chance}" if round(value, 2) else "as good"
        text += f"; the best of the others is {gap}: {name}"
    return f"{text}."


COSTS: Mapping[str, Callable[[Cost], float | None]] = {
    "M params": lambda cost: cost.parameters / 1e6,
    "GMACs encode": lambda cost: cost.encode_macs / 1e9,
    "GMACs decode": lambda cost: cost.decode_macs / 1e9,
    "img/s encode": lambda cost: cost.encode_images_per_s,
    "img/s decode": lambda cost: cost.decode_images_per_s,
    "MiB peak": lambda cost: None if cost.peak_memory_bytes is None else cost.peak_memory_bytes / 2**20,
}


def costs(rows: Iterable[Row]) -> Table:
    """The costs of the rows that have any; without what was not measured, as memory on a CPU."""
    found = {}
    for row in rows:
        if row.cost:
            values = {heading: value(row.cost) for heading, value in COSTS.items()}
            found[row.target] = {h: Cell(significant(value)) for h, value in values.items() if value is not None}
    return found


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


class Page:
    """Results on their way to the page: renders what observers show of them, in templates of the package."""

    def __init__(self, results: Results) -> None:
        self.results = results
        # Seven colours of the style sheet, for badges and bars.
        self.colours = {row.target: i % 7 + 1 for i, row in enumerate(results.table)}
        self._letters = {row.target: ascii_uppercase[i : i + 1] or str(i + 1) for i, row in enumerate(results.table)}
        self._environment = Environment(
            loader=PackageLoader("olvae.evaluation", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(significant=significant, breakable=breakable)
        self._environment.globals.update(
            results=results,
            colours=self.colours,
            arrows={kind.label: ARROWS[kind.better] for kind in METRICS.values()},
            dash=Cell(NONE),
            headings=headings,
            mark=self.mark,
            picture=picture,
            table=self.table,
        )

    def render(self, template: str, **values: Any) -> Markup:
        """Fill in one of the package's templates; values are escaped, but for Markup."""
        return Markup(self._environment.get_template(template).render(**values))

    def table(self, table: Table, label: str, caption: str = "") -> Markup:
        """A table with a row per target, or nothing if it has no rows."""
        return self.render("table.html", content=table, label=label, caption=caption) if table else Markup()

    def mark(self, target: str) -> Markup:
        """A target's letter in its colour."""
        return Markup('<span class="badge c{}">{}</span>').format(self.colours[target], self._letters[target])


def side_limit(pictures: int) -> int:
    """The longest side at which this number of photographs has 15 million pixels, about 3 MB."""
    smallest, largest = SIDES
    return max(smallest, min(largest, math.isqrt(15_000_000 // max(pictures, 1))))


def picture(image: Tensor, alt: str, limit: int = SIDES[1]) -> Markup:
    """A picture, uint8 (C, H, W), inside the page, which scales it to the space that there is.

    Up to 128 pixels a side it is lossless, and enlarged pixel by pixel to at least 256, so that scaling adds no grid
    of its own; otherwise it is shrunk to the ``limit`` and lossy.
    """
    shown = rgb(image)
    longest = max(shown.size)
    if longest <= 128:
        factor = -(-SIDES[1] // longest)
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
        options = {"lossless": True, "quality": 20, "method": 0}  # the last two are effort: more saves 5 % of the bytes
    else:
        shown.thumbnail((limit, limit), Image.Resampling.LANCZOS)
        options = {"quality": 82}
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img src="data:image/webp;base64,{}" width="{}" height="{}" alt="{}">').format(
        data, shown.width, shown.height, alt
    )


def breakable(name: str) -> Markup:
    """HTML of a name, which may break after the separators of runs and paths."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_:-])", name))
