"""Results as tables: on the terminal, in Markdown with the costs in the same rows, and per image as CSV."""

import csv
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from olvae.evaluation.precision import FULL, Precision
from olvae.evaluation.results import Results, Row
from olvae.evaluation.roundtrip import Cost
from olvae.files import atomic_write
from olvae.metrics.registry import METRICS

__all__ = ["findings", "large", "print_results", "write_csv", "write_markdown"]

FP16 = torch.finfo(torch.float16).max

COSTS = ("M params", "GMACs encode", "GMACs decode", "img/s encode", "img/s decode", "MiB peak")


def print_results(several: Sequence[Results]) -> None:
    """To standard error: a table per protocol, one of the costs, and what was skipped and why."""
    console = Console(stderr=True)
    for results in several:
        console.print(_quality(results))
    costs = {row.target: row.cost for row in several[0].rows if row.cost}
    if costs:
        columns = _cost_columns(several[0].rows)
        table = _table(f"cost: {_conditions(several[0].rows)}", columns)
        for target, cost in costs.items():
            table.add_row(escape(target), *_cost_cells(cost)[: len(columns)])
        console.print(table)
    for line in dict.fromkeys(line for results in several for line in _remarks(results)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_markdown(results: Results, path: Path) -> None:
    """metrics.md: the protocol, one table of quality and costs, and what was skipped and why."""
    rows = results.table
    names, costs = _names(rows), _cost_columns(rows)
    headings = ["target", "images", *(METRICS[name].label for name in names), *costs]
    lines = [
        f"Protocol {_title(results)}, of {_plain(str(results.images['source']))}.",
        "",
        _line(headings),
        _line(["---", *["---:"] * (len(headings) - 1)]),
    ]
    for row in rows:
        cells = [_plain(row.target), str(row.n), *(_cell(row, name) for name in names)]
        lines.append(_line([*cells, *_cost_cells(row.cost)[: len(costs)]]))
    if costs:
        lines += ["", f"Cost of one image; speed and memory: {_plain(_conditions(rows))}."]
    lines += ["", *(f"- {_plain(remark)}" for remark in _remarks(results))]
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


def _quality(results: Results) -> Table:
    rows = results.table
    names = _names(rows)
    alike = len({row.n for row in rows}) == 1
    table = _table(
        f"protocol {_title(results)}{f', {rows[0].n} images' if alike else ''}",
        [*([] if alike else ["images"]), *(METRICS[name].label for name in names)],
    )
    for row in rows:
        table.add_row(escape(row.target), *([] if alike else [str(row.n)]), *(_cell(row, name) for name in names))
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    """On a narrow terminal its numbers stay whole: names are folded instead."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("target", overflow="fold", min_width=8)
    for heading in headings:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    return table


def _title(results: Results) -> str:
    size = results.protocol["size"]
    return f"{results.protocol['name']} {results.protocol_hash}, {size}x{size}"


def _conditions(rows: Sequence[Row]) -> str:
    """What the costs were measured on; earlier results may be from another machine."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.cost:
            found.setdefault(f"{row.cost.device}, batches of {row.cost.batch_size}", []).append(row.target)
    parts = [f"{where} ({', '.join(names)})" if len(found) > 1 else where for where, names in found.items()]
    if _cost_columns(rows) == COSTS:
        parts.append("memory beyond weights and images")
    return "; ".join(parts)


def _remarks(results: Results) -> Iterator[str]:
    """What was found besides the table; what was skipped, and why; and the warnings."""
    yield from findings(results.table)
    skipped: dict[str, list[str]] = {}
    for row in results.table:
        for name, reason in row.skipped.items():
            label = METRICS[name].label if name in METRICS else name
            if label not in skipped.setdefault(reason, []):
                skipped[reason].append(label)
    yield from (f"skipped {', '.join(labels)}: {reason}" for reason, labels in skipped.items())
    yield from (f"warning: {warning}" for warning in results.warnings())


def findings(rows: Iterable[Row]) -> Iterator[str]:
    """A line for each student's latents, and one for each precision; rows in fp16 and bf16 follow that in float32."""
    full: Precision | None = None
    for row in rows:
        if row.latents is not None:
            overall, *channels = (
                "-" if value is None else f"{value:.3f}" for value in (row.latents.rmse, *row.latents.per_channel)
            )
            yield (
                f"latents of {row.target}: RMS error {overall} in standard deviations of {row.latents.teacher}; per "
                f"channel {', '.join(channels)}"
            )
        if row.precision is not None:
            full = row.precision if row.precision.dtype == FULL else full
            yield f"{row.target}: {_range(row, row.precision, full)}"


def _range(row: Row, found: Precision, full: Precision | None) -> str:
    """A precision in words.

    Args:
        full: the same target in float32.
    """
    broken = found.non_finite
    largest = full if full and broken.images else found  # in float32 the value that overflows is known
    parts = [f"largest activation {large(largest.largest_value)} at {largest.largest_name}"]
    if largest is not found:
        parts[0] += " in float32"
    if largest.largest_value > found.limit:
        parts[0] += f", beyond {large(found.limit)}"
    elif found.dtype == FULL:
        parts[0] += f"; fp16 ends at {large(FP16)}"
    if broken.images:
        parts.append(f"{broken.images} of {row.n} images non-finite, first at {broken.first}")
    if found.dtype == FULL:
        return "; ".join(parts)
    if found.psnr_lost is not None:
        parts.append(f"PSNR {-found.psnr_lost:+.3f} dB")
    return f"{'; '.join(parts)}: {'safe' if found.safe else 'not safe'}"


def large(value: float) -> str:
    """A magnitude: 71,234, 3.14, or 3.39e+38."""
    return f"{value:.2e}" if value >= 1e9 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _names(rows: Sequence[Row]) -> list[str]:
    """The metrics of which at least one row has a value."""
    return [name for name in METRICS if any(name in row.metrics for row in rows)]


def _cell(row: Row, name: str) -> str:
    if name not in row.metrics:
        return "-"
    value, ends = row.metrics[name], row.intervals.get(name)
    if math.isinf(value):
        return "∞"
    text = f"{value:.{METRICS[name].digits}f}" if abs(value) < 1000 else f"{value:.0f}"
    return text if ends is None or name != "psnr" else f"{text} ±{(ends[1] - ends[0]) / 2:.2f}"


def _cost_columns(rows: Sequence[Row]) -> Sequence[str]:
    """None if no cost is known; without memory if none was measured, as on a CPU; without speed, the same."""
    costs = [row.cost for row in rows if row.cost]
    if not costs:
        return ()
    if not any(cost.encode_images_per_s or cost.decode_images_per_s for cost in costs):
        return COSTS[:3]
    return COSTS if any(cost.peak_memory_bytes is not None for cost in costs) else COSTS[:-1]


def _cost_cells(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-"] * len(COSTS)
    return [
        f"{cost.parameters / 1e6:.2f}",
        f"{cost.encode_macs / 1e9:.2f}",
        f"{cost.decode_macs / 1e9:.2f}",
        *(f"{rate:.1f}" if rate else "-" for rate in (cost.encode_images_per_s, cost.decode_images_per_s)),
        "-" if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 2**20:.0f}",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """A user's text on one line, with Markdown's characters escaped, except underscores inside a word."""
    return re.sub(r"([\\|*`<>\[\]#~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))
