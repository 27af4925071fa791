"""Report results: tables on the terminal, one in Markdown, the values of images as CSV, and one HTML page."""

import base64
import csv
import importlib.metadata
import io
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid
from torch import Tensor

from olvae import __version__
from olvae.data.pixels.size_and_range import Sides
from olvae.evaluation.results import (
    NONE,
    Cell,
    Evaluated,
    Results,
    Table,
    conditions,
    costs,
    differences,
    headings,
    meaning,
    scores,
    significant,
    used_weights,
)
from olvae.figures import rgb
from olvae.files import atomic_write, no_empty_folders, plain, remove_partials, write_json
from olvae.metrics import METRICS

ARROWS = {"higher": "\N{NO-BREAK SPACE}↑", "lower": "\N{NO-BREAK SPACE}↓"}

SIDES = (
    96,
    256,
)  # the longest side of a photograph, in pixels: as small as it may become, and at most

MISSING = "a network is not here: metrics.md says which file to put where"

PACKAGES = ("torch", "torchmetrics", "torch-fidelity", "lpips", "diffusers", "pillow", "numpy")


def print_results(several: Sequence[Evaluated], worded: Callable[[str], str] = str) -> None:
    """Print to standard error: a table per protocol, one of the costs, and what was skipped, in lines as ``worded``."""
    console = Console(stderr=True)
    for evaluated in several:
        counts = {row.n for row in evaluated.results.table}
        images = f", {counts.pop()} images" if len(counts) == 1 else ""
        print_grid(console, f"protocol {_title(evaluated.results)}{images}", quality(evaluated))
    rows = several[0].results.rows
    if any(row.cost for row in rows):
        print_grid(console, f"cost: {conditions(rows)}", costs(rows))
    for line in dict.fromkeys(
        line for evaluated in several for line in _remarks(evaluated, brief=True)
    ):
        console.print(worded(line), markup=False, highlight=False, soft_wrap=True)


def write_markdown(evaluated: Evaluated, path: Path, head: str = "") -> None:
    """Write metrics.md: a head, the protocol, one table of quality and costs, and what was skipped and why."""
    results = evaluated.results
    cost = costs(results.table)
    table = {
        target: {**cells, **cost.get(target, {})}
        for target, cells in quality(evaluated, counts=True).items()
    }
    columns = headings(table)
    lines = [
        f"Protocol {_title(results)}, of {plain(str(results.images['source']))}.",
        "",
        _line(["target", *columns]),
        _line(["---", *["---:"] * len(columns)]),
        *(_line(map(plain, [target, *_shown(cells, columns)])) for target, cells in table.items()),
        "",
    ]
    if cost:
        lines += [f"Cost of one image; speed and memory: {plain(conditions(results.table))}.", ""]
    lines += [f"- {plain(remark)}" for remark in _remarks(evaluated)]
    with atomic_write(path) as partial:
        partial.write_text(head + "\n".join(lines).rstrip() + "\n", encoding="utf-8")


def write_csv(results: Results, path: Path) -> None:
    """Write per_image.csv: one line per target and image: target, key, and the metrics of single images.

    Numbers have all their digits, an infinite PSNR is ``inf``, a metric that a target lacks is empty. UTF-8; the bytes
    of a file name that is not UTF-8 are kept.
    """
    names = list(dict.fromkeys(name for row in results.rows for name in row.per_image))
    with (
        atomic_write(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["target", "key", *names])
        for row in results.rows:
            columns = [row.per_image.get(name, {}) for name in names]
            for key in sorted({key for column in columns for key in column}):
                writer.writerow([row.target, key, *(column.get(key) for column in columns)])


def write_files(
    evaluated: Evaluated, folder: Path, suffix: str = "", command: str | None = None
) -> dict[str, Path]:
    """Write all files of one protocol; where metrics.json is, the others are its own. Return their paths.

    ``suffix`` is added to the files' names. The page shows the ``command`` line; without one, no page is written.
    """
    with no_empty_folders(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder.glob(".partial-*"), idle_s=1.0)
        numbers = folder / f"metrics{suffix}.json"
        page = None if command is None else render_page(evaluated, command)
        quality(evaluated), json.dumps(evaluated.results.as_dict(), allow_nan=False)
        numbers.unlink(missing_ok=True)  # of an earlier evaluation, after all that may fail
        written = {
            what: path
            for one in evaluated.observers
            for what, path in one.write(folder, suffix).items()
        }
        if page is not None:
            written["report"] = folder / f"report{suffix}.html"
            with atomic_write(written["report"]) as partial:
                partial.write_text(page, encoding="utf-8", errors="backslashreplace")
        if any(
            row.per_image for row in evaluated.results.rows
        ):  # not of results that were read from files
            written["images"] = folder / f"per_image{suffix}.csv"
            write_csv(evaluated.results, written["images"])
        written["table"] = folder / f"metrics{suffix}.md"
        write_markdown(evaluated, written["table"])
        write_json(evaluated.results.as_dict(), numbers)
    return {**written, "numbers": numbers}


def render_page(evaluated: Evaluated, command: str = "", when: datetime | None = None) -> str:
    """Render the page as HTML: no script, no request; its pictures are smaller the more there are.

    It shows the ``command`` line, and ``when`` the evaluation was made, with the time zone; by default now.
    """
    results = evaluated.results
    page = Page(results)
    sections = [
        (observer, html)
        for observer in evaluated.observers
        if (html := observer.section(page)) is not None
    ]
    weights = used_weights(results.rows)
    versions = {"Python": platform.python_version(), "open-litevae": __version__}
    return page.render(
        "page.html",
        command=command,
        when=when or datetime.now().astimezone(),
        environment=versions | {name: _version(name) for name in PACKAGES},
        meaning=meaning(results),
        scores=quality(evaluated),
        counts={row.n for row in results.table},
        notes=list(notes(evaluated)),
        differences=differences(results),
        costs=costs(results.rows),
        conditions=conditions(results.rows),
        sections=sections,
        weights=weights,
        labels={name: METRICS[name].label for name in weights},
    )


def quality(evaluated: Evaluated, counts: bool = False) -> Table:
    """The metrics and the observers' columns; before them the numbers of images, if asked for or if they differ."""
    rows = evaluated.results.table
    counts = counts or len({row.n for row in rows}) > 1
    table = {}
    for row, cells in zip(rows, scores(evaluated.results).values(), strict=True):
        entries = [(observer, row.observed.get(observer.name)) for observer in evaluated.observers]
        columns = [
            observer.columns(entry).items() for observer, entry in entries if entry is not None
        ]
        images = {"images": Cell(str(row.n))} if counts else {}
        table[row.target] = {
            **images,
            **cells,
            **{name: Cell(text) for added in columns for name, text in added},
        }
    return table


def notes(evaluated: Evaluated, brief: bool = False) -> Iterator[str]:
    """Lines below a table: the observers', and why metrics were skipped; ``brief``, all missing networks in one."""
    rows = evaluated.results.table
    for observer in evaluated.observers:
        yield from observer.lines(rows)
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, reason in row.skipped.items():
            kind = METRICS.get(name)
            if brief and kind is not None and kind.needs is not None:
                reason = MISSING
            reasons.setdefault(reason, {})[name if kind is None else kind.label] = None
    yield from (f"skipped {', '.join(labels)}: {reason}" for reason, labels in reasons.items())


def _remarks(evaluated: Evaluated, brief: bool = False) -> Iterator[str]:
    if sentence := meaning(evaluated.results):
        yield sentence
    yield from notes(evaluated, brief)
    yield from (f"warning: {warning}" for warning in evaluated.results.warnings())


def print_grid(console: Console, title: str, table: Table, names: str = "target") -> None:
    """Print a table, in several parts if its columns need them: numbers stay whole, and the rows' names are folded."""
    parts: list[list[str]] = [[]]
    left = room = console.width - 12  # what names keep, and their margin
    for heading in headings(table):
        texts = [
            *heading.split(" "),
            *(text for cells in table.values() for text in _shown(cells, [heading])),
        ]
        if (left := left - max(map(len, texts)) - 2) < 0:
            parts += [[]] if parts[-1] else []
            left = room - max(map(len, texts)) - 2
        parts[-1].append(heading)
    for number, columns in enumerate(parts):
        grid = Grid(
            title="" if number else escape(title),
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        grid.add_column(names, overflow="fold", min_width=8)
        for heading in columns:
            grid.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
        for target, cells in table.items():
            grid.add_row(*map(escape, [target, *_shown(cells, columns)]))
        console.print(grid)


def _shown(cells: Mapping[str, Cell], columns: Sequence[str]) -> Iterator[str]:
    for cell in (cells.get(heading, Cell(NONE)) for heading in columns):
        yield f"{cell.text} {cell.spread}".strip()


def _title(results: Results) -> str:
    return (
        f"{results.protocol['name']} {results.protocol_hash}, {Sides.of(results.protocol['size'])}"
    )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except (
        importlib.metadata.PackageNotFoundError
    ):  # installed under another name, such as pillow-simd
        return "unknown"


class Page:
    """Results on their way to the page: renders what observers show of them, in templates of the package."""

    def __init__(self, results: Results) -> None:
        self.results = results
        # Seven colours of the style sheet, for badges and bars.
        self.colours = {row.target: i % 7 + 1 for i, row in enumerate(results.table)}
        self._letters = {
            row.target: ascii_uppercase[i : i + 1] or str(i + 1)
            for i, row in enumerate(results.table)
        }
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
        return (
            self.render("table.html", content=table, label=label, caption=caption)
            if table
            else Markup()
        )

    def mark(self, target: str) -> Markup:
        """A target's letter in its colour."""
        return Markup('<span class="badge c{}">{}</span>').format(
            self.colours[target], self._letters[target]
        )


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
        shown = shown.resize(
            (shown.width * factor, shown.height * factor), Image.Resampling.NEAREST
        )
        options = {
            "lossless": True,
            "quality": 20,
            "method": 0,
        }  # the last two are effort: more saves 5 % of the bytes
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
