"""Bad steps, unreadable images and traces: what each callback does at a step, without training."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from olvae.data.source import BatchLoader
from olvae.models.updates.nonfinite import BadStep
from olvae.runs import Run
from olvae.training import callbacks
from olvae.training.callbacks import MAX_UNREAD_STEPS, BadSteps, StepTrace, UnreadableLimit


class Strategy:
    """Of one process on a CPU."""

    checkpoint_io = None
    root_device = torch.device("cpu")

    def broadcast(self, value: object) -> object:
        return value


def a_trainer(folder, **changes: object) -> SimpleNamespace:
    settings = {"global_step": 8, "global_rank": 0, "is_global_zero": True, "should_stop": False}
    optimizers = [
        SimpleNamespace(param_groups=[{"lr": 1.0}, {"lr": 2.0}]),
        SimpleNamespace(param_groups=[{"lr": 4.0}]),
    ]
    return SimpleNamespace(
        default_root_dir=folder, strategy=Strategy(), optimizers=optimizers, **settings | changes
    )


def rates(trainer: SimpleNamespace) -> list[float]:
    return [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("reports", "stops", "pending", "reads"),
    [
        (False, False, MAX_UNREAD_STEPS - 1, False),
        (False, False, MAX_UNREAD_STEPS, True),
        (False, True, 0, True),
        (True, False, 0, True),
    ],
)
def test_bad_steps_are_read_where_that_waits_for_nothing(
    tmp_path, monkeypatch, reports, stops, pending, reads
):
    bad, read, logged = BadSteps(), [], []
    bad.bad = 3
    monkeypatch.setattr(bad, "_read", lambda *given: read.append(given))
    model = SimpleNamespace(
        reports=reports,
        guard=SimpleNamespace(pending=pending),
        log=lambda *given: logged.append(given),
    )
    trainer = a_trainer(tmp_path, should_stop=stops)
    bad.on_train_batch_end(trainer, model, None)
    assert read == [(trainer, model)] * reads
    assert logged == [("health/bad_steps", 3.0)] * reports
    bad.on_train_end(trainer, model)
    assert len(read) == reads + 1


def test_a_run_of_bad_steps_has_a_state_and_a_range():
    bad = BadSteps(in_a_row=1, returns=0, rate_factor=1.0)
    assert (bad.in_a_row, bad.returns, bad.rate_factor) == (1, 0, 1.0)
    assert bad.state_dict() == {"bad": 0, "returned": 0, "row": 0}
    state = {"bad": 5, "returned": 2, "row": 1}
    bad.load_state_dict(state)
    assert bad.state_dict() == state
    for factor in (0.0, -0.5, 1.01):
        with pytest.raises(ValueError, match=rf"rate_factor .* got {factor}"):
            BadSteps(rate_factor=factor)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([BadStep(7, "kl", ["a"], False, False)], "step 7: kl is not finite: this update changed"),
        (
            [BadStep(7, "kl", ["a"], False)],
            "step 7: kl is not finite: this step changed nothing (1",
        ),
        (
            [BadStep(7, "kl", ["a"], False), BadStep(8, "rec", ["b", "c"], False)],
            "step 7: kl is not finite, and 1 of the steps after it are bad too: these steps",
        ),
    ],
)
def test_bad_steps_are_noted_with_their_images(tmp_path, capsys, steps, text):
    bad = BadSteps()
    bad.bad = len(steps)
    bad._report(a_trainer(tmp_path, global_rank=2), steps)
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith(text)
    notes = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert notes == [
        {"step": step.step, "rank": 2, "term": step.term, "keys": step.keys} for step in steps
    ]
    bad._report(a_trainer(tmp_path, is_global_zero=False), steps)
    assert capsys.readouterr().err == ""
    assert len((tmp_path / "bad_steps.jsonl").read_text().splitlines()) == 2 * len(steps)


def test_notes_that_cannot_be_written_stop_no_training(tmp_path, caplog):
    BadSteps()._report(a_trainer(tmp_path / "gone"), [BadStep(7, "kl", [], False)])
    assert "bad_steps.jsonl: " in caplog.text


@pytest.mark.parametrize(
    ("returned", "returns", "text"),
    [
        (0, 0, "kl was not finite for 4 steps in a row until step 7: look at"),
        (1, 1, "until step 7, in spite of a return to good"),
        (2, 2, "until step 7, in spite of 2 returns to good"),
    ],
)
def test_no_return_is_left_after_the_last(tmp_path, returned, returns, text):
    bad = BadSteps(returns=returns)
    bad.returned, bad._row = returned, 4
    trainer = a_trainer(tmp_path)
    with pytest.raises(FloatingPointError) as caught:
        bad._return(trainer, SimpleNamespace(rate_factor=1.0), BadStep(7, "kl", [], False))
    assert text in str(caught.value)
    assert rates(trainer) == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("saved", [False, True])
def test_a_return_lowers_all_rates_that_there_were(tmp_path, monkeypatch, capsys, saved):
    """Whatever the restored optimizers have; without a checkpoint the weights stay."""
    bad, trainer, model = BadSteps(rate_factor=0.25), a_trainer(tmp_path), SimpleNamespace()
    model.rate_factor = 0.5
    bad._row = 20
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    if saved:
        run.last_checkpoint.touch()

    def restore(*given: object) -> int:
        assert given == (trainer, model, run)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 99.0
        return 6

    checked: list[object] = []
    monkeypatch.setattr(callbacks, "check_written", checked.append)
    monkeypatch.setattr(callbacks, "_restore", restore)
    bad._return(trainer, model, BadStep(7, "kl", [], False))
    assert rates(trainer) == [0.25, 0.5, 1.0]
    assert model.rate_factor == 0.125
    assert checked == [trainer]
    assert (bad.returned, bad._row) == (1, 0)
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith("step 8: 20 bad steps in a row: ")
    assert ("back at step 6" in printed) == saved
    assert ("weights stay" in printed) != saved
    assert printed.endswith("multiplied by 0.25 (return 1 of 3)")


class Loader(BatchLoader):
    """Counts how often the processes share what they lost."""

    def __init__(self) -> None:
        self.shared = 0
        self.read_errors = SimpleNamespace(lost=0, share=self.share)

    def share(self) -> None:
        self.shared += 1


def test_unreadable_images_are_shared_where_there_are_new_ones():
    limit, loader = UnreadableLimit(), Loader()
    trainer = SimpleNamespace(train_dataloader=loader)
    counts = []
    for lost in (0, 1, 1, 3, 3):
        loader.read_errors.lost = lost
        limit.on_train_batch_start(trainer)
        counts.append(loader.shared)
    assert counts == [0, 1, 1, 2, 2]
    limit.on_train_batch_start(SimpleNamespace(train_dataloader=[1]))


class Profile:
    """In place of torch's profiler."""

    def __init__(self, **settings: object) -> None:
        self.calls: list[str] = []
        self.settings = settings

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


def test_a_trace_begins_after_the_first_steps_and_ends_after_its_own(tmp_path, monkeypatch, capsys):
    """Three updates are left out; micro-batches are no updates."""
    monkeypatch.setattr(callbacks, "profile", Profile)
    trace, written, trainer = StepTrace(2), [], a_trainer(tmp_path)
    monkeypatch.setattr(trace, "_write", lambda _, traced: written.append((len(states), traced)))
    states: list[bool] = []
    for complete in (True, True, False, True, False, True, True, True):
        trace.on_train_batch_start(trainer)
        states.append(trace._profile is not None)
        trace.on_train_batch_end(trainer, SimpleNamespace(update_is_complete=complete), None)
    assert states == [False] * 4 + [True] * 3 + [False]
    assert [number for number, _ in written] == [7]
    assert written[0][1].calls == ["start"]
    trace.on_train_end(trainer)
    trace._done = callbacks.UNTRACED + 2
    trace.on_train_end(trainer)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("device", "order", "ending"),
    [
        ("cpu", "self_cpu_time_total", "\n"),
        ("cuda", "self_cuda_time_total", ", 7 kernels a step\n"),
    ],
)
def test_a_trace_is_of_the_device_that_trains(tmp_path, monkeypatch, capsys, device, order, ending):
    """With the operations' shapes, and a table of those that take most of its time."""
    monkeypatch.setattr(callbacks, "profile", Profile)
    monkeypatch.setattr(callbacks, "count_kernels", lambda averages: 14)
    monkeypatch.setenv("COLUMNS", "1000")
    trace, trainer = StepTrace(2), a_trainer(tmp_path)
    trainer.strategy.root_device = torch.device(device)
    trace._done = callbacks.UNTRACED
    trace.on_train_batch_start(trainer)
    traced = trace._profile
    activities = [activity.name for activity in traced.settings["activities"]]
    assert activities == (["CPU"] if device == "cpu" else ["CPU", "CUDA"])
    assert traced.settings["record_shapes"] is True

    # The files, once the profiler is stopped.
    tables = []
    averages = SimpleNamespace(table=lambda **how: tables.append(how) or "operations")
    traced.export_chrome_trace = lambda path: traced.calls.append(path)
    traced.key_averages = lambda: averages
    trace._write(trainer, traced)
    assert traced.calls == ["start", "stop", str(tmp_path / "trace.json")]
    assert tables == [{"sort_by": order, "row_limit": 50}]
    assert (tmp_path / "trace.txt").read_text() == "operations"
    assert capsys.readouterr().err == f"2 steps traced in {tmp_path / 'trace.json'}{ending}"


@pytest.mark.parametrize("first", [True, False])
def test_a_trace_that_is_cut_off_is_stopped_by_the_first_process(
    tmp_path, monkeypatch, capsys, first
):
    monkeypatch.setattr(callbacks, "profile", Profile)
    trace, trainer = StepTrace(1), a_trainer(tmp_path, is_global_zero=first)
    trace._done = callbacks.UNTRACED
    trace.on_train_start(trainer)
    trace.on_train_batch_start(trainer)
    traced = trace._profile
    assert (traced is not None) == first
    trace.on_train_end(trainer)
    assert trace._profile is None
    assert not first or traced.calls == ["start", "stop"]
    assert ("needs 4 steps" in capsys.readouterr().err) == first
    trace.on_exception(trainer, None, torch.OutOfMemoryError())
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_full_leaves_a_snapshot_of_its_memory(tmp_path, monkeypatch, capsys):
    dumped, recorded = [], []
    monkeypatch.setattr(callbacks, "dump_memory_history", dumped.append)
    monkeypatch.setattr(
        callbacks, "record_memory_history", lambda entries: recorded.append(entries)
    )
    trainer = a_trainer(tmp_path)
    trainer.strategy.root_device = torch.device("cuda")
    trace = StepTrace()
    assert trace.steps == 3
    trace.on_train_start(trainer)
    assert recorded == [100_000]
    trace.on_exception(trainer, None, ValueError())
    assert dumped == []
    trace.on_exception(trainer, None, torch.OutOfMemoryError())
    assert dumped == [str(tmp_path / "memory.pickle")]
    assert "memory.pickle" in capsys.readouterr().err


def test_no_symptom_holds_for_a_value_that_was_not_logged():
    for _, holds, sentence in callbacks.SYMPTOMS:
        assert not holds(math.nan), sentence
