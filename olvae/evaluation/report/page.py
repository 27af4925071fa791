"""One HTML page with everything about an evaluation. It needs no other file and no network."""

import importlib.metadata
import math
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from olvae import __version__
from olvae.evaluation.artefacts import Artefacts, amplification, amplified
from olvae.evaluation.precision import TOLERANCE
from olvae.evaluation.report.pictures import PatternTable, side_limit, triple
from olvae.evaluation.report.tables import findings, large
from olvae.evaluation.results import INFINITE, Results, Row, used_weights
from olvae.evaluation.runner import Evaluated
from olvae.figures import ERROR_RANGE
from olvae.files import atomic_write
from olvae.metrics.registry import METRICS

__all__ = ["breakable", "render_page", "write_page"]


NONE = "\N{EN DASH}"

MINUS = "\N{MINUS SIGN}"

COLOURS = 7
"""Of the style sheet, for badges and bars."""

MEASURES = ("mse", "share_of_signal")

PACKAGES = ("torch", "torchmetrics", "torch-fidelity", "lpips", "diffusers", "pillow", "numpy")


def write_page(evaluated: Evaluated, path: Path, command: str = "", when: datetime | None = None) -> None:
    """Write the page, whole or not at all; see :func:`render_page`."""
    html = render_page(evaluated, command, when)
    with atomic_write(path) as partial:
        partial.write_text(html, encoding="utf-8", errors="backslashreplace")


def render_page(evaluated: Evaluated, command: str = "", when: datetime | None = None) -> str:
    """The page as HTML: no script, no request; its pictures are smaller the more there are.

    Args:
        command: the command line, to be shown.
        when: the evaluation was made, with the time zone; by default now.
    """
    environment = Environment(
        loader=PackageLoader("olvae.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, significant=significant, breakable=breakable)
    results, artefacts = evaluated.results, evaluated.test_patterns
    galleries = {target: gallery.examples() for target, gallery in evaluated.galleries.items()}
    count = sum(len(examples) for groups in galleries.values() for examples in groups.values())
    versions = {name: _version(name) for name in PACKAGES}
    return environment.get_template("page.html").render(
        results=results,
        command=command,
        when=when or datetime.now().astimezone(),
        environment={"Python": platform.python_version(), "open-litevae": __version__, **versions},
        labels={name: METRICS[name].label for name in used_weights(results.rows)},
        weights=used_weights(results.rows),
        badge={
            row.target: (ascii_uppercase[i : i + 1] or str(i + 1), i % COLOURS + 1)
            for i, row in enumerate(results.table)
        },
        scores=_scores(results),
        differences=_differences(results),
        costs=_costs(results.rows),
        latents=_latents(results.table),
        precisions=_precisions(results.table),
        activations=_activations(results.table),
        findings=list(findings(row for row in results.table if row.precision)),
        tolerance=TOLERANCE,
        galleries=galleries,
        ranked_by=METRICS[evaluated.ranked_by].label.partition(", "),
        triple=lambda example: triple(example, side_limit(3 * count)),
        error_range=ERROR_RANGE,
        bars=_bars(results.rows),
        patterns=_patterns(artefacts),
        pattern_table=PatternTable(artefacts) if artefacts else None,
        amplification=amplification(artefacts.values()) if artefacts else 1,
        amplified=amplified,
    )


class Cell(NamedTuple):
    """A number; its interval; a mark ("best", "better", "worse", or none); the number of a note, or 0."""

    text: str
    interval: str = ""
    mark: str = ""
    note: int = 0


class Table(NamedTuple):
    """Headings, rows of cells by target, and notes, which are numbered from 1."""

    headings: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]
    notes: Sequence[str] = ()


def _scores(results: Results) -> Table:
    rows, names, notes = results.table, _names(results), dict[str, int]()
    best = {name: _best(name, rows) for name in names}

    def cell(row: Row, name: str) -> Cell:
        reason = row.skipped.get(name, "" if name in row.metrics else "not computed")
        value = row.metrics.get(name)
        if value is not None and math.isinf(value):
            reason = INFINITE
        note = notes.setdefault(reason, len(notes) + 1) if reason else 0
        if value is None:
            return Cell(NONE, note=note)
        digits, ends = METRICS[name].digits, row.intervals.get(name)
        interval = f"[{', '.join(number(end, digits) for end in ends)}]" if ends else ""
        return Cell(number(value, digits), interval, "best" if value == best[name] else "", note)

    cells = {row.target: [cell(row, name) for name in names] for row in rows}
    return Table(_headings(names), cells, [*notes])


def _differences(results: Results) -> Table:
    names = _names(results)

    def cell(row: Row, name: str) -> Cell:
        found = row.differences.get(name)
        if found is None:
            return Cell(NONE)
        mark = ""
        if not found.low <= 0.0 <= found.high:
            mark = "better" if (found.low > 0.0) == (METRICS[name].better == "higher") else "worse"
        value, low, high = (("+" if end > 0 else "") + number(end, METRICS[name].digits) for end in found)
        return Cell(value, f"[{low}, {high}]", mark)

    return Table(_headings(names), {row.target: [cell(row, name) for name in names] for row in results.rows[1:]})


def _costs(rows: Sequence[Row]) -> Table:
    headings = ["parameters, M", "MACs, G", "encode, images/s", "decode, images/s", "peak memory, MiB", "device"]
    cells = {}
    for row in rows:
        if cost := row.cost:
            numbers = (
                cost.parameters / 1e6,
                (cost.encode_macs + cost.decode_macs) / 1e9,
                cost.encode_images_per_s,
                cost.decode_images_per_s,
                None if cost.peak_memory_bytes is None else cost.peak_memory_bytes / 2**20,
            )
            texts = [*(NONE if value is None else significant(value) for value in numbers), cost.device]
            cells[row.target] = [Cell(text) for text in texts]
    return Table(headings, cells)


def _latents(rows: Sequence[Row]) -> Table:
    """A student's latents: the error, and below it the teacher's standard deviation."""
    cells = {}
    channels = max((len(row.latents.per_channel) for row in rows if row.latents), default=0)
    for row in rows:
        if found := row.latents:
            pairs = zip(found.per_channel, found.teacher_std, strict=True)
            one = [Cell(NONE if error is None else significant(error), significant(std)) for error, std in pairs]
            overall = Cell(NONE if found.rmse is None else significant(found.rmse))
            cells[row.target] = [overall, *one, *[Cell(NONE)] * (channels - len(one))]
    return Table(["all", *(f"channel {i + 1}" for i in range(channels))], cells)


def _precisions(rows: Sequence[Row]) -> Table:
    cells = {}
    for row in rows:
        if found := row.precision:
            texts = (
                "yes" if found.safe else "no",
                NONE if found.psnr_lost is None else number(found.psnr_lost, 3),
                large(found.largest_value),
                found.largest_name,
                large(found.limit),
                str(found.non_finite.images),
                found.non_finite.first or NONE,
            )
            cells[row.target] = [Cell(text) for text in texts]
    headings = ["safe", "PSNR lost, dB", "largest", "at", "limit", "images non-finite", "first at"]
    return Table(headings, cells)


def _activations(rows: Sequence[Row]) -> Table:
    """The largest activation by stage; targets may have stages of other names."""
    found = {row.target: row.precision.largest for row in rows if row.precision}
    stages = list(dict.fromkeys(stage for largest in found.values() for stage in largest))
    cells = {
        target: [Cell(large(largest[stage]) if stage in largest else NONE) for stage in stages]
        for target, largest in found.items()
    }
    return Table(stages, cells)


def _patterns(artefacts: Mapping[str, Artefacts]) -> Table:
    headings = [
        "grid, mean",
        "grid, largest",
        "amplitude, mean",
        "with border, mean",
        "shift, largest",
        "squares of 1 px, PSNR in dB",
        "squares of 8 px, PSNR in dB",
    ]
    cells = {}
    for target, found in artefacts.items():
        colours, psnr = found.colours, {pattern.name: pattern.psnr for pattern in found.patterns}
        texts = (
            f"{sum(colour.grid for colour in colours) / len(colours):.2f}",
            f"{max(colour.grid for colour in colours):.2f}",
            f"{sum(colour.amplitude for colour in colours) / len(colours):.2f}",
            f"{sum(colour.amplitude_with_border for colour in colours) / len(colours):.2f}",
            f"{max(abs(value) for colour in colours for value in colour.shift):.1f}",
            *(number(psnr[name], 2) if name in psnr else NONE for name in ("squares 1 px", "squares 8 px")),
        )
        cells[target] = [Cell(text) for text in texts]
    return Table(headings, cells)


class Bar(NamedTuple):
    """A bar's length, at most 100, the value as text, and whether the value is off the scale."""

    length: float
    text: str
    off: bool = False


def _bars(rows: Sequence[Row]) -> dict[str, dict[str, list[Bar]]]:
    """By band, coarse to fine, and target, two bars: the mean squared error, and its share of the input's energy.

    The longest bar of a trained model is 100: an untrained one would make all others invisible.
    """
    bands = {row.target: row.bands for row in rows if row.bands}
    baselines = {row.target for row in rows if row.baseline}
    every = [band for target, found in bands.items() if target not in baselines for band in found.values()]
    longest = {measure: max((band[measure] or 0.0 for band in every), default=0.0) for measure in MEASURES}

    def bar(value: float | None, measure: str) -> Bar:
        if value is None:
            return Bar(0.0, NONE)
        text = f"{significant(100.0 * value)} %" if measure == "share_of_signal" else significant(value)
        length = round(100.0 * value / longest[measure], 2) if longest[measure] else 0.0
        return Bar(min(length, 100.0), text, length > 100.0)

    return {
        name: {
            target: [bar(found[name][measure], measure) for measure in MEASURES]
            for target, found in bands.items()
            if name in found
        }
        for name in dict.fromkeys(name for found in bands.values() for name in found)
    }


def _names(results: Results) -> list[str]:
    """The metrics that a row has, or says why it has not."""
    return [name for name in METRICS if any(name in row.metrics or name in row.skipped for row in results.table)]


def _headings(names: Sequence[str]) -> list[str]:
    return [f"{METRICS[n].label}\N{NO-BREAK SPACE}{'↑' if METRICS[n].better == 'higher' else '↓'}" for n in names]


def _best(name: str, rows: Sequence[Row]) -> float | None:
    """None if no two values differ."""
    values = [row.metrics[name] for row in rows if name in row.metrics]
    if len(set(values)) < 2:
        return None
    return max(values) if METRICS[name].better == "higher" else min(values)


def number(value: float, digits: int) -> str:
    """With a fixed number of decimals, or with an exponent if they would all be 0."""
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:.1e}" if 0.0 < abs(value) < 0.5 * 10.0**-digits else f"{value:.{digits}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def significant(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if math.isinf(value):
        return "∞"
    if value == 0.0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def breakable(name: str) -> Markup:
    """HTML of a name, which may break after the separators of runs and paths."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_:-])", name))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # installed under another name, such as pillow-simd
        return "unknown"
