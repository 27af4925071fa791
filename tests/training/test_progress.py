"""The speed that the progress bar shows, and what it says while training waits for data."""

import io
import re
import resource
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from olvae.training import progress
from olvae.training.progress import Status, StepProgress, describe_step, notify, step_bar, tflops


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
    before, after = re.sub(r"\x1b\[[0-9;]*m", "", line).split("2/10")
    assert text in after
    assert "━" in before


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
    trainer.train_dataloader = []  # of a loader that knows no batch size
    StepProgress().on_train_start(trainer, SimpleNamespace(flop=10**12, compiled=False))
    assert " 1 TFLOP for 1 a process" in capsys.readouterr().err
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


class Logged(SimpleNamespace):
    """A model in a training: what it has seen, and what is logged."""

    def log_dict(self, values: dict[str, float]) -> None:
        self.values = values


def a_trainer(step: int = 3, **changes: object) -> SimpleNamespace:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    settings = {"callback_metrics": {"train/loss": torch.tensor(0.25)}, "world_size": 1}
    settings |= {"global_step": step, "max_steps": 10, "sanity_checking": False}
    return SimpleNamespace(strategy=strategy, **{**settings, **changes})


def test_the_loss_and_the_speed_are_those_of_steps_that_log(now, capsys):
    """Read from the device at no other step."""
    shown, model = StepProgress(line_every_s=0.0), Logged(reports=False, images_seen=8, flop=0)
    shown.on_train_batch_start()
    shown.on_train_batch_end(a_trainer(1), model)
    assert capsys.readouterr().err == "step 1/10\n"
    now(0.5)
    shown.on_train_batch_start()
    now(1.5)
    model.reports, model.images_seen = True, 24
    shown.on_train_batch_end(a_trainer(2), model)
    assert model.values["speed/images_per_s"] == 8.0
    assert model.values["speed/waiting_for_data"] == 0.25
    assert 0.01 < model.values["speed/memory_gib"] < 1000
    assert capsys.readouterr().err.startswith("step 2/10  loss 0.2500  8.0 images/s  waiting")
    shown.on_train_batch_end(a_trainer(3, callback_metrics={}), model)
    assert "loss" not in capsys.readouterr().err


def test_lines_come_at_their_interval_and_at_the_last_step(now, capsys):
    """The first one three seconds after the start."""
    shown, model = StepProgress(15.0), Logged(reports=False, images_seen=8, flop=0)
    shown.on_train_start(a_trainer(0), model)
    lines = []
    for step_number, wait in enumerate((2.9, 0.1, 14.9, 0.1, 0.0), start=6):
        now(wait)
        shown.on_train_batch_end(a_trainer(step_number), model)
        lines.append(len(capsys.readouterr().err.splitlines()))
    assert lines == [0, 1, 0, 1, 1]
    shown.disable()
    now(100.0)
    shown.on_train_batch_end(a_trainer(), model)
    shown.on_validation_end(a_trainer(), SimpleNamespace(validation_values={"val/psnr": 20.0}))
    assert capsys.readouterr().err == ""


def test_a_short_interval_is_the_first_ones_too(now, capsys):
    shown, model = StepProgress(1.0), Logged(reports=False, images_seen=8, flop=0)
    shown.on_train_start(a_trainer(0), model)
    now(0.9)
    shown.on_train_batch_end(a_trainer(1), model)
    assert capsys.readouterr().err == ""
    now(0.1)
    shown.on_train_batch_end(a_trainer(2), model)
    assert capsys.readouterr().err != ""


def test_a_validation_is_a_line_of_its_values(now, capsys):
    """Without those of the weights as trained; Lightning's trial is none."""
    values = {"val/psnr": 20.12345, "val_raw/psnr": 19.0, "val/lpips": 0.5}
    model = SimpleNamespace(validation_values=values)
    shown = StepProgress()
    now(5.0)
    shown.on_validation_end(a_trainer(), model)
    assert capsys.readouterr().err == "step 3: validation  psnr 20.123  lpips 0.500\n"
    assert shown._status._since == time.monotonic()
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=20)  # narrow, coloured
    shown.on_validation_end(a_trainer(), model)
    assert shown.console.file.getvalue() == "step 3: validation  psnr 20.123  lpips 0.500\n"
    shown.on_validation_end(a_trainer(sanity_checking=True), model)
    shown.on_validation_end(a_trainer(), SimpleNamespace(validation_values={"val_raw/psnr": 1.0}))
    assert capsys.readouterr().err == ""


def test_a_bar_counts_steps_twice_a_second_and_ends(now, monkeypatch):
    shown, model = StepProgress(), Logged(reports=False, images_seen=8, flop=0)
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    shown.on_train_start(a_trainer(2), model)
    bar = shown._bar
    assert bar.live.is_started
    (task,) = bar.tasks
    assert (task.completed, task.total) == (2, 10)
    done = []
    for number, wait in ((3, 20.0), (4, 0.25), (5, 0.25), (6, 0.25), (10, 0.0)):
        now(wait)
        shown.on_train_batch_end(a_trainer(number), model)
        done.append(task.completed)
    assert done == [3, 3, 5, 5, 10]
    shown.on_exception()
    assert shown._bar is None
    assert not bar.live.is_started


def test_status_before_two_steps_knows_no_speed(now):
    status = Status(5)
    assert (status.images_per_s(), status.waiting_share(), status.seconds_left(9)) == (0, 0, 0)
    assert str(status) == ""
    now(3.0)
    status.batch_arrived()
    status.step_ended(6, 48)
    assert (status.images_per_s(), status.waiting_share(), status.seconds_left(9)) == (0, 0, 0)
    now(2.0)
    status.step_ended(7, 64)
    assert (status.images_per_s(), status.seconds_left(9)) == (8.0, 4.0)
    status.loss = 0.5
    assert str(status) == "loss 0.5000  8.0 images/s"


def test_a_line_is_printed_as_it_is(monkeypatch, capsys):
    """Not cut, and without colours or marks of rich's own, also in a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    line = f"run 12: {'a/long/path/' * 20} [red]3[/red]"
    notify(line)
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{line}\n")


def test_waiting_of_a_tenth_is_not_shown(now):
    status = Status()
    step(status, now, 0.0, 1.0, 1)
    step(status, now, 1.0, 9.0, 2)
    assert status.waiting_share() == 0.1
    assert "waiting" not in str(status)


def test_operations_per_second_are_a_share_of_the_peak():
    assert tflops(2e12, None) == {"tflops": 2.0}
    assert tflops(2e12, 8.0) == {"tflops": 2.0, "of_peak": 0.25}
    assert (
        describe_step(10**12, 3, None, False) == "step: 1 TFLOP an image, 3 TFLOP for 3 a process"
    )
    exactly = describe_step(10**12, 10, 500.0, False, host_s=0.05, gpu="an H100")
    assert exactly.endswith("10 TFLOP for 10 a process: about 50 ms on an H100")


def test_memory_is_in_gib_of_each_kind_of_device(monkeypatch):
    """The peak of a GPU or of the process; on mps what it has now."""
    two = lambda *_: 2**31  # noqa: E731
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", two)
    assert progress._memory_gib(torch.device("mps")) == 2.0
    cpu = torch.device("cpu")
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert progress._memory_gib(cpu) == pytest.approx(usage, rel=0.01)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert progress._memory_gib(cpu) == pytest.approx(usage / 2**10, rel=0.01)
    monkeypatch.setattr(progress, "ON_WINDOWS", True)
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=2**31))
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: memory))
    assert progress._memory_gib(cpu) == 2.0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**32)
    assert progress._memory_gib(cpu) == 4.0


def test_a_gpus_reserved_memory_and_operations_are_logged(now, monkeypatch):
    """Of each process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**30)
    shown, model = StepProgress(), Logged(reports=False, images_seen=8, flop=10**12)
    shown._peak = 8.0
    shown.on_train_batch_end(a_trainer(1, world_size=2), model)
    now(1.0)
    model.reports, model.images_seen = True, 16
    shown.on_train_batch_end(a_trainer(2, world_size=2), model)
    values = {name.removeprefix("speed/"): value for name, value in model.values.items()}
    assert values["images_per_s"] == 8.0
    assert (values["memory_gib"], values["reserved_gib"]) == (1.0, 3.0)
    assert (values["tflops"], values["of_peak"]) == (4.0, 0.5)
