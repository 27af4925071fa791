"""The speed that the progress bar shows, and what it says while training waits for data."""

import re
import time

import pytest
from rich.console import Console

from olvae.training.progress import Status, step_bar


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is set."""
    at = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])

    def wait(seconds: float) -> None:
        at[0] += seconds

    return wait


def step(status: Status, now, wait: float, work: float, number: int) -> None:
    now(wait)
    status.batch_arrived()
    now(work)
    status.step_ended(number, number * 8)


def test_rates_leave_out_the_first_step(now):
    status = Status()
    step(status, now, 50.0, 10.0, 1)
    for i in (2, 3, 4):
        step(status, now, 0.0, 0.5, i)
    assert str(status) == "16.0 images/s"
    assert status.seconds_left(10) == 3.0


def test_a_share_of_waiting_is_shown_when_it_is_large(now):
    status = Status()
    step(status, now, 9.0, 1.0, 1)
    step(status, now, 0.3, 0.7, 2)
    assert str(status) == "8.0 images/s  waiting for data 30% (raise data.params.num_workers)"
    for i in range(3, 12):
        step(status, now, 0.0, 1.0, i)
    assert "waiting" not in str(status)


def test_validation_is_neither_training_nor_waiting(now):
    status = Status()
    step(status, now, 0.0, 1.0, 1)
    step(status, now, 0.0, 1.0, 2)
    now(100.0)
    status.validation_ended()
    step(status, now, 0.0, 1.0, 3)
    assert str(status) == "8.0 images/s"


def test_the_bar_stays_on_one_line(now):
    status = Status()
    step(status, now, 9.0, 1.0, 1)
    step(status, now, 0.01, 0.04, 2)
    status.loss = 0.4325
    bar = step_bar(Console(width=120, force_terminal=True), status, 2, 10)
    with bar.console.capture() as capture:
        bar.console.print(bar.get_renderable())
    (line,) = capture.get().splitlines()
    text = "loss 0.4325  160.0 images/s  waiting for data 20% (raise data.params.num_workers)"
    assert text in re.sub(r"\x1b\[[0-9;]*m", "", line)
