"""The one way in which things are timed here: in turns, so that a change of the machine's load meets all of them."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

__all__ = ["Times", "Work", "clocked", "measure"]

Work = Callable[[], Sequence[float]]
"""Does something once or several times; returns the seconds of each."""


K = TypeVar("K", bound=Hashable)


@dataclass
class Times:
    """What was measured.

    Args:
        seconds: in the order measured.
        peak_bytes: the most that was allocated on the GPU beside what was there before; None on a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range: the middle half of the times lies within it; 0 for a single one."""
        if len(self.seconds) == 1:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return upper - lower


def measure(work: Mapping[K, Work], device: str, rounds: int, warm_up: bool = True) -> dict[K, Times]:
    """Measure each in turn, some rounds of all.

    Args:
        device: on which memory is measured, if it is a GPU.
        warm_up: whether a round that does not count comes first.
    """
    times = {name: Times() for name in work}
    on_gpu = device != "cpu"
    for turn in range(-int(warm_up), rounds):
        for name, run in work.items():
            before = 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            seconds = run()
            if turn < 0:
                continue
            times[name].seconds += seconds
            if on_gpu:
                peak = torch.cuda.max_memory_allocated(device) - before
                times[name].peak_bytes = max(peak, times[name].peak_bytes or 0)
    return times


def clocked(function: Callable[[], Any], device: str) -> Work:
    """Work that is one call of a function, until the device has finished it."""

    def run() -> list[float]:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        return [time.perf_counter() - start]

    return run


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
