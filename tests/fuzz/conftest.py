"""What every input is watched for: time, memory, code that runs,
and errors that are not one line."""

import faulthandler
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from olvae.config import ConfigError

HANG_S = 30
MEMORY = 2 * 2**30
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
"""Audit events of a program that is started."""

SECONDS = float(os.environ.get("FUZZ_SECONDS", "1500"))
"""For all kinds together: a kind that has had its share leaves out the rest of its inputs."""

started: list[str] = []
sys.addaudithook(
    lambda event, arguments: started.append(f"{event} {arguments}") if event in STARTS else None
)


def _memory(key: str) -> int:
    return 1024 * int(
        re.search(rf"^{key}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1]
    )  # type: ignore[index]


class Watch:
    """Counts a kind's inputs by what came of them."""

    def __init__(self, kind: str, share: float) -> None:
        self.kind = kind
        self.until = time.monotonic() + share * SECONDS
        self.outcomes: Counter[str] = Counter()
        self.peak, self.slowest = 0, 0.0

    def __call__(self, use: Callable[[], Any]) -> None:
        if time.monotonic() > self.until:
            self.outcomes["left out"] += 1
            return
        lines: tuple[str, ...] = ()
        with self._limits():
            try:
                use()
            # which the commands print, a line each
            except (ValueError, OSError, ArithmeticError) as error:
                lines = error.mistakes if isinstance(error, ConfigError) else (str(error),)
        self.outcomes["refused" if lines else "read"] += 1
        assert all(line.strip() and "\n" not in line.strip() for line in lines), lines

    @contextmanager
    def _limits(self) -> Iterator[None]:
        started.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
        before, begun = _memory("VmRSS"), time.monotonic()
        faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.slowest = max(self.slowest, time.monotonic() - begun)
        self.peak = max(self.peak, grown := _memory("VmHWM") - before)
        assert grown < MEMORY, f"{grown} bytes of memory"
        assert not started, started

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        return (
            f"{self.kind}: {counts}; at most {self.slowest:.1f} s and {self.peak / 2**20:.0f} MiB"
        )


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Iterator[Watch]:
    """For a test whose parameter ``share`` is its part of the inputs and of the time."""
    one = Watch(request.node.name, request.function.share)
    yield one
    print(f"\n{one}")  # noqa: T201
    assert one.outcomes["read"]
