"""The stages of a run around Lightning's loop: what comes before it, its errors, and its end."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from olvae.runs import Run
from olvae.training import run as training
from olvae.training.callbacks import BadSteps, Health, StepTrace
from olvae.training.run import ProcessDiedError, TrainingStopped, _trainer, finish, fit
from olvae.training.saving import BackgroundCheckpointIO, KeepCheckpoints


class Loop:
    """In place of Lightning's trainer: notes how it is called, and may fail."""

    def __init__(self, error: BaseException | None = None, first: bool = True) -> None:
        self.error = error
        self.is_global_zero = first
        self.given: dict = {}
        self.logged: list = []
        self.max_steps, self.global_step = 10, 10
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))
        self.loggers = [
            SimpleNamespace(
                log_hyperparams=lambda config: self.logged.append(config),
                log_metrics=lambda values, step: self.logged.append((values, step)),
            )
        ]

    def fit(self, model: object, **given: object) -> None:
        self.given = {"model": model, **given}
        if self.error is not None:
            raise self.error


def prepared_of(resumed: Run | None = None, **changes: object) -> SimpleNamespace:
    """A training that can begin; notes what its model and source are asked."""
    asked: list = []

    def prepare(*given: object) -> list[str]:
        asked.append(given)
        return ["a line"]

    model = SimpleNamespace(
        compiled=False, linear_psnr=20.5, layouts="layouts", prepare=prepare, validation_values={}
    )
    source = SimpleNamespace(
        train_loader=lambda *given: ("train", *given), val_loader=lambda: "validation"
    )
    settings = {
        "model": model,
        "source": source,
        "plan": SimpleNamespace(
            resumed=resumed, previous=None, options=SimpleNamespace(profile=None)
        ),
        "settings": SimpleNamespace(seed=3, precision="32"),
        "config": {"a": 1},
        "fresh": ("encoder",),
        "images_seen": 5,
        "steps_done": 0,
        "checkpoint": {},
        "trainer_args": {"accelerator": "cpu", "devices": 1, "max_steps": 7},
        "stop": SimpleNamespace(
            preempted=True, agreed=False, requeues=False, listening=nullcontext
        ),
    }
    return SimpleNamespace(asked=asked, **settings | changes)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Fit in a run folder with a loop; returns what happened before it."""

    def run(loop: Loop, prepared: SimpleNamespace) -> list:
        told: list = []
        monkeypatch.setattr(training, "_trainer", lambda *_: loop)
        monkeypatch.setattr(training, "_print_start", lambda *_: told.append("summary"))
        monkeypatch.setattr(training.processes, "watch_processes", told.append)
        assert fit(prepared, Run(tmp_path)) is loop
        return told

    return run


@pytest.mark.parametrize("first", [True, False])
def test_a_new_run_prepares_its_model_and_logs_where_it_begins(begin, tmp_path, capsys, first):
    loop, prepared = Loop(first=first), prepared_of()
    assert begin(loop, prepared) == ["summary"] * first + [Run(tmp_path)]
    device = torch.device("cpu")
    assert prepared.asked == [(prepared.source, 3, device, ("encoder",))]
    assert capsys.readouterr().err == "a line\n" * first
    assert loop.logged == [{"a": 1}, ({"val/psnr": 20.5}, 0)]
    assert loop.given == {
        "model": prepared.model,
        "train_dataloaders": ("train", 3, 5, "layouts"),
        "val_dataloaders": "validation",
        "ckpt_path": None,
        "weights_only": True,
    }


def test_a_resumed_run_continues_from_its_checkpoint(begin, tmp_path):
    run = Run(tmp_path)
    loop, prepared = Loop(), prepared_of(run)
    begin(loop, prepared)
    assert prepared.asked == []
    assert loop.logged == [{"a": 1}]
    assert loop.given["ckpt_path"] == str(run.last_checkpoint)


@pytest.mark.parametrize("saved", [True, False])
def test_a_second_interrupt_names_the_run_that_can_be_continued(begin, tmp_path, saved):
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    if saved:
        run.last_checkpoint.touch()
    with pytest.raises(KeyboardInterrupt) as stopped:
        begin(Loop(SystemExit(1)), prepared_of())
    assert isinstance(stopped.value, TrainingStopped) == saved
    if saved:
        assert (stopped.value.run, stopped.value.preempted) == (run, True)


@pytest.mark.parametrize("error", [RuntimeError("x"), ConnectionError(), EOFError(), TypeError()])
@pytest.mark.parametrize("cause", [None, "a process died"])
def test_the_death_of_a_process_is_told_from_other_errors(
    begin, tmp_path, monkeypatch, error, cause
):
    monkeypatch.setattr(training.processes, "process_death", lambda _: cause)
    with pytest.raises(type(error) if cause is None else ProcessDiedError) as caught:
        begin(Loop(error), prepared_of())
    if cause is None:
        assert caught.value is error
    else:
        assert (str(caught.value), caught.value.run) == (cause, Run(tmp_path))
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("first", [True, False])
def test_a_gpus_least_memory_is_checked_in_all_processes(begin, monkeypatch, first):
    """And warned of by the first."""
    loop, prepared = Loop(first=first), prepared_of()
    loop.strategy.root_device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 900))
    monkeypatch.setattr(training, "of_each", lambda free: [free, free - 30])
    checked: list = []
    monkeypatch.setattr(training, "check_memory", lambda *given: checked.append(given) or 77)
    begin(loop, prepared)
    assert checked == [(prepared.model, prepared.source, "32", 70, first)]
    assert prepared.model.flop == 77


@pytest.mark.parametrize(
    ("step", "agreed", "requeues", "title"),
    [
        (10, False, False, "done after 10 steps"),
        (9, True, False, "stopped after 9 steps"),
        (1, True, True, "stopped after 1 step"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_end_is_told_by_the_first_process_and_a_stop_is_an_error(
    tmp_path, monkeypatch, step, agreed, requeues, title, first
):
    ended, queued = [], []
    monkeypatch.setattr(training, "print_ending", lambda *given: ended.append(given))
    monkeypatch.setattr(training.processes, "requeue", lambda: queued.append(True))
    listened: list = []
    stop = SimpleNamespace(
        preempted=True,
        agreed=agreed,
        requeues=requeues,
        listening=lambda: nullcontext(listened.append(True)),
    )
    loop = Loop(first=first)
    loop.global_step = step
    run, prepared = Run(tmp_path), prepared_of(stop=stop)
    prepared.model.linear_psnr = None
    if agreed:
        with pytest.raises(TrainingStopped) as stopped:
            finish(prepared, run, loop)
        assert (stopped.value.run, stopped.value.preempted) == (run, True)
    else:
        finish(prepared, run, loop)
    assert ended == [(run, title)] * first
    assert queued == [True] * (requeues and first)
    assert listened == [True] * (agreed and first)


class Own(Callback):
    """A callback of a config."""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Make a trainer; returns the settings that Lightning gets."""

    def run(prepared: SimpleNamespace) -> dict:
        monkeypatch.setattr(training.pl, "Trainer", lambda **settings: settings)
        monkeypatch.setattr(training, "make_loggers", lambda nodes, run: (nodes, run))
        return _trainer(prepared, Run(tmp_path))

    return run


def test_a_trainer_has_our_defaults_and_the_configs_settings(made, tmp_path):
    prepared = prepared_of(stop=Own())
    found = made(prepared)
    callbacks = found.pop("callbacks")
    assert callbacks[0] is prepared.stop
    names = [type(callback).__name__ for callback in callbacks[1:]]
    assert names == (
        [
            "UnreadableLimit",
            "BadSteps",
            "KeepCheckpoints",
            "ImageGrids",
            "Health",
            "StepProgress",
            "Lockstep",
        ]
    )
    (checkpoints,) = found.pop("plugins")
    assert isinstance(checkpoints, BackgroundCheckpointIO)
    assert checkpoints._config is None
    assert found == {
        "check_val_every_n_epoch": None,
        "deterministic": True,
        "benchmark": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 7,
        "logger": ({}, Run(tmp_path)),
        "default_root_dir": tmp_path,
        "use_distributed_sampler": False,
    }
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_configs_callbacks_take_the_place_of_ours(made, tmp_path):
    nodes = {
        "own": {"target": f"{__name__}.Own"},
        "bad": {"target": "olvae.training.callbacks.BadSteps", "params": {"returns": 0}},
        "keep": {"target": "olvae.training.saving.KeepCheckpoints"},
    }
    config = {"lightning": {"callbacks": nodes, "logger": {"csv": 1}}}
    resumed = Run(tmp_path)
    prepared = prepared_of(resumed, config=config, stop=Own())
    prepared.plan.options.profile = 4
    prepared.trainer_args = {"accelerator": "cuda", "benchmark": False}
    found = made(prepared)
    callbacks = found["callbacks"]
    for kind, count in ((Own, 2), (BadSteps, 1), (KeepCheckpoints, 1), (Health, 1), (StepTrace, 1)):
        assert sum(isinstance(callback, kind) for callback in callbacks) == count
    assert next(callback for callback in callbacks if isinstance(callback, BadSteps)).returns == 0
    assert callbacks[-1].steps == 4
    assert found["plugins"][0]._config == (config, resumed.config)
    assert found["logger"][0] == {"csv": 1}
    assert (found["deterministic"], found["benchmark"]) == (False, False)


def test_a_summary_comes_before_the_first_step_and_a_changed_rate_is_warned_of(
    tmp_path, monkeypatch, capsys
):
    """Of a resumed run, whose own config and checkpoint tell."""
    printed, described = [], []
    monkeypatch.setattr(training, "print_summary", lambda *given: printed.append(given))
    monkeypatch.setattr(
        training, "describe_new_rate", lambda *given: described.append(given) or lines.pop()
    )
    prepared, run, loop = prepared_of(checkpoint={"b": 2}), Run(tmp_path), Loop()
    lines = ["", "the rate is another"]
    training._print_start(prepared, run, loop)
    assert described == []
    prepared.plan.previous = {"c": 3}
    for text in ("warning: the rate is another\n", ""):
        training._print_start(prepared, run, loop)
        assert capsys.readouterr().err == text
    assert described == [(prepared.model, 10, {"b": 2}, {"c": 3})] * 2
    assert printed == [(prepared.settings, run, loop, prepared.model, prepared.source, 0, 5)] * 3


@pytest.mark.parametrize(("precision", "tf32"), [("32", False), ("bf16", False), ("tf32", True)])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_loop_runs_in_the_settings_of_its_precision(
    begin, monkeypatch, precision, tf32, compiled
):
    """TF32 where it is asked for; a compiler's stance that validation may change."""
    entered: list = []

    class Context:
        def __init__(self, value: object) -> None:
            self.value = value

        def __enter__(self) -> None:
            entered.append(self.value)

        def __exit__(self, *_: object) -> None:
            entered.append("left")

    monkeypatch.setattr(training, "tf32", Context)
    monkeypatch.setattr(torch.compiler, "set_stance", Context)
    prepared = prepared_of(settings=SimpleNamespace(seed=3, precision=precision))
    prepared.model.compiled = compiled
    begin(Loop(), prepared)
    contexts = ["default"] * compiled + [True] * tf32
    assert entered == contexts + ["left"] * len(contexts)


def test_a_stopped_training_is_an_interrupt_without_words(tmp_path):
    """Which Python would print."""
    stopped = TrainingStopped(Run(tmp_path))
    assert (str(stopped), stopped.run, stopped.preempted) == ("", Run(tmp_path), False)
