"""The values of single images, as a CSV file."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from olvae.files import whole

__all__ = ["ImageValues", "write_csv"]


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
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["target", "key", *names])
        for row in rows:
            writer.writerow([row.target, row.key, *(repr(row.metrics[n]) if n in row.metrics else "" for n in names)])
