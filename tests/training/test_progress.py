"""The speed that the progress bar shows, and what it says while training waits for data."""

import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from olvae.training.progress import Status, StepProgress, describe_step, step_bar, tflops


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


def test_the_speed_leaves_out_the_first_step(now):
    status = Status()
    step(status, now, 50.0, 10.0, 1)
    for i in (2, 3, 4):
        step(status, now, 0.0, 0.5, i)
    assert str(status) == "16.0 images/s"
    assert status.seconds_left(10) == 3.0


def test_waiting_for_data_is_shown_when_its_share_is_large(now):
    status = Status()
    step(status, now, 9.0, 1.0, 1)
    step(status, now, 0.3, 0.7, 2)
    assert str(status) == "8.0 images/s  waiting for data 30% (raise data.params.num_workers)"
    for i in range(3, 12):
        step(status, now, 0.0, 1.0, i)
    assert "waiting" not in str(status)


def test_validation_counts_neither_as_training_nor_as_waiting(now):
    status = Status()
    step(status, now, 0.0, 1.0, 1)
    step(status, now, 0.0, 1.0, 2)
    now(100.0)
    status.validation_ended()
    step(status, now, 0.0, 1.0, 3)
    assert str(status) == "8.0 images/s"


def test_the_progress_bar_stays_on_one_line(now):
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


def test_progress_without_a_terminal_is_one_line(now, capsys):
    shown, at = StepProgress(line_every_s=0.0), SimpleNamespace(global_step=3, max_steps=10)
    for number in (1, 2):
        step(shown._status, now, 0.5, 0.5, number)
    shown.on_train_batch_end(at, SimpleNamespace(reports=False, images_seen=24))
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) > 80
    assert line.endswith("waiting for data 50% (raise data.params.num_workers)  0:00:04 left")
    StepProgress(line_every_s=0.0).on_train_batch_end(
        at, SimpleNamespace(reports=False, images_seen=8)
    )
    assert capsys.readouterr().err == "step 3/10\n"  # its first, from which there is no speed yet


@pytest.mark.parametrize(
    ("gpu", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989),
        ("NVIDIA GH200 480GB", "32-true", 495),
        ("Tesla V100-SXM2-16GB", "16-mixed", 125),
        ("Tesla V100-SXM2-16GB", "bf16-mixed", None),
        ("NVIDIA H20", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312),
        ("NVIDIA RTX A1000", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
    ],
)
def test_a_gpu_with_too_few_images_is_advised_and_its_share_logged(
    monkeypatch, capsys, gpu, precision, peak
):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: gpu)
    strategy, loader = SimpleNamespace(root_device="cuda:0"), SimpleNamespace(batch_size=4)
    trainer = SimpleNamespace(
        strategy=strategy, precision=precision, train_dataloader=loader, global_step=0
    )
    shown = StepProgress()
    shown.on_train_start(trainer, SimpleNamespace(flop=2_740_000_000_000, compiled=False))
    line = capsys.readouterr().err.strip()
    assert line.startswith("step: 2.74 TFLOP an image, 11 TFLOP for 4 a process")
    assert (shown._peak, "this GPU" in line) == (peak, peak is not None)
    share = {} if peak is None else {"of_peak": 247.25 / peak}
    assert tflops(247.25e12, shown._peak) == {"tflops": 247.25, **share}
    assert tflops(0.0, shown._peak) == {}  # not counted


def test_describe_step_says_how_many_images_keep_a_gpu_busy():
    few, many, compiled = (
        describe_step(10**12, n, 500.0, c) for n, c in ((4, False), (16, False), (4, True))
    )
    assert (
        "20 ms on this GPU, less than Python needs for it: with 10 images, or model.params.compile"
        in few
    )
    assert many.endswith("16 TFLOP for 16 a process: about 80 ms on this GPU")
    assert compiled.endswith("about 20 ms on this GPU")
