"""What an evaluation leaves behind: a table, metrics.json, a figure."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from olvae.evaluation.evaluator import Result
from olvae.evaluation.protocol import Protocol
from olvae.figures import error_map, labelled_grid

__all__ = ["print_results", "write_figure", "write_metrics"]

UNITS = {"psnr": "PSNR, dB", "ssim": "SSIM"}


def print_results(results: Sequence[Result], protocol: Protocol) -> None:
    """The table, to standard error."""
    names = list(dict.fromkeys(name for result in results for name in (*result.metrics, *result.skipped)))
    table = Table("target", "images", title=f"protocol {protocol.name}, {protocol.size}x{protocol.size}")
    for name in names:
        table.add_column(UNITS[name], justify="right")
    for result in results:
        cells = [f"{result.metrics[name]:.3f}" if name in result.metrics else "-" for name in names]
        table.add_row(escape(result.target), str(result.n), *cells)
    Console(stderr=True).print(table)


def write_metrics(results: Sequence[Result], protocol: Protocol, path: Path) -> None:
    """metrics.json, whole or not at all."""
    content = {
        "protocol": protocol.as_dict(),
        "protocol_hash": protocol.hash(),
        "results": [result.as_dict() for result in results],
    }
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def write_figure(inputs: Tensor, results: Sequence[Result], path: Path) -> None:
    """Inputs, then each target's reconstructions and errors.

    Args:
        inputs: uint8 (N, 3, H, W).
    """
    rows = {"input, held out": inputs}
    for result in results:
        rows[f"{result.target}: reconstruction"] = result.examples
        rows[f"{result.target}: error, black 0 to white 64 of 255"] = error_map(inputs, result.examples)
    labelled_grid(rows).save(path)
