"""From an evaluation's data to what the page's template prints: texts, marks, pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from olvae.evaluation.gallery import Example
from olvae.evaluation.report.content import Column, Page, Row, Score
from olvae.evaluation.report.pictures import Inline, inline, side_limit
from olvae.figures import error_map

__all__ = [
    "NONE",
    "Badge",
    "Cell",
    "Line",
    "Table",
    "badges",
    "band_table",
    "cost_table",
    "difference_table",
    "gallery_parts",
    "number",
    "result_table",
]


NONE = "\N{EN DASH}"

MINUS = "\N{MINUS SIGN}"

MEASURES = ("mse", "share_of_signal")

INK = 7
"""Colours of the style sheet."""


class Badge(NamedTuple):
    """How a target is told apart all over the page: its name, a letter, one of the colours."""

    name: str
    letter: str
    colour: int


class Cell(NamedTuple):
    """A number; the interval; a mark ("best", "better", "worse", or none); the number of a note, or 0."""

    text: str
    interval: str = ""
    mark: str = ""
    note: int = 0


class Line(NamedTuple):
    badge: Badge
    cells: list[Cell]


class Table(NamedTuple):
    headings: list[str]
    lines: list[Line]
    notes: list[str]


class Bar(NamedTuple):
    """Lengths, the longest of all 100, and texts: of the mean squared error, and of its share of the input."""

    badge: Badge
    measures: list[tuple[float, str]]


class Picture(NamedTuple):
    """An image of the gallery: its caption, and input, reconstruction, error."""

    key: str
    value: str
    pictures: list[tuple[str, Inline]]


def badges(page: Page) -> dict[str, Badge]:
    """A letter and a colour for each target, in the order in which they first occur."""
    everywhere = [row.target for row in page.rows] + [row.target for row in page.differences]
    everywhere += [cost.target for cost in page.costs] + [shown.target for shown in page.galleries]
    everywhere += [*page.bands, *page.artefacts]
    if page.reference:
        everywhere.append(page.reference)
    names = dict.fromkeys(everywhere)
    return {name: Badge(name, _letter(i), i % INK + 1) for i, name in enumerate(names)}


def result_table(page: Page, badge: Mapping[str, Badge]) -> Table:
    best = {column.name: _best(column, page.rows) for column in page.columns}

    def mark(column: Column, score: Score) -> str:
        return "best" if score.value is not None and score.value == best[column.name] else ""

    return _score_table(page, page.rows, badge, number, mark)


def difference_table(page: Page, badge: Mapping[str, Badge]) -> Table:
    def mark(column: Column, score: Score) -> str:
        if score.interval is None or score.interval[0] <= 0.0 <= score.interval[1]:
            return ""
        return "better" if (score.interval[0] > 0.0) == (column.better == "higher") else "worse"

    return _score_table(page, page.differences, badge, _signed, mark)


def cost_table(page: Page, badge: Mapping[str, Badge]) -> Table:
    headings = ["parameters, M", "MACs, G", "encode, images/s", "decode, images/s", "peak memory, MiB", "device"]
    lines = []
    for cost in page.costs:
        numbers = (
            _scaled(cost.parameters, 1e6),
            _scaled(cost.macs, 1e9),
            _scaled(cost.encode, 1.0),
            _scaled(cost.decode, 1.0),
            _scaled(cost.memory, 2.0**20),
            cost.device or NONE,
        )
        lines.append(Line(badge[cost.target], [Cell(text) for text in numbers]))
    return Table(headings, lines, [])


def gallery_parts(
    page: Page, badge: Mapping[str, Badge]
) -> list[tuple[Badge, str, str, list[tuple[str, list[Picture]]]]]:
    """Per target its badge, the metric, its unit, and the groups that have images."""
    count = sum(len(examples) for shown in page.galleries for examples in shown.groups.values())
    limit = side_limit(3 * count)
    return [
        (
            badge[shown.target],
            shown.metric.partition(", ")[0],
            shown.metric.partition(", ")[2],
            [(name, [_picture(e, limit) for e in group]) for name, group in shown.groups.items() if group],
        )
        for shown in page.galleries
    ]


def band_table(page: Page, badge: Mapping[str, Badge]) -> list[tuple[str, list[Bar]]]:
    """Per band, coarse to fine, the bars of all targets that have it."""
    every = [band for bands in page.bands.values() for band in bands.values()]
    longest = {measure: max((band[measure] or 0.0 for band in every), default=0.0) for measure in MEASURES}

    def bar(target: str, band: Mapping[str, float | None]) -> Bar:
        return Bar(badge[target], [_measure(band[measure], measure, longest[measure]) for measure in MEASURES])

    names = dict.fromkeys(name for bands in page.bands.values() for name in bands)
    return [
        (name, [bar(target, bands[name]) for target, bands in page.bands.items() if name in bands]) for name in names
    ]


def _measure(value: float | None, measure: str, longest: float) -> tuple[float, str]:
    if value is None:
        return 0.0, NONE
    text = f"{_significant(100.0 * value)} %" if measure == "share_of_signal" else _significant(value)
    return round(100.0 * value / longest, 2) if longest else 0.0, text


def _picture(example: Example, limit: int) -> Picture:
    error = error_map(example.x[None], example.y[None])[0]
    named = (("input", example.x), ("reconstruction", example.y), ("error", error))
    return Picture(example.key, _significant(example.value), [(name, inline(image, limit)) for name, image in named])


def _score_table(
    page: Page,
    rows: Sequence[Row],
    badge: Mapping[str, Badge],
    form: Callable[[float, int], str],
    mark: Callable[[Column, Score], str],
) -> Table:
    notes: dict[str, int] = {}

    def cell(column: Column, score: Score | None) -> Cell:
        if score is None:
            return Cell(NONE)
        note = notes.setdefault(score.reason, len(notes) + 1) if score.reason else 0
        if score.value is None:
            return Cell(NONE, note=note)
        ends = "" if score.interval is None else ", ".join(form(end, column.digits) for end in score.interval)
        return Cell(form(score.value, column.digits), f"[{ends}]" if ends else "", mark(column, score), note)

    lines = [
        Line(badge[row.target], [cell(column, row.scores.get(column.name)) for column in page.columns]) for row in rows
    ]
    return Table(
        [f"{column.label}\N{NO-BREAK SPACE}{'↑' if column.better == 'higher' else '↓'}" for column in page.columns],
        lines,
        [*notes],
    )


def _best(column: Column, rows: Sequence[Row]) -> float | None:
    """None if there are no two that differ."""
    scores = [row.scores[column.name].value for row in rows if column.name in row.scores]
    values = [value for value in scores if value is not None]
    if len(set(values)) < 2:
        return None
    return max(values) if column.better == "higher" else min(values)


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else str(i + 1)


def number(value: float, digits: int) -> str:
    """With so many decimals, or with an exponent where they would be all 0."""
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:.1e}" if 0.0 < abs(value) < 0.5 * 10.0**-digits else f"{value:.{digits}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def _signed(value: float, digits: int) -> str:
    return ("+" if value > 0 else "") + number(value, digits)


def _significant(value: float) -> str:
    """Three digits, without an exponent where that is readable."""
    if math.isinf(value):
        return "∞"
    if value == 0.0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _scaled(value: float | None, unit: float) -> str:
    return NONE if value is None else _significant(value / unit)
