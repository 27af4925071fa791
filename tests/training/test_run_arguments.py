"""What a run makes of its settings before the first step: steps, order, locks, memory."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from olvae.config import ConfigError
from olvae.data.source import LoaderLayout
from olvae.models.footprint import Footprint
from olvae.models.updates.ddp import PlayersStrategy
from olvae.runs import Run
from olvae.training import run as training
from olvae.training.run import (
    _fit_trainer_args,
    _lock_resumed,
    _name_val_set,
    build_model,
    check_memory,
    continue_order,
    strategy_of,
    validation_limit,
)
from tests.conftest import plain_config


class Images:
    """What a run asks of a source; notes what it is told."""

    order = "sorted"
    val_limit = None

    def __init__(self, **changes: object) -> None:
        self.told: list[object] = []
        self.val_images = 10
        self.batch_size = 2
        self.shares_evenly = True
        vars(self).update(changes)

    def layout(self, start: int, world: int) -> LoaderLayout:
        return LoaderLayout(start, 3, world, 2)

    def keep_order(self, order: object) -> None:
        self.told.append(order)

    def check_processes(self, world: int) -> None:
        self.told.append(world)

    def describe_sorted(self) -> None:
        return None

    def describe_new_processes(self) -> str:
        return "other processes"

    def describe_val_set(self) -> str:
        return f"set of {self.val_limit}"


@pytest.mark.parametrize(
    ("checkpoint", "layouts", "told", "warns"),
    [
        ({}, [(0, 3, 2, 2)], [], False),
        ({"images_seen": 8, "order": "o", "layouts": [(0, 3, 2, 2)]}, [(0, 3, 2, 2)], ["o"], False),
        (
            {"images_seen": 8, "order": "o", "layouts": [(0, 1, 2, 2)]},
            [(0, 1, 2, 2), (8, 3, 2, 2)],
            ["o"],
            True,
        ),
        ({"images_seen": 8}, [(0, 3, 2, 2)], [None], False),
    ],
    ids=["new", "the same processes", "others", "before November 2026"],
)
def test_a_resumed_stream_continues_with_the_processes_so_far(
    capsys, checkpoint, layouts, told, warns
):
    model, source = SimpleNamespace(), Images()
    continue_order(model, source, checkpoint, 2)
    assert model.layouts == tuple(layouts)
    assert all(isinstance(layout, LoaderLayout) for layout in model.layouts)
    assert model.order == "sorted"
    assert source.told == told
    assert ("other processes" in capsys.readouterr().err) == warns


def test_sorted_images_are_warned_of_at_every_start(capsys):
    source = Images(describe_sorted=lambda: "sorted by class")
    for checkpoint in ({}, {"images_seen": 4}):
        continue_order(SimpleNamespace(), source, checkpoint, 1)
        assert capsys.readouterr().err.count("warning: sorted by class") == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_processes_agree_on_the_run_and_hold_its_lock(tmp_path, monkeypatch, resumed):
    run = Run(tmp_path) if resumed else None
    asked = []
    monkeypatch.setattr(training.processes, "check_same", asked.append)
    for folder in (tmp_path, run.checkpoints if run else tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        (folder / ".partial-1").touch()
    with ExitStack() as held:
        _lock_resumed(run, held)
        assert asked == [str(tmp_path) if resumed else ""]
        left = {path.parent.name for path in tmp_path.rglob(".partial-1")}
        assert left == ({"other"} if resumed else {"other", tmp_path.name})
        assert (tmp_path / ".lock").exists() == resumed
        if resumed:
            assert "process " in run.lock.read_text()
    assert not resumed or run.lock.read_text() == ""


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_another_one_trains_is_refused_after_the_patience(tmp_path, monkeypatch, again):
    """Where a launcher started again, the dead machine's lock may last."""
    patience, left = [], []

    def locked(run, patience_s=0.0, **given):
        patience.append(given.get("patience", patience_s))
        raise ConfigError("is being trained")

    monkeypatch.setattr(training, "locked", locked)
    monkeypatch.setattr(training, "leave", lambda: left.append(True))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(int(again)))
    with ExitStack() as held, pytest.raises(ConfigError, match="being trained"):
        _lock_resumed(Run(tmp_path), held)
    assert patience == [120.0 if again else 0.0]
    assert left == [True]

    def broken(run, **_):
        raise PermissionError(13, "Permission denied", str(run.lock))

    monkeypatch.setattr(training, "locked", broken)
    with ExitStack() as held, pytest.raises(ConfigError, match=r"\.lock: Permission denied"):
        _lock_resumed(Run(tmp_path), held)


STEPS = {"max_steps": 50, "accelerator": "cpu"}


def fitted(count: int = 1, step: int = 0, accumulated: int = 1, adversary=None, **given) -> dict:
    model = SimpleNamespace(accumulate_grad_batches=accumulated, adversary=adversary)
    source = Images()
    found = _fit_trainer_args(STEPS | given, model, source, count, {"global_step": step})
    assert source.told == [count]
    return found


def test_intervals_are_in_steps_and_lightnings_in_batches():
    """A validation at the end of a short run; the usual ones where the config has none."""
    usual = {"val_check_interval": 50, "log_every_n_steps": 20, "strategy": "auto"}
    assert fitted() == STEPS | usual
    assert fitted(max_epochs=-1, val_check_interval=None) == STEPS | usual
    assert fitted(max_steps=2000)["val_check_interval"] == 1000
    assert fitted(max_steps=1000)["val_check_interval"] == 1000
    given = fitted(accumulated=3, val_check_interval=7, log_every_n_steps=0)
    assert (given["val_check_interval"], given["log_every_n_steps"]) == (21, 0)
    assert fitted(log_every_n_steps=5, val_check_interval=1)["val_check_interval"] == 1
    assert fitted(max_steps=1)["max_steps"] == 1
    assert fitted(step=50)["max_steps"] == 50


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"max_steps": 0}, "max_steps: 0"),
        ({"max_steps": True}, "max_steps: True"),
        ({"max_steps": 9.0}, "max_steps: 9.0"),
        ({"val_check_interval": 0}, "val_check_interval: 0"),
        ({"log_every_n_steps": -1}, "log_every_n_steps: -1"),
        ({"max_epochs": 1}, "max_epochs"),
        ({"step": 51}, "at step 51, .* max_steps 50.*max_steps=102"),
        ({"strategy": "fsdp"}, "strategy: fsdp"),
    ],
)
def test_steps_of_a_run_have_a_range(given, wrong):
    with pytest.raises(ConfigError, match=wrong):
        fitted(**given)


def test_processes_get_their_strategy_and_batch_norm(monkeypatch):
    for accelerator, synchronised in (("cpu", None), ("cuda", True), ("gpu", True)):
        found = fitted(2, accelerator=accelerator)
        assert isinstance(found["strategy"], PlayersStrategy)
        assert found.get("sync_batchnorm") is synchronised
    assert fitted(accelerator="cuda", sync_batchnorm=False)["sync_batchnorm"] is False
    assert strategy_of({}) == "auto"
    assert strategy_of({"strategy": "ddp"}) == "ddp"
    with pytest.raises(ConfigError, match="strategy"):
        strategy_of({"strategy": ["ddp"]})


def test_an_adversary_is_checked_against_the_steps():
    checked = []
    adversary = SimpleNamespace(check=lambda *given: checked.append(given))
    fitted(adversary=adversary, max_steps=7)
    ((model, source, steps),) = checked
    assert (model.adversary, type(source), steps) == (adversary, Images, 7)


@pytest.mark.parametrize(
    ("limit", "count", "batches"),
    [
        (None, 1, None),
        (0, 1, (0, 1)),
        (4, 1, (4, 1)),
        (5, 1, None),
        (2, 2, (2, 2)),
        (3, 2, None),
        (0.0, 1, (0, 1)),
        (0.2, 1, (1, 1)),
        (0.99, 1, (4, 1)),
        (1.0, 1, None),
    ],
)
def test_a_limit_of_validation_in_batches_of_each_process(limit, count, batches):
    """Of ten images in batches of two: five in one process, three in each of two."""
    assert validation_limit(Images(), limit, count) == batches


def test_a_limit_of_unknown_images_is_in_batches_alone():
    for source in (Images(val_images=None), Images(shares_evenly=False)):
        assert validation_limit(source, 99, 1) == (99, 1)
        assert validation_limit(source, 0.5, 1) is None
    with pytest.raises(ConfigError, match=r"limit_val_batches: 0\.1: .* 5 in all"):
        validation_limit(Images(), 0.1, 1)


@pytest.mark.parametrize(
    ("limit", "resumed", "name", "said"),
    [
        (None, {}, "set of None", ""),
        (2, {}, "set of (2, 1)", ""),
        (0, {}, None, ""),
        (0, {"val_set": "before"}, "before", ""),
        (2, {"val_set": "set of (2, 1)"}, "set of (2, 1)", ""),
        (2, {"val_set": "before"}, "set of (2, 1)", "before -> set of (2, 1)"),
        (2, {"global_step": 1}, "set of (2, 1)", "did not note its validation images"),
        (2, {"val_set": None}, "set of (2, 1)", ""),
    ],
)
def test_the_images_of_validation_are_named(capsys, limit, resumed, name, said):
    model = SimpleNamespace()
    _name_val_set(model, Images(), {"limit_val_batches": limit}, 1, resumed)
    assert model.val_set == name
    printed = " ".join(capsys.readouterr().err.split())
    assert said in printed
    assert bool(said) == bool(printed)


def test_a_model_takes_over_what_lightning_would_do():
    """Its own settings stay where the trainer has none."""
    config = plain_config()
    config["model"]["base_learning_rate"] = 3e-3
    args = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "max_steps": 2}
    model = build_model(config, args)
    assert args == {"max_steps": 2}
    assert (model.accumulate_grad_batches, model.gradient_clip_val) == (3, 0.5)
    assert model.learning_rate == 3e-3
    plain = build_model(plain_config(), {"gradient_clip_algorithm": "norm"})
    assert plain.accumulate_grad_batches == 1
    with pytest.raises(ConfigError, match="gradient_clip_algorithm"):
        build_model(config, {"gradient_clip_algorithm": "value"})
    with pytest.raises(ConfigError, match=r"Identity .*LiteAutoencoderKL"):
        build_model({"model": {"target": "torch.nn.Identity"}}, {})
    with pytest.raises(ConfigError, match="betas"):
        build_model(plain_config(betas=[0.9, 3.0]), {})
    with pytest.raises(ConfigError, match="inference only"):
        build_model(plain_config(lossconfig={"target": "torch.nn.Identity"}), {})


@pytest.mark.parametrize(
    ("free", "bounded", "counted", "said"),
    [
        (4600, False, [None], None),
        (4599, False, [None, True], "checkpoint"),
        (4599, True, [None], "batch_size=2"),
        (1300, False, [None, True], "checkpoint"),
    ],
)
def test_memory_that_a_step_needs_is_counted_again_where_it_does_not_fit(
    monkeypatch, capsys, free, bounded, counted, said
):
    """Of four images 4,000 bytes, of which a seventh comes on top; of one 1,300."""
    asked = []

    def footprint(model, size, precision, checkpoint=None):
        asked.append(checkpoint)
        return Footprint(300, 925, 7) if checkpoint is None else Footprint(300, 200, 9)

    monkeypatch.setattr(training, "footprint", footprint)
    part = SimpleNamespace(needs_activations=bounded)
    model = SimpleNamespace(each_part=[part], accumulate_grad_batches=1)
    source = SimpleNamespace(size=16, batch_size=4)
    assert check_memory(model, source, "32", free) == 7
    assert asked == counted
    printed = capsys.readouterr().err
    assert (said or "") in printed
    assert bool(said) == bool(printed)
    assert check_memory(model, source, "32", 1225) == 7
    with pytest.raises(ConfigError, match="one image"):
        check_memory(model, source, "32", 1224)


def test_memory_that_cannot_be_counted_stops_nothing(monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("needs values\nand more")

    monkeypatch.setattr(training, "footprint", fails)
    assert check_memory(SimpleNamespace(), SimpleNamespace(size=16), "32", 1) == 0
    assert capsys.readouterr().err == "warning: memory: not counted: needs values\n"
    check_memory(SimpleNamespace(), SimpleNamespace(size=16), "32", 1, warns=False)
    assert capsys.readouterr().err == ""
