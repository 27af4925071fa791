"""Evaluations as tables: on the terminal, and in Markdown with the costs in the same rows."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from olvae.evaluation.protocol import Protocol
from olvae.evaluation.results import EQUAL, Evaluation
from olvae.files import atomic_write
from olvae.metrics.registry import METRICS

__all__ = ["ImageValues", "print_evaluations", "write_csv", "write_markdown"]


COSTS = ("M params", "GMACs encode", "GMACs decode", "img/s encode", "img/s decode", "MiB peak")

Rows = Sequence[Mapping[str, Any]]
"""As metrics.json has them."""


def print_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """A table for each protocol, one of costs, and what is missing and why, to standard error."""
    console = Console(stderr=True)
    for evaluation in evaluations:
        console.print(_quality(evaluation.as_dict()["results"], evaluation.protocol))
    if evaluations[0].costs:
        console.print(_costs(evaluations[0]))
    for line in dict.fromkeys(line for evaluation in evaluations for line in _remarks(evaluation)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_markdown(evaluation: Evaluation, path: Path) -> None:
    """metrics.md: the protocol, one table of quality and costs, and what is missing and why."""
    rows = evaluation.as_dict()["results"]
    names, costs = _names(rows), any(row.get("cost") for row in rows)
    headings = ["target", "images", *(METRICS[name].label for name in names), *(COSTS if costs else ())]
    lines = [
        f"Protocol {_title(evaluation.protocol)}, of {_plain(str(evaluation.images['source']))}.",
        "",
        _line(headings),
        _line(["---", *["---:"] * (len(headings) - 1)]),
    ]
    for row in rows:
        cells = [_plain(row["target"]), str(row["n"]), *(_cell(row, name) for name in names)]
        lines.append(_line([*cells, *(_cost_cells(row.get("cost")) if costs else ())]))
    if costs:
        lines += ["", f"Cost of one image; speed and memory: {_plain(_conditions(rows))}."]
    lines += ["", *(f"- {_plain(remark)}" for remark in _remarks(evaluation))]
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _quality(rows: Rows, protocol: Protocol) -> Table:
    names = _names(rows)
    counts = {row["n"] for row in rows}
    number = f", {rows[0]['n']} images" if len(counts) == 1 else ""
    table = _table(f"protocol {_title(protocol)}{number}")
    for heading in (*([] if number else ["images"]), *(METRICS[name].label for name in names)):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row["target"]), *([] if number else [str(row["n"])]), *(_cell(row, name) for name in names)
        )
    return table


def _costs(evaluation: Evaluation) -> Table:
    rows: Rows = [{"target": name, "cost": cost.as_dict()} for name, cost in evaluation.costs.items()]
    table = _table(f"cost: {_conditions(rows)}")
    for heading in COSTS:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(escape(row["target"]), *_cost_cells(row["cost"]))
    return table


def _table(title: str) -> Table:
    """Whose numbers stay whole where it is narrow: names are folded instead."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("target", overflow="fold", min_width=8)
    return table


def _title(protocol: Protocol) -> str:
    return f"{protocol.name} {protocol.hash()}, {protocol.size}x{protocol.size}"


def _conditions(rows: Rows) -> str:
    """On what the costs were measured; earlier results may be from another machine."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if cost := row.get("cost"):
            found.setdefault(f"{cost['device']}, batches of {cost['batch_size']}", []).append(row["target"])
    measured = [f"{where} ({', '.join(names)})" if len(found) > 1 else where for where, names in found.items()]
    return "; ".join([*measured, "memory beyond weights and images"])


def _remarks(evaluation: Evaluation) -> Iterator[str]:
    """What was skipped, and why; and the notes."""
    missing: dict[str, list[str]] = {}
    for row in evaluation.as_dict()["results"]:
        for name, reason in row["skipped"].items():
            label = METRICS[name].label if name in METRICS else name
            if not _is_equal(row, name) and label not in missing.setdefault(reason, []):
                missing[reason].append(label)
    yield from (f"skipped {', '.join(labels)}: {reason}" for reason, labels in missing.items() if labels)
    yield from (f"note: {note}" for note in evaluation.warnings())


def _names(rows: Rows) -> list[str]:
    """The metrics that at least one of them has."""
    return [name for name in METRICS if any(name in row["metrics"] or _is_equal(row, name) for row in rows)]


def _cell(row: Mapping[str, Any], name: str) -> str:
    if _is_equal(row, name):
        return "∞"
    if name not in row["metrics"]:
        return "-"
    value = row["metrics"][name]
    ends = row.get("intervals", {}).get(name)
    text = f"{value:.{METRICS[name].digits}f}" if abs(value) < 1000 else f"{value:.0f}"
    return text if ends is None or name != "psnr" else f"{text} ±{(ends[1] - ends[0]) / 2:.2f}"


def _is_equal(row: Mapping[str, Any], name: str) -> bool:
    return bool(row.get("skipped", {}).get(name) == EQUAL)


def _cost_cells(cost: Mapping[str, Any] | None) -> list[str]:
    if cost is None:
        return ["-"] * len(COSTS)
    peak = cost["peak_memory_bytes"]
    return [
        f"{cost['parameters'] / 1e6:.2f}",
        *(f"{cost[part] / 1e9:.2f}" for part in ("encode_macs", "decode_macs")),
        *(f"{rate:.1f}" if (rate := cost[f"{part}_images_per_s"]) else "-" for part in ("encode", "decode")),
        "-" if peak is None else f"{peak / 2**20:.0f}",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text of the user's without meaning to Markdown, in one line. An underscore inside a word has none."""
    return re.sub(r"([\\|*`<>\[\]#~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


class ImageValues(NamedTuple):
    """The metrics of one image and one contender, by name."""

    target: str
    key: str
    metrics: Mapping[str, float]


def write_csv(path: Path, rows: Iterable[ImageValues]) -> None:
    """One line per row: target, key, and the metrics in the order in which they first occur.

    Numbers have all their digits, an infinite PSNR is ``inf``, a metric that a row lacks is empty. The file is there
    whole or not at all; UTF-8, and a file name that is none keeps its bytes.
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    with (
        atomic_write(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["target", "key", *names])
        for row in rows:
            writer.writerow([row.target, row.key, *(repr(row.metrics[n]) if n in row.metrics else "" for n in names)])
