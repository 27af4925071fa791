"""SLURM queues a preempted job again, and the job continues its run."""

import os
import signal
from functools import partial

import pytest

from olvae.runs import Run
from olvae.training.processes import requeue
from olvae.training.run import TrainingStopped
from tests.conftest import plain_config
from tests.forks import fork_each
from tests.training.conftest import torchrun
from tests.training.origins import assert_same_checkpoint, checkpoint


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


def test_a_requeued_slurm_job_continues_its_run(
    train_with, image_folder, tmp_path, job, monkeypatch, at_step
):
    """SIGUSR1 is what `#SBATCH --signal=USR1@300` sends before the time is up."""
    command = partial(train_with, config=plain_config(image_folder))
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
def test_sigusr1_to_any_process_requeues_the_slurm_job(
    train_with, image_folder, under, job, at_step
):
    devices = ("lightning.trainer.accelerator=cpu", "lightning.trainer.devices=2")

    def work(rank: int) -> None:
        under(torchrun(rank, per_node=2))
        if rank == 1:
            at_step(0, partial(signal.raise_signal, signal.SIGUSR1))
        with pytest.raises(TrainingStopped):
            train_with(
                "lightning.trainer.max_steps=99",
                *devices,
                config=plain_config(image_folder),
                name="two",
            )

    fork_each(work)
    assert job.read_text() == "requeue 17\n"


def test_sigterm_requeues_nothing_and_a_slurm_array_has_its_own_names(
    train_with, image_folder, job, monkeypatch, at_step, capfd
):
    at_step(0, partial(signal.raise_signal, signal.SIGTERM))
    with pytest.raises(TrainingStopped):
        train_with(config=plain_config(image_folder))
    assert not job.exists()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "20")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    capfd.readouterr()
    requeue()
    assert job.read_text() == "requeue 20_3\n"
    assert "job 20_3 " in capfd.readouterr().err


def test_a_failed_scontrol_requeue_is_a_warning(job, monkeypatch, tmp_path, caplog):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2\nexit 1\n")
    requeue()
    assert "job 17 again: scontrol requeue: Requested" in caplog.text
    scontrol.unlink()
    monkeypatch.setenv("PATH", str(scontrol.parent))
    requeue()
    assert "scontrol requeue: No such" in caplog.text
