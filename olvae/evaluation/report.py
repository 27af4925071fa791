"""Report results: tables on the terminal, metrics.md, per_image.csv, and one HTML page."""

import csv
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from olvae import __version__
from olvae.data.pixels.size_and_range import Sides
from olvae.data.places import names_volume
from olvae.evaluation.cells import (
    NONE,
    Cell,
    Table,
    conditions,
    costs,
    differences,
    headings,
    meaning,
    scores,
)
from olvae.evaluation.observers.observer import Evaluated
from olvae.evaluation.page import Page
from olvae.evaluation.results import Results, Row, used_weights
from olvae.files import atomic_write, counted, no_empty_folders, plain, remove_partials, write_json
from olvae.metrics import METRICS

MISSING = "a network is not here: metrics.md says which file to put where"

# A cell that starts so is a formula to spreadsheets, or a text with an apostrophe in front.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")

# Their versions are on the page.
PACKAGES = ("torch", "torchmetrics", "torch-fidelity", "diffusers", "pillow", "numpy")


def print_results(several: Sequence[Evaluated], worded: Callable[[str], str] = str) -> None:
    """Print to standard error: a table per protocol, one of the costs, and remarks in lines.

    ``worded`` changes a remark before it is printed.
    """
    # Quality: the title has the number of images if all rows have the same.
    console = Console(stderr=True)
    for evaluated in several:
        counts = {row.n for row in evaluated.results.table}
        images = f", {counted(counts.pop(), 'image')}" if len(counts) == 1 else ""
        print_grid(console, f"protocol {_title(evaluated.results)}{images}", quality(evaluated))

    # Costs: as measured under the first protocol.
    rows = several[0].results.rows
    if any(row.cost for row in rows):
        print_grid(console, f"cost: {conditions(rows)}", costs(rows))

    # Remarks: those that protocols share are printed once.
    remarks: list[str] = []
    for evaluated in several:
        remarks.extend(_remarks(evaluated, brief=True))
    for line in dict.fromkeys(remarks):
        console.print(worded(line), markup=False, highlight=False, soft_wrap=True)


def write_markdown(evaluated: Evaluated, path: Path, head: str = "") -> None:
    """Write metrics.md: a head, the protocol, one table of quality and costs, and all remarks."""
    # One table: each target's quality, then its costs.
    results = evaluated.results
    cost = costs(results.table)
    table = {}
    for target, cells in quality(evaluated, counts=True).items():
        table[target] = {**cells, **cost.get(target, {})}
    columns = headings(table)

    lines = [
        f"Protocol {_title(results)}, of {plain(str(results.images['source']))}.",
        "",
        _line(["target", *columns]),
        _line(["---", *["---:"] * len(columns)]),
    ]
    for target, cells in table.items():
        lines.append(_line(map(plain, [target, *_shown(cells, columns)])))
    lines.append("")
    if cost:
        lines += [f"Cost of one image; speed and memory: {plain(conditions(results.table))}.", ""]
    for remark in _remarks(evaluated):
        lines.append(f"- {plain(remark)}")
    with atomic_write(path) as partial:
        partial.write_text(head + "\n".join(lines).rstrip() + "\n", encoding="utf-8")


def inert(name: str) -> str:
    """Make a name safe as a cell; see :func:`write_csv`."""
    safe = name.replace("\r", r"\r")
    return f"'{safe}" if name.startswith(FORMULA) else safe


def write_csv(results: Results, path: Path) -> None:
    r"""Write per_image.csv: target, key, and the metrics of single images; a line per both.

    Numbers have all their digits, an infinite PSNR is ``inf``, a metric that a target lacks is
    empty. UTF-8; the bytes of a file name that is not UTF-8 are kept. Spreadsheets run a cell that
    starts as a formula: such a name gets an apostrophe in front, and so does one that has it. A
    carriage return, which csv writes without quotes and would end the line, becomes ``\r``.
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
            for key in sorted(set[str]().union(*columns)):
                values = [column.get(key) for column in columns]
                writer.writerow([inert(row.target), inert(key), *values])


def write_volumes_csv(evaluated: Evaluated, path: Path) -> None:
    """Write per_volume.csv: each target's means over the slices of a volume, as per_image.csv.

    A slice's key is PATH/NUMBER. Observers add figures of the slices.
    """
    lines: list[dict[str, Any]] = []
    for row in evaluated.results.rows:
        for volume, keys in volumes_of(row).items():
            line: dict[str, Any] = {"target": row.target, "volume": volume, "slices": len(keys)}
            for name, values in row.per_image.items():
                found = [values[key] for key in keys if key in values]
                if found:
                    line[name] = sum(found) / len(found)
            for observer in evaluated.observers:
                line.update(observer.of_images(row.target, keys))
            lines.append(line)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with (
        atomic_write(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            named = {name: inert(line[name]) for name in ("target", "volume")}
            writer.writerow({**line, **named})


def volumes_of(row: Row) -> dict[str, list[str]]:
    """Group a row's keys by the volume that they are slices of; none for other images."""
    found: dict[str, list[str]] = {}
    for key in sorted(set[str]().union(*row.per_image.values())):
        volume, _, number = key.rpartition("/")
        if number.isdigit() and names_volume(volume):
            found.setdefault(volume, []).append(key)
    return found


def write_files(
    evaluated: Evaluated, folder: Path, suffix: str = "", command: str | None = None
) -> dict[str, Path]:
    """Write all files of one protocol, metrics.json last, and return their paths.

    So where metrics.json exists, the other files belong to it. ``suffix`` is added to the files'
    names. The page shows the ``command`` line; without one, no page is written.
    """
    with no_empty_folders(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder.glob(".partial-*"), idle_s=1.0)

        # Everything that may fail, before earlier results are touched.
        page = None if command is None else render_page(evaluated, command)
        quality(evaluated)
        json.dumps(evaluated.results.as_dict(), allow_nan=False)

        # Observers' files, and the page.
        numbers = folder / f"metrics{suffix}.json"
        numbers.unlink(missing_ok=True)
        written: dict[str, Path] = {}
        for observer in evaluated.observers:
            written.update(observer.write(folder, suffix))
        if page is not None:
            written["report"] = folder / f"report{suffix}.html"
            with atomic_write(written["report"]) as partial:
                partial.write_text(page, encoding="utf-8", errors="backslashreplace")

        # Values of images: results that were read from files have none.
        if any(row.per_image for row in evaluated.results.rows):
            written["images"] = folder / f"per_image{suffix}.csv"
            write_csv(evaluated.results, written["images"])
        if any(volumes_of(row) for row in evaluated.results.rows):
            written["volumes"] = folder / f"per_volume{suffix}.csv"
            write_volumes_csv(evaluated, written["volumes"])

        written["table"] = folder / f"metrics{suffix}.md"
        write_markdown(evaluated, written["table"])
        write_json(evaluated.results.as_dict(), numbers)
    return {**written, "numbers": numbers}


def render_page(evaluated: Evaluated, command: str = "", when: datetime | None = None) -> str:
    """Render the page as HTML, without scripts or requests; more pictures are smaller ones.

    It shows the ``command`` line, and ``when`` the evaluation was made, with the time zone; by
    default now.
    """
    # Sections of observers that have something to show.
    results = evaluated.results
    page = Page(results)
    sections = []
    for observer in evaluated.observers:
        html = observer.section(page)
        if html is not None:
            sections.append((observer, html))

    # Versions: a package may be installed under another name, such as pillow-simd.
    environment = {"Python": platform.python_version(), "open-litevae": __version__}
    for package in PACKAGES:
        try:
            environment[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            environment[package] = "unknown"

    weights = used_weights(results.rows)
    return page.render(
        "page.html",
        command=command,
        when=when or datetime.now().astimezone(),
        environment=environment,
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
    """Make the table of metrics and the observers' columns.

    The numbers of images come first if ``counts`` is set, or if they differ between rows.
    """
    rows = evaluated.results.table
    counts = counts or len({row.n for row in rows}) > 1
    table = {}
    for row, metrics in zip(rows, scores(evaluated.results).values(), strict=True):
        cells = {}
        if counts:
            cells["images"] = Cell(str(row.n))
        cells.update(metrics)
        for observer in evaluated.observers:
            entry = row.observed.get(observer.name)
            if entry is not None:
                for heading, text in observer.columns(entry).items():
                    cells[heading] = Cell(text)
        table[row.target] = cells
    return table


def notes(evaluated: Evaluated, brief: bool = False) -> Iterator[str]:
    """Yield lines below a table: the observers' lines, and why metrics were skipped.

    ``brief`` gives all metrics that lack a network one line.
    """
    rows = evaluated.results.table
    for observer in evaluated.observers:
        yield from observer.lines(rows)

    # By reason, the labels of the metrics; a dict keeps each once, in order.
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, reason in row.skipped.items():
            kind = METRICS.get(name)
            file = None if kind is None else kind.needs
            if brief and file is not None and reason.startswith(file.name):
                reason = MISSING
            reasons.setdefault(reason, {})[name if kind is None else kind.label] = None
    for reason, labels in reasons.items():
        yield f"skipped {', '.join(labels)}: {reason}"


def _remarks(evaluated: Evaluated, brief: bool = False) -> Iterator[str]:
    """Yield what the PSNR means, the notes, and the warnings."""
    sentence = meaning(evaluated.results)
    if sentence:
        yield sentence
    yield from notes(evaluated, brief)
    for warning in evaluated.results.warnings():
        yield f"warning: {warning}"


def print_grid(console: Console, title: str, table: Table, names: str = "target") -> None:
    """Print a table, in several parts if its columns need them.

    Numbers stay on one line; names of rows are folded.
    """
    # Parts: the columns that fit beside 12 characters for the names and their margin.
    parts: list[list[str]] = [[]]
    room = console.width - 12
    left = room
    for heading in headings(table):
        texts = heading.split(" ")
        for cells in table.values():
            texts.extend(_shown(cells, [heading]))
        width = max(map(len, texts)) + 2
        if width > left:
            if parts[-1]:
                parts.append([])
            left = room
        left -= width
        parts[-1].append(heading)

    # A grid for each part; the title stands above the first.
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
    """Yield a row's cells as text, by the headings; a dash where it has none."""
    for heading in columns:
        cell = cells.get(heading, Cell(NONE))
        yield f"{cell.text} {cell.spread}".strip()


def _title(results: Results) -> str:
    size = Sides.of(results.protocol["size"])
    return f"{results.protocol['name']} {results.protocol_hash}, {size}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
