"""Measure time and peak memory of the cases of `olvae bench`, in turns.

A case's share of a limit compares its rate with the rate of a plain operation, a matrix product or
a copy, measured in the same rounds: what the machine reaches at most.
"""

import platform
import re
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from olvae.data.pixels.size_and_range import Size
from olvae.devices import FULL, PRECISIONS, autocast, device_name, now, peak_memory

# Does something once or several times; returns the seconds of each.
Work = Callable[[], Sequence[float]]

K = TypeVar("K", bound=Hashable)
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}  # so large that a product of matrices takes milliseconds

# Unit of work -> the row's entry for its rate, and a factor.
RATES = {"macs": ("gflop_per_s", 2e-9), "bytes": ("gbyte_per_s", 1e-9)}


@dataclass
class Times:
    """Measured seconds, in order, and peak memory."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # allocated on the GPU, beside what was there; None on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range, which has the middle half of the times; 0 for a single one."""
        lower, upper = np.percentile(self.seconds, (25, 75))
        return float(upper - lower)


@dataclass(frozen=True, eq=False)
class Case:
    """A benchmark: its work, the amount of work, and what it is compared with."""

    name: str
    variant: str
    precision: str
    run: Work
    images: int  # in each measured time; 0 for a limit without images
    size: Size = 0  # pixels; 0 where there are no images
    batch_size: int = 0
    work: float = 0.0  # what these images take, in `unit`
    unit: Literal["macs", "bytes", "images"] = "macs"
    # Name of a share -> a case that does work of this unit with nothing in the way.
    limits: Mapping[str, "Case"] = field(default_factory=dict)
    peer: "Case | None" = None  # the ratio of images per second is relative to it
    computed_bytes: int | None = None  # peak memory counted from shapes, where it can't be measured


@dataclass
class Setting:
    """What a group's cases have in common."""

    device: str
    size: int = 0  # pixels; 0 for a config's own
    batch_size: int = 0  # 0 for a config's own
    configs: Sequence[str | Path] = ()  # of training steps: files or recipes
    sources: Sequence[str] = ()  # SRC of images
    workers: Sequence[int] = (0, 1, 2)  # numbers of loader processes
    compiled: bool = False  # whether compiled variants are measured, where a compiler works

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]

    @property
    def precisions(self) -> list[str]:
        """float32 and bfloat16; on a GPU also float16."""
        return [FULL, "bf16"] if self.kind == "cpu" else [FULL, "bf16", "fp16"]

    def inference(self, function: Callable[[], object], precision: str = FULL) -> Work:
        """Work without gradients, under autocast unless the precision is float32."""

        def run() -> None:
            with torch.inference_mode(), autocast(self.kind, precision):
                function()

        return clocked(run, self.device)

    def noise(self, channels: int, side: int) -> Tensor:
        shape = (self.batch_size, channels, side, side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def products(self) -> dict[str, Case]:
        """A product of two square matrices in each precision."""
        cases = {}
        side = MATRIX_SIDE.get(self.kind, MATRIX_SIDE["cuda"])
        for name in self.precisions:
            dtype = PRECISIONS[name].dtype
            a = torch.randn(side, side, device=self.device, dtype=dtype)
            b = torch.randn(side, side, device=self.device, dtype=dtype)
            run = self.inference(partial(torch.matmul, a, b))
            cases[name] = Case("matrix product", "limit", name, run, 0, work=side**3)
        return cases


def clocked(function: Callable[[], object], device: str) -> Work:
    """Work that is one call of a function, until the device has finished it."""

    def run() -> list[float]:
        start = now(device)
        function()
        return [now(device) - start]

    return run


def machine(device: str) -> dict[str, Any]:
    """The device's name, threads, torch's version; with CUDA whether training in 32 has TF32."""
    if device == "cpu":
        listing = Path("/proc/cpuinfo")  # Linux has it
        text = listing.read_text(encoding="utf-8", errors="replace") if listing.is_file() else ""
        found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
        name = found[1] if found else platform.processor() or platform.machine()
    else:
        name = device_name(device)
    described: dict[str, Any] = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        described["tf32_convolutions"] = torch.backends.cudnn.allow_tf32
        described["tf32_products"] = torch.backends.cuda.matmul.allow_tf32
    return described


def measure_case(
    work: Mapping[K, Work], device: str, rounds: int, warm_up: bool = True
) -> dict[K, Times]:
    """Measure in rounds of all, so that a change of the machine's load meets all of them.

    With ``warm_up`` a round that does not count comes first.
    """
    times = {name: Times() for name in work}
    for turn in range(-int(warm_up), rounds):
        for name, run in work.items():
            peaks: list[int] = []
            with peak_memory(device, peaks):
                seconds = run()
            if turn >= 0:
                times[name].seconds += seconds
                if peaks:  # on a GPU
                    times[name].peak_bytes = max([*peaks, times[name].peak_bytes or 0])
    return times


def rows_of(
    group: str, cases: Sequence[Case], device: str, rounds: int, warm_up: bool
) -> list[dict[str, Any]]:
    """Measure the cases of a group; a row for each.

    A row has group, name, variant, precision, size, batch_size, images_per_s, median_ms and
    spread_ms (interquartile) of what is timed at once, and where they mean something: ratio, of
    images per second to the peer's; gflop_per_s or gbyte_per_s; shares of limits;
    peak_memory_bytes, measured on a GPU, else counted from shapes for networks.
    """
    times = measure_case({case: case.run for case in cases}, device, rounds, warm_up)
    rows = []

    # Entries without a meaning for a case are left out.
    for case, measured in times.items():
        row: dict[str, Any] = {
            "group": group,
            "name": case.name,
            "variant": case.variant,
            "precision": case.precision,
        }
        if case.size:
            row |= {"size": case.size, "batch_size": case.batch_size}
        if case.images:
            row["images_per_s"] = case.images / measured.median
        if case.peer is not None:
            row["ratio"] = row["images_per_s"] * times[case.peer].median / case.peer.images
        row |= {"median_ms": 1e3 * measured.median, "spread_ms": 1e3 * measured.spread}

        # Rates of the work, and shares of a limit's rate.
        if case.unit in RATES and case.work:
            rate, factor = RATES[case.unit]
            row[rate] = factor * case.work / measured.median
        for share, limit in case.limits.items():
            row[share] = (case.work / measured.median) / (limit.work / times[limit].median)
        peak = case.computed_bytes if measured.peak_bytes is None else measured.peak_bytes
        if peak is not None:
            row["peak_memory_bytes"] = peak
        rows.append(row)
    return rows
