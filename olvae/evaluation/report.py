"""Report results: tables on the terminal, one in Markdown, the values of images as CSV, and one HTML page."""

import csv
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from olvae import __version__
from olvae.evaluation.cells import Cell, Table, conditions, costs, differences, joined, scores, texts
from olvae.evaluation.html import Page
from olvae.evaluation.results import Results, used_weights
from olvae.evaluation.runner import Evaluated
from olvae.files import atomic_write, no_empty_folders, remove_partials
from olvae.metrics.registry import METRICS


def print_results(several: Sequence[Evaluated], worded: Callable[[str], str] = str) -> None:
    """Print to standard error: a table per protocol, one of the costs, and what was skipped and why.

    Args:
        worded: rewrites a line, such as settings as flags.
    """
    console = Console(stderr=True)
    for evaluated in several:
        counts = {row.n for row in evaluated.results.table}
        images = f", {counts.pop()} images" if len(counts) == 1 else ""
        console.print(grid(f"protocol {_title(evaluated.results)}{images}", quality(evaluated)))
    rows = several[0].results.rows
    if any(row.cost for row in rows):
        console.print(grid(f"cost: {conditions(rows)}", costs(rows)))
    for line in dict.fromkeys(line for evaluated in several for line in _remarks(evaluated)):
        console.print(worded(line), markup=False, highlight=False, soft_wrap=True)


def write_markdown(evaluated: Evaluated, path: Path) -> None:
    """metrics.md: the protocol, one table of quality and costs, and what was skipped and why."""
    results = evaluated.results
    cost = costs(results.table)
    table = joined(quality(evaluated, counts=True), cost)
    lines = [
        f"Protocol {_title(results)}, of {_plain(str(results.images['source']))}.",
        "",
        _line(["target", *table.headings]),
        _line(["---", *["---:"] * len(table.headings)]),
    ]
    for target, cells in table.rows.items():
        lines.append(_line([_plain(target), *map(_plain_cell, cells)]))
    if cost.rows:
        lines += ["", f"Cost of one image; speed and memory: {_plain(conditions(results.table))}."]
    lines += ["", *(f"- {_plain(remark)}" for remark in _remarks(evaluated))]
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def write_csv(results: Results, path: Path) -> None:
    """per_image.csv: one line per target and image: target, key, and the metrics of single images.

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
                writer.writerow([row.target, key, *(repr(column[key]) if key in column else "" for column in columns)])


PACKAGES = ("torch", "torchmetrics", "torch-fidelity", "lpips", "diffusers", "pillow", "numpy")


def write_files(evaluated: Evaluated, folder: Path, suffix: str = "", command: str | None = None) -> dict[str, Path]:
    """Write all files of one protocol; where metrics.json is, the others are its own.

    Args:
        suffix: to the files' names.
        command: the command line, for the page; without one, no page is written.

    Returns:
        What is written and where.
    """
    with no_empty_folders(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder.glob(".partial-*"), idle_s=1.0)
        numbers = folder / f"metrics{suffix}.json"
        numbers.unlink(missing_ok=True)  # of an earlier evaluation
        written = {what: path for one in evaluated.observers for what, path in one.write(folder, suffix).items()}
        if command is not None:
            written["report"] = folder / f"report{suffix}.html"
            write_page(evaluated, written["report"], command)
        written |= {"images": folder / f"per_image{suffix}.csv", "table": folder / f"metrics{suffix}.md"}
        write_csv(evaluated.results, written["images"])
        write_markdown(evaluated, written["table"])
        evaluated.results.write(numbers)
    return {**written, "numbers": numbers}


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
    results = evaluated.results
    page = Page(results)
    sections = [(observer, html) for observer in evaluated.observers if (html := observer.section(page)) is not None]
    weights = used_weights(results.rows)
    return page.render(
        "page.html",
        command=command,
        when=when or datetime.now().astimezone(),
        environment={
            "Python": platform.python_version(),
            "open-litevae": __version__,
            **{name: _version(name) for name in PACKAGES},
        },
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
    extra: dict[str, dict[str, str]] = {row.target: {} for row in rows}
    for observer in evaluated.observers:
        for row in rows:
            if observer.name in row.observed:
                extra[row.target].update(observer.columns(row.observed[observer.name]))
    table = joined(scores(evaluated.results), texts(extra))
    if counts or len({row.n for row in rows}) > 1:
        table = joined(Table(["images"], {row.target: [Cell(str(row.n))] for row in rows}), table)
    return table


def notes(evaluated: Evaluated) -> Iterator[str]:
    """Lines below a table: the observers', and why metrics were skipped."""
    rows = evaluated.results.table
    for observer in evaluated.observers:
        yield from observer.lines(rows)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row.skipped.items():
            label = METRICS[name].label if name in METRICS else name
            if label not in reasons.setdefault(reason, []):
                reasons[reason].append(label)
    yield from (f"skipped {', '.join(labels)}: {reason}" for reason, labels in reasons.items())


def _remarks(evaluated: Evaluated) -> Iterator[str]:
    yield from notes(evaluated)
    yield from (f"warning: {warning}" for warning in evaluated.results.warnings())


def grid(title: str, table: Table) -> Grid:
    """A table for the terminal; on a narrow one its numbers stay whole, and names are folded."""
    grid = Grid(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    grid.add_column("target", overflow="fold", min_width=8)
    for heading in table.headings:
        grid.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for target, cells in table.rows.items():
        grid.add_row(escape(target), *(escape(_plain_cell(cell)) for cell in cells))
    return grid


def _plain_cell(cell: Cell) -> str:
    return f"{cell.text} {cell.spread}".strip()


def _title(results: Results) -> str:
    size = results.protocol["size"]
    return f"{results.protocol['name']} {results.protocol_hash}, {size}x{size}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """A user's text on one line, with Markdown's characters escaped, except underscores inside a word."""
    return re.sub(r"([\\|*`<>\[\]#~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # installed under another name, such as pillow-simd
        return "unknown"
