"""Checkpoints written in a thread: what is in them, in which order,
and what is left after a failure."""

import json
import time
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from olvae.runs import Run
from olvae.training import saving
from olvae.training.callbacks import UnreadableLimit
from olvae.training.saving import BackgroundCheckpointIO, CheckpointError, KeepCheckpoints
from tests.conftest import plain_config
from tests.models.steps import against, build

SAVE = torch.save
KEEP = "lightning.callbacks.keep"
EVERY_TWO = (
    f"{KEEP}.target=olvae.training.saving.KeepCheckpoints",
    f"{KEEP}.params.every_n_steps=2",
)


def content(value: float) -> dict:
    """As a trainer's: nested, with several types."""
    state = {
        "a": torch.full((3, 2), value),
        "b": torch.full((2, 2, 2, 2), value).to(memory_format=torch.channels_last),
    }
    return {
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(value)}}}],
        "loops": (1, "x"),
    }


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def half_a_file(fail):
    """A torch.save that writes half of a file, and then fails."""

    def save(value: object, path: Path) -> None:
        SAVE(value, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        fail()

    return save


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def test_a_background_save_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    """The call returns while the writer has not begun.

    Weights, and the dicts around them, then change.
    """
    may_write, saving, given = Event(), BackgroundCheckpointIO(), content(1.0)

    def slow(value: object, path: Path) -> None:
        assert may_write.wait(60)
        SAVE(value, path)

    monkeypatch.setattr(torch, "save", slow)
    saving.save_checkpoint(given, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())
    for tensor in (*given["state_dict"].values(), given["optimizer_states"][0]["state"][0]["step"]):
        tensor.zero_()
    given["state_dict"]["c"] = torch.ones(1)
    may_write.set()
    saving.wait()
    saved, expected = load(tmp_path / "a.ckpt"), content(1.0)
    assert saved["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(saved["state_dict"][name], tensor)
        assert saved["state_dict"][name].stride() == tensor.stride()
    assert saved["optimizer_states"] == expected["optimizer_states"]
    assert saved["loops"] == (1, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_background_saves_keep_their_order(tmp_path, monkeypatch):
    """Each file is written after the one before, a note after its checkpoint.

    One may wait for the first alone.
    """
    may_write, saving, seen = Event(), BackgroundCheckpointIO(), []

    def record(value: object, path: Path) -> None:
        assert may_write.wait(60)
        begun = sorted(file.name for file in tmp_path.iterdir())
        SAVE(value, path)
        seen.append(begun)

    monkeypatch.setattr(torch, "save", record)
    saving.save_checkpoint(content(0.0), tmp_path / "best.ckpt", storage_options={"step": 1})
    saving.save_checkpoint(content(1.0), tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())
    Timer(0.2, may_write.set).start()
    saving.wait(1)
    assert may_write.is_set()
    saving.save_checkpoint(content(2.0), tmp_path / "best.ckpt", storage_options={"step": 3})
    saving.teardown()
    assert seen == [[], ["best.ckpt", "best.json"], ["best.ckpt", "best.json", "last.ckpt"]]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 3}
    assert torch.equal(load(tmp_path / "best.ckpt")["state_dict"]["a"], torch.full((3, 2), 2.0))


@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_full_disk_leaves_the_checkpoint_before_and_is_told(tmp_path, monkeypatch, at_the_end):
    saving, path = BackgroundCheckpointIO(), tmp_path / "best.ckpt"
    saving.save_checkpoint(content(1.0), path, storage_options={"step": 1})
    saving.wait()
    monkeypatch.setattr(torch, "save", half_a_file(full_disk))
    saving.save_checkpoint(content(2.0), path, storage_options={"step": 2})
    while not saving._pending[0].done():
        time.sleep(0.01)
    with pytest.raises(OSError, match=r"best\.ckpt: .*No space") as caught:
        saving.teardown() if at_the_end else saving.wait(1)
    assert str(tmp_path) in str(caught.value)
    saving.teardown()  # told once
    assert torch.equal(load(path)["state_dict"]["a"], torch.ones(3, 2))
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.ckpt", "best.json"]


def test_a_disk_that_fills_up_in_a_save_is_its_cause(tmp_path, full_disk):
    """Not torch's "unexpected pos 8128 vs 8000"."""
    saving = BackgroundCheckpointIO()
    path = tmp_path / "last.ckpt"
    with full_disk(8192):
        saving.save_checkpoint({"a": torch.zeros(9999)}, path)
        with pytest.raises(OSError, match="written") as caught:
            saving.wait()
    assert str(caught.value) == f"{path}: the checkpoint could not be written: File too large"


def test_a_failed_save_does_not_cut_the_next_one_off(tmp_path):
    saving, may_write = BackgroundCheckpointIO(), Event()
    saving._writer.submit(may_write.wait)  # so that both are asked for before the first is written
    (tmp_path / "best.ckpt").mkdir()  # which no file can replace
    saving.save_checkpoint(content(1.0), tmp_path / "best.ckpt")
    saving.save_checkpoint(content(2.0), tmp_path / "last.ckpt")
    may_write.set()
    with pytest.raises(OSError, match=r"best\.ckpt: .*written"):
        saving.teardown()
    assert torch.equal(load(tmp_path / "last.ckpt")["state_dict"]["a"], torch.full((3, 2), 2.0))


def test_a_run_that_could_not_save_does_not_claim_success(
    train_with, tmp_path, image_folder, monkeypatch, capfd
):
    def last_fails(value: dict, path: Path) -> None:
        half_a_file(full_disk)(value, path) if value[
            "global_step"
        ] == 4 and "last" in path.name else SAVE(value, path)

    monkeypatch.setattr(torch, "save", last_fails)
    with pytest.raises(
        OSError,
        match=r"checkpoints/last\.ckpt: .*No space",
    ):
        train_with(*EVERY_TWO, config=plain_config(image_folder))
    assert "done after" not in capfd.readouterr().err
    (run,) = (tmp_path / "runs").iterdir()
    assert load(run / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert not list(run.glob("checkpoints/.partial-*"))


def test_a_callback_that_stops_after_a_validation_loses_nothing(train_with, image_folder):
    stop = "lightning.callbacks.stop"
    params = {"monitor": "val/psnr", "mode": "max", "patience": 1, "min_delta": 50}
    settings = [f"{stop}.target=lightning.pytorch.callbacks.EarlyStopping"]
    settings += [f"{stop}.params.{name}={value}" for name, value in params.items()]
    run = train_with(
        "lightning.trainer.max_steps=9",
        "lightning.trainer.val_check_interval=2",
        *settings,
        config=plain_config(image_folder, use_ema=True),
    )
    saved = load(run.last_checkpoint)
    assert saved["global_step"] == saved["averaging_state"]["n_averaged"] == 4
    raw = saved["current_model_state"]
    assert not all(torch.equal(saved["state_dict"][name], tensor) for name, tensor in raw.items())


class ValidatesNever(Callback):
    """Changes Lightning's mind on validations after the trainer was made."""

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        trainer.check_val_every_n_epoch = 2


def test_the_end_of_a_training_saves_where_no_validation_comes(train_with, image_folder):
    run = train_with(
        f"lightning.callbacks.never.target={__name__}.ValidatesNever",
        config=plain_config(image_folder, use_ema=True),
    )
    saved = load(run.last_checkpoint)
    assert saved["global_step"] == saved["averaging_state"]["n_averaged"] == 4
    raw = saved["current_model_state"]
    assert not all(torch.equal(saved["state_dict"][name], tensor) for name, tensor in raw.items())
    assert not list(run.checkpoints.glob("best*"))
    resumed = train_with("lightning.trainer.max_steps=5", resume=run.path)
    assert load(resumed.last_checkpoint)["global_step"] == 5


def test_an_error_within_an_update_keeps_the_last_whole_checkpoint(
    train_with, tmp_path, image_folder, monkeypatch
):
    def breaks(_, trainer, module, *__) -> None:
        if trainer.global_step == 3 and not module.update_is_complete:
            raise OSError("between two micro-batches")

    monkeypatch.setattr(UnreadableLimit, "on_train_batch_start", breaks)
    with pytest.raises(OSError, match="between two micro-batches"):
        train_with(
            *EVERY_TWO,
            "lightning.trainer.accumulate_grad_batches=2",
            config=plain_config(image_folder),
        )
    (run,) = (tmp_path / "runs").iterdir()
    assert load(run / "checkpoints" / "last.ckpt")["global_step"] == 2


class Reads(TorchDispatchMode):
    """Count how often a value is read from the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_weights_and_buffers_that_are_not_finite_are_not_saved(tmp_path):
    """They are checked with one read of the device.

    A buffer, as BatchNorm's, has no gradient that would show it.
    """
    saved, model, keep = [], build(against(lecam_weight=0.1)), KeepCheckpoints(every_n_steps=1)
    trainer = SimpleNamespace(
        default_root_dir=tmp_path,
        global_step=3,
        max_steps=3,
        should_stop=False,
        enable_validation=False,
        val_check_batch=None,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=2)),
        save_checkpoint=lambda path, storage_options: saved.append(path.name),
        strategy=SimpleNamespace(checkpoint_io=None, broadcast=lambda failure: failure),
    )
    with Reads() as reads:
        keep.on_train_batch_end(trainer, model, None, None, 0)
    assert reads.count == 1
    assert saved == ["last.ckpt"]
    parameters = dict(model.adversary.named_parameters())
    buffers = dict(model.adversary.named_buffers())
    running_var = next(name for name in buffers if name.endswith("running_var"))
    for name, tensor in ((running_var, buffers[running_var]), next(iter(parameters.items()))):
        with torch.no_grad():
            tensor.view(-1)[0] = float("inf")
        keep = KeepCheckpoints(every_n_steps=1)
        with pytest.raises(
            FloatingPointError,
            match=rf"non-finite .*step 3, in adversary\.{name}:",
        ):
            keep.on_train_batch_end(trainer, model, None, None, 0)
        with torch.no_grad():
            tensor.view(-1)[0] = 1.0
    assert saved == ["last.ckpt"]


def test_a_validation_of_nan_is_never_the_best():
    trainer, keep = SimpleNamespace(sanity_checking=False, global_step=3), KeepCheckpoints()
    keep._sign, saved = 1, []
    keep._save = lambda *arguments: saved.append(arguments[-1]["value"])
    for value in (float("nan"), 20.0, float("nan"), 19.0, 21.0):
        keep._keep_best(trainer, SimpleNamespace(validation_values={"val/psnr": value}))
    assert saved == [20.0, 21.0]


def test_the_best_value_of_another_metric_does_not_count(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    (run.checkpoints / "best.json").write_text('{"metric": "val/lpips", "value": 0.1, "step": 2}')
    assert KeepCheckpoints(best="val/lpips")._best_before(run) == 0.1
    assert KeepCheckpoints(best="val/psnr")._best_before(run) is None


def test_a_resumed_runs_config_is_written_with_its_first_last_checkpoint(tmp_path):
    """Once, and after the checkpoint."""
    config = tmp_path / "config.yaml"
    saving_io = BackgroundCheckpointIO(({"a": 1}, config), {"read": "before"})
    assert saving_io.load_checkpoint("nowhere") == {"read": "before"}
    saving_io.save_checkpoint(content(1.0), tmp_path / "best.ckpt")
    saving_io.wait()
    assert not config.exists()
    saving_io.save_checkpoint(content(1.0), tmp_path / "last.ckpt")
    saving_io.wait()
    assert config.read_text() == "a: 1\n"
    config.unlink()
    saving_io.save_checkpoint(content(2.0), tmp_path / "last.ckpt")
    saving_io.teardown()
    assert not config.exists()
    read = saving_io.load_checkpoint(tmp_path / "last.ckpt", torch.device("meta"))
    assert read["state_dict"]["a"].shape == (3, 2)
    assert read["state_dict"]["a"].is_meta  # Lightning's argument is handed on


def test_an_error_of_training_is_not_replaced_by_one_of_saving(tmp_path, caplog):
    io = BackgroundCheckpointIO()
    path = tmp_path / "gone" / "last.ckpt"
    io.save_checkpoint(content(1.0), path)
    try:
        raise KeyError
    except KeyError:
        io.teardown()
    assert caplog.messages == [
        f"{path}: the checkpoint could not be written: the run's folder is gone"
    ]


def test_copies_from_a_gpu_have_arrived_before_they_are_written(tmp_path, monkeypatch):
    io, waited = BackgroundCheckpointIO(), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(io._pending)))
    io.save_checkpoint(content(1.0), tmp_path / "last.ckpt")
    io.wait()
    assert waited == [0]


def test_a_failed_save_of_one_process_is_raised_in_all(tmp_path):
    """The first one writes; the others hear of it."""
    failing = BackgroundCheckpointIO()
    failing.save_checkpoint(content(1.0), tmp_path / "gone" / "last.ckpt")
    heard = []

    def trainer_of(io: object, answer: str | None) -> SimpleNamespace:
        def broadcast(failure: str) -> str:
            heard.append(failure)
            return failure if answer is None else answer

        return SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=io, broadcast=broadcast))

    with pytest.raises(CheckpointError, match="is gone"):
        saving.check_written(trainer_of(failing, None))
    with pytest.raises(CheckpointError, match="the first"):
        saving.check_written(trainer_of(None, "from the first"))
    saving.check_written(trainer_of(failing, None))
    assert heard[1:] == ["", ""]


def test_a_waiting_save_is_waited_for_only_where_there_are_too_many(tmp_path):
    io, may_write = BackgroundCheckpointIO(), Event()
    io._writer.submit(may_write.wait)
    for number in range(2):
        io.save_checkpoint(content(1.0), tmp_path / f"{number}.ckpt")
    io.wait(2)
    assert not list(tmp_path.iterdir())
    may_write.set()
    io.wait(1)
    assert (tmp_path / "0.ckpt").exists()
    io.teardown()
    assert len(io._pending) == 0


def test_the_place_of_good_weights_is_named_if_there_are_any(tmp_path):
    run = Run(tmp_path)
    assert saving.last_good(run) == ""
    run.checkpoints.mkdir()
    (run.checkpoints / "last.ckpt").touch()
    assert saving.last_good(run).endswith(str(tmp_path / "checkpoints" / "last.ckpt"))
