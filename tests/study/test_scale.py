"""What grows with shards, images and tasks, by counting operations: hardly faster than they."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from study.scale import GROWTH, Name, exponent


def operations(work: Callable[[], object]) -> int:
    """Count the bytecodes of this thread; in C only comparisons of a Name are any."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


QUICK = ("writing shards", "opening shards", "an epoch's start", "`data index`, once")


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if row.what.startswith(QUICK) else pytest.mark.slow)
        for row in GROWTH
    ],
    ids=lambda row: row.what,
)
def test_no_work_grows_much_faster_than_its_size(row, tmp_path):
    counts = []
    for size in row.small:
        folder = tmp_path / str(size)
        folder.mkdir()
        counts.append(operations(row.prepare(folder, size)))
    assert min(counts) > 0
    assert exponent(row.small, counts) < 1.2


def test_a_search_in_a_list_for_each_name_counts_as_quadratic():
    def search(n: int) -> Callable[[], object]:
        names = [Name(f"{number:06d}") for number in range(n)]
        others = [Name(name) for name in names]
        return lambda: sorted(others, key=names.index)

    sizes = (50, 100, 200)
    assert exponent(sizes, [operations(search(n)) for n in sizes]) > 1.8
