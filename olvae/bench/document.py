"""The document of ``olvae bench all``: the machine, a row for each case, and what moved since another document."""

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from olvae.bench.cases import GROUPS, Case, Phase, Setting
from olvae.bench.timing import Times, measure
from olvae.config import ConfigError

__all__ = ["bench_all", "check_machine", "machine", "moved", "read_document"]

CASE = ("group", "name", "variant", "precision", "size", "batch_size")
"""Entries of a row that say what was measured."""

MACHINE = ("device", "threads")
"""Entries of a document without which its seconds can't be compared."""

RATES = {"macs": ("gflop_per_s", 2e-9), "bytes": ("gbyte_per_s", 1e-9)}
"""By unit of work: the row's entry, and how many of it the unit is."""


def bench_all(
    groups: Sequence[str],
    device: str,
    rounds: int,
    on_group: Callable[[str, int], None],
    *,
    size: int | None = None,
    batch_size: int | None = None,
    compiled: bool = False,
    phases: Mapping[str, Phase] | None = None,
) -> dict[str, Any]:
    """Measure groups of cases, the cases of a group in turns.

    Args:
        groups: names of :data:`~olvae.bench.cases.GROUPS`.
        rounds: of all cases of a group.
        on_group: called with a group's name and number of cases before it is measured.
        size: pixels, for all groups but the training steps; by default each group has its own.
        batch_size: likewise.
        compiled: whether compiled variants are measured, where a compiler works.
        phases: training phases by name, for the training steps.

    Returns:
        What :func:`machine` says, with date and rounds, and ``rows``. A row has group, name, variant, precision, size,
        batch_size, images_per_s, median_ms and spread_ms (the interquartile range) of what is timed at once, and where
        they mean something: gflop_per_s or gbyte_per_s; shares of limits measured in the same rounds, of_product,
        of_convolution, of_copy, of_floor and of_encoder; peak_memory_bytes on a GPU, beside what lay there before.
    """
    kind = device.partition(":")[0]
    rows = []
    for name in groups:
        group = GROUPS[name]
        pixels, images = group.sizes.get(kind, (0, 0))
        with ExitStack() as stack:
            setting = Setting(device, size or pixels, batch_size or images, stack, compiled, phases or {})
            cases = group.cases(setting)
            on_group(name, len(cases))
            times = measure({case: case.run for case in cases}, device, rounds, group.warm_up)
        rows += [_row(name, case, times) for case in cases]
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**machine(device), "date": date, "rounds": rounds, "rows": rows}


def machine(device: str) -> dict[str, Any]:
    """The device's name, threads, torch's version; on a GPU whether float32 is computed in TF32."""
    described: dict[str, Any] = {
        "device": _processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device != "cpu":
        described["tf32_convolutions"] = torch.backends.cudnn.allow_tf32
        described["tf32_products"] = torch.backends.cuda.matmul.allow_tf32
    return described


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _row(group: str, case: Case, times: Mapping[Case, Times]) -> dict[str, Any]:
    measured = times[case]
    row: dict[str, Any] = {"group": group, "name": case.name, "variant": case.variant, "precision": case.precision}
    if case.size:
        row |= {"size": case.size, "batch_size": case.batch_size}
    if case.images:
        row["images_per_s"] = case.images / measured.median
    row |= {"median_ms": 1e3 * measured.median, "spread_ms": 1e3 * measured.spread}
    if case.unit in RATES:
        rate, factor = RATES[case.unit]
        row[rate] = factor * case.work / measured.median
    for share, limit in case.limits.items():
        row[share] = (case.work / measured.median) / (limit.work / times[limit].median)
    if measured.peak_bytes is not None:
        row["peak_memory_bytes"] = measured.peak_bytes
    return row


def read_document(path: Path) -> dict[str, Any]:
    """Read what ``olvae bench all --json`` printed.

    Raises:
        ConfigError: the file is missing or something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        for row in document["rows"]:
            float(row["median_ms"]), float(row["spread_ms"]), row["name"]
        _ = [document[key] for key in MACHINE]
    except OSError as error:
        raise ConfigError(f"--against {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--against {path}: is not what `olvae bench all --json` prints") from error
    return dict(document)


def check_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: a document comes from another device, or another number of threads, than this machine has now."""
    for key in MACHINE:
        if before[key] != now[key]:
            raise ConfigError(
                f"--against: {key} was {before[key]} and is {now[key]} now: seconds of two machines can't be compared; "
                "measure both on one"
            )


def moved(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cases whose medians differ by more than both spreads together.

    Args:
        before: rows of a document; those that are in one of the two alone are left out.
        now: rows of another.

    Returns:
        For each: what was measured, before_ms, now_ms, and ratio, the time now by the time before.
    """
    known = {_key(row): row for row in before}
    rows = []
    for row in now:
        old = known.get(_key(row))
        if old is None or abs(row["median_ms"] - old["median_ms"]) <= row["spread_ms"] + old["spread_ms"]:
            continue
        named = {key: row[key] for key in CASE if key in row}
        ratio = row["median_ms"] / old["median_ms"]
        rows.append({**named, "before_ms": old["median_ms"], "now_ms": row["median_ms"], "ratio": ratio})
    return rows


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in CASE)
