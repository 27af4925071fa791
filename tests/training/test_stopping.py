"""Stopped and resumed in the middle of phase B, through the command's own function."""

import os
import signal
import sys
from functools import partial

import pytest

from olvae.config import ConfigError
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.optimizers import lr_factor
from olvae.runs import Run
from olvae.training.callbacks import GracefulStop
from olvae.training.processes import requeue
from olvae.training.run import TrainingStopped
from olvae.training.settings import parse_time
from tests.conftest import tiny_config
from tests.models.steps import Each, against, build, fit
from tests.test_devices import fork_each
from tests.training.conftest import torchrun
from tests.training.events import scalars
from tests.training.origins import assert_same_checkpoint, checkpoint, phase_b


@pytest.fixture
def go(train_with, image_folder):
    """Train a tiny phase B; returns the run."""

    def run(steps: int, *overrides: str, **options) -> Run:
        return train_with(
            f"lightning.trainer.max_steps={steps}",
            *overrides,
            config=phase_b(image_folder),
            **options,
        )

    return run


def test_what_is_saved_and_logged_in_phase_b(go):
    run = go(3)
    saved = checkpoint(run)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {
        "encoder",
        "decoder",
        "adversary",
        "parts",
    }
    assert {name.split(".")[0] for name in saved["current_model_state"]} == {"encoder", "decoder"}
    assert len(saved["optimizer_states"]) == 2
    assert saved["global_step"] == 3
    assert saved["iteration"] == 4  # one batch, of two updates, warmed up
    assert int(saved["state_dict"]["adversary._extra_state"]) > 2
    assert saved["state_dict"]["adversary.lecam.real_anchors"].any()
    train_names = {"adversarial", "discriminator", "lecam", "r1", "anchor"}
    health_names = {"logits_real", "logits_fake", "accuracy", "gradient_ratio"}
    names = {f"train/{name}" for name in train_names} | {f"health/{name}" for name in health_names}
    logged = scalars(run.path)
    assert names <= set(logged)
    assert set(logged["train/loss"]) == {1, 2, 3}


def test_a_signal_stops_between_updates(image_folder):
    """In between, gradients would be lost, LeCam's anchors moved twice, and Lightning's count of batches no longer
    that of micro-batches: later validations would clear half an update's gradients."""
    model, sent = build(against(), accumulate_grad_batches=3), []

    def look(m: LiteAutoencoderKL) -> None:
        if m.global_step == 1 and not m.update_is_complete and not sent:
            sent.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    fit(model, image_folder, 9, batch_size=2, callbacks=[Each(look), GracefulStop()])
    assert model.trainer.global_step in (1, 2)
    assert sent
    assert model.update_is_complete


def test_a_signal_in_the_warm_up_leaves_a_checkpoint(go, tmp_path, monkeypatch):
    step = LiteAutoencoderKL.training_step

    def interrupt(self, batch, batch_idx):
        if self.adversary.updates == 2 and self.update_is_complete:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LiteAutoencoderKL, "training_step", interrupt)
    params = "model.params.adversary_config.params"
    with pytest.raises(KeyboardInterrupt):
        go(2, f"{params}.start_step=0", f"{params}.warmup_updates=20")
    (path,) = (tmp_path / "runs").iterdir()
    assert checkpoint(Run(path))["iteration"] >= 1


@pytest.mark.parametrize("saves", [False, True])
def test_a_second_signal_names_the_run_if_it_can_be_continued(
    train_with, tmp_path, image_folder, at_step, saves
):
    keep, every = "lightning.callbacks.keep", 2 if saves else 9
    settings = [
        f"{keep}.target=olvae.training.saving.KeepCheckpoints",
        f"{keep}.params.every_n_steps={every}",
    ]
    at_step(3, sys.exit)  # Lightning's answer to an interrupt
    with pytest.raises(KeyboardInterrupt) as stopped:
        train_with(
            "lightning.trainer.val_check_interval=9", *settings, config=tiny_config(image_folder)
        )
    assert isinstance(stopped.value, TrainingStopped) == saves
    assert (tmp_path / "runs").exists() == saves


def test_both_sides_take_another_schedule_when_resumed(go, monkeypatch):
    run, rates, update = go(2), [], LiteAutoencoderKL._update

    def note(self, *args, **kwargs):
        rates.append(
            [
                optimizer.param_groups[0]["lr"] / optimizer.defaults["lr"]
                for optimizer in self.optimizers()
            ]
        )
        update(self, *args, **kwargs)

    monkeypatch.setattr(LiteAutoencoderKL, "_update", note)
    go(5, "model.params.warmup_steps=1", "model.params.decay_steps=4", resume=run.path)
    assert rates[0] == pytest.approx(2 * [lr_factor(2, "cosine", 1, 4, 0.0)])


def test_times():
    texts = {"3h50m": 13800, "45m": 2700, "90s": 90, "1d12h": 129600, "1h0m5s": 3605}
    assert {text: parse_time(text) for text in texts} == texts
    for text in ("", "3", "1.5h", "50m3h", "3 h", "-1h"):
        with pytest.raises(
            ConfigError, match=r"`time_limit` .*: give days, hours, minutes or seconds, as in 3h50m"
        ):
            parse_time(text)


def test_the_limit_on_time_stops_as_a_signal_does(train_with, tmp_path, image_folder, capfd):
    with pytest.raises(TrainingStopped) as caught:
        train_with(
            "lightning.trainer.max_steps=100000", config=tiny_config(image_folder), time_limit="1s"
        )
    assert caught.value.preempted
    (path,) = (tmp_path / "runs").iterdir()
    assert 0 < checkpoint(Run(path))["global_step"] < 100000
    assert caught.value.run == Run(path)
    assert "the time limit: stopping after this step, with a checkpoint" in capfd.readouterr().err


@pytest.fixture
def job(tmp_path, monkeypatch):
    """SLURM's batch script that calls Python, with an scontrol that writes down its arguments."""
    for name, value in {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "a"}.items():
        monkeypatch.setenv(name, value)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked.txt"}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    return tmp_path / "asked.txt"


def test_a_requeued_job_continues_its_run(
    train_with, image_folder, tmp_path, job, monkeypatch, at_step
):
    """SIGUSR1 is what `#SBATCH --signal=USR1@300` sends before the time is up."""
    command = partial(train_with, config=tiny_config(image_folder))
    whole = command()
    at_step(1, partial(signal.raise_signal, signal.SIGUSR1))
    with pytest.raises(TrainingStopped):
        command()
    assert job.read_text() == "requeue 17\n"
    (begun,) = set((tmp_path / "runs").iterdir()) - {whole.path}
    assert checkpoint(Run(begun))["global_step"] < 4
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    continued = command()
    assert continued.path == begun != whole.path
    assert_same_checkpoint(continued, whole)
    assert command().path == begun  # a job of several trainings repeats none
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert command().path not in (begun, whole.path)


@pytest.mark.slow
def test_sigusr1_to_any_process_queues_the_job_again(train_with, image_folder, under, job, at_step):
    devices = ("lightning.trainer.accelerator=cpu", "lightning.trainer.devices=2")

    def work(rank: int) -> None:
        under(torchrun(rank, per_node=2))
        if rank == 1:
            at_step(0, partial(signal.raise_signal, signal.SIGUSR1))
        with pytest.raises(TrainingStopped):
            train_with(
                "lightning.trainer.max_steps=99",
                *devices,
                config=tiny_config(image_folder),
                name="two",
            )

    fork_each(work)
    assert job.read_text() == "requeue 17\n"


def test_sigterm_queues_nothing_and_an_array_has_its_own_names(
    train_with, image_folder, job, monkeypatch, at_step
):
    at_step(0, partial(signal.raise_signal, signal.SIGTERM))
    with pytest.raises(TrainingStopped):
        train_with(config=tiny_config(image_folder))
    assert not job.exists()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "20")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue()
    assert job.read_text() == "requeue 20_3\n"


def test_what_scontrol_says_is_a_warning(job, monkeypatch, tmp_path, caplog):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2\nexit 1\n")
    requeue()
    assert (
        "SLURM does not queue job 17 again: scontrol requeue: Requested operation is presently"
        in caplog.text
    )
    scontrol.unlink()
    monkeypatch.setenv("PATH", str(scontrol.parent))
    requeue()
    assert "scontrol requeue: No such file or directory" in caplog.text
