"""What goes wrong around a training: folders that vanish, loggers that can't write,
processes that are killed."""

import multiprocessing
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from olvae.cli.main import main
from olvae.config import save
from olvae.models.footprint import Footprint
from olvae.runs import Run
from olvae.training import run
from tests.conftest import plain_config
from tests.training.origins import assert_same_checkpoint, checkpoint

SAVES = (
    "lightning.callbacks.keep.target=olvae.training.saving.KeepCheckpoints",
    "lightning.callbacks.keep.params.every_n_steps=2",
    "lightning.trainer.val_check_interval=3",
)


def remove(root, name: str = "") -> None:
    (path,) = root.iterdir()
    shutil.rmtree(path / name)


@pytest.mark.parametrize(
    ("folder", "warning"),
    [
        ("images", "step=00000003.png: not written: No such file or directory"),
        (
            "tensorboard",
            "TensorBoardLogger: nothing more is logged there: No such file or directory",
        ),
    ],
)
def test_an_images_or_tensorboard_folder_that_vanishes_is_a_warning(
    train_with, tmp_path, image_folder, at_step, caplog, capfd, folder, warning
):
    at_step(2, lambda: remove(tmp_path / "runs", folder))
    run = train_with(*SAVES, "lightning.trainer.max_steps=6", config=plain_config(image_folder))
    assert checkpoint(run)["global_step"] == 6
    assert caplog.text.count(warning) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_deleted_run_ends_with_one_line_and_stays_deleted(
    train_with, tmp_path, image_folder, at_step, caplog, capfd
):
    at_step(1, lambda: remove(tmp_path / "runs"))
    with pytest.raises(OSError, match=r"last\.ckpt: .*is gone"):
        train_with(*SAVES, "lightning.trainer.max_steps=9", config=plain_config(image_folder))
    assert not any((tmp_path / "runs").glob("*"))
    assert "could not be written" not in caplog.text  # it is what the command prints
    assert "Traceback" not in capfd.readouterr().err


def test_a_training_whose_output_nobody_reads_goes_on(
    train_with, image_folder, at_step, monkeypatch
):
    """After `| head`, or in a terminal that was closed."""
    reader, writer = os.pipe()
    lines = "lightning.callbacks.progress"
    progress = (
        f"{lines}.target=olvae.training.progress.StepProgress",
        f"{lines}.params.line_every_s=0",
    )
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr(sys, "stderr", unread)
        at_step(2, lambda: os.close(reader))
        run = train_with(*progress, config=plain_config(image_folder))
        assert sys.stderr is unread
    assert checkpoint(run)["global_step"] == 4


class Fails(Callback):
    """A user's own callback with a mistake that shows after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def test_a_callback_that_fails_after_a_step_leaves_the_step(train_with, tmp_path, image_folder):
    """Bit for bit, with the average, whose turn comes after the callback's."""
    config = plain_config(image_folder, use_ema=True)
    config["lightning"]["trainer"]["val_check_interval"] = 4
    whole = train_with(config=config)
    fails = "lightning.callbacks.fails"
    with pytest.raises(ZeroDivisionError):
        train_with(
            f"{fails}.target={__name__}.Fails",
            f"{fails}.params.step=2",
            config=config,
            name="failed",
        )
    (path,) = (tmp_path / "runs").glob("*_failed_*")
    assert checkpoint(Run(path))["global_step"] == 2
    resumed = train_with(f"{fails}.params.step=9", resume=path)
    assert_same_checkpoint(resumed, whole)


def test_a_killed_loader_process_is_one_line_with_the_command_to_continue(
    tmp_path, image_folder, at_step, capfd, monkeypatch, quick_training
):
    monkeypatch.delenv("OLVAE_RUN", raising=False)
    at_step(3, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))
    save(plain_config(image_folder), tmp_path / "tiny.yaml")
    where = (
        "--base",
        str(tmp_path / "tiny.yaml"),
        "--logdir",
        str(tmp_path / "runs"),
        "--gpus",
        "0",
    )
    with pytest.raises(SystemExit) as ended:
        main(
            ["train", *where, *SAVES, "data.params.num_workers=1", "lightning.trainer.max_steps=99"]
        )
    assert ended.value.code == 1
    (path,) = (tmp_path / "runs").iterdir()
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: a loader process")
    assert "lower data.params.num_workers or data.params.batch_size" in line
    assert line.endswith(f"continue with: olvae train --resume {path}")


def test_a_checkpoint_that_the_first_process_can_not_write_ends_both(
    train_two, image_folder, monkeypatch
):
    """It alone writes; the next save names the file in each."""

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    ends = r"checkpoints/last\.ckpt: the checkpoint could not be written: .*No space left on device"
    train_two(
        *SAVES, "lightning.trainer.max_steps=9", config=plain_config(image_folder), raises=ends
    )


def test_gpu_memory_that_one_process_lacks_ends_both(train_two, image_folder, monkeypatch):
    """As another job's on one GPU; before any of them waits for the others."""
    on_gpu = SimpleNamespace(
        is_global_zero=False, strategy=SimpleNamespace(root_device=torch.device("cuda"))
    )
    monkeypatch.setattr(run, "_trainer", lambda *_: on_gpu)
    monkeypatch.setattr(run, "footprint", lambda *_, **__: Footprint(2**30, 2**30))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: ([2**40, 2**10][int(os.environ["RANK"])], 2**40)
    )
    train_two(
        config=plain_config(image_folder),
        raises="not even one image fits: a step with 4 images needs about",
    )
