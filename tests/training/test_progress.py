"""The speed that the progress bar shows, and what it says while training waits for data."""

import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from olvae.training.progress import Status, describe_step, step_bar, tflops


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


@pytest.mark.parametrize(
    ("gpu", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", {"tflops": 247.25, "of_peak": 0.25}),
        ("NVIDIA H100 80GB HBM3", "32-true", {"tflops": 247.25, "of_peak": 247.25 / 495}),
        ("Tesla V100-SXM2-16GB", "16-mixed", {"tflops": 247.25, "of_peak": 247.25 / 125}),
        ("Tesla V100-SXM2-16GB", "bf16-mixed", {"tflops": 247.25}),
        ("NVIDIA H20", "bf16-mixed", {"tflops": 247.25}),
    ],
)
def test_operations_are_logged_with_their_share_of_the_peak(monkeypatch, gpu, precision, expected):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: gpu)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device="cuda:0"), precision=precision)
    assert tflops(trainer, 247.25e12) == expected
    assert tflops(trainer, 0.0) == {}  # not counted


def test_a_step_too_small_for_its_gpu_is_advised():
    model = SimpleNamespace(flop=2_740_000_000_000, compiled=False)
    few, many = (describe_step(model, images, 989.0) for images in (4, 32))
    expected = "step: 2.74 TFLOP an image, 11 TFLOP for 4 a process: about 28 ms on this GPU, less than Python needs"
    assert few == f"{expected} for it: with 8 images, or model.params.compile=true, it is busy"
    assert many.endswith("87.7 TFLOP for 32 a process: about 222 ms on this GPU")
    assert describe_step(model, 4, None) == "step: 2.74 TFLOP an image, 11 TFLOP for 4 a process"
    model.compiled = True
    assert describe_step(model, 4, 989.0).endswith("28 ms on this GPU")
