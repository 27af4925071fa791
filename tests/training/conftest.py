"""Fixtures that train as the command does: in this process, in two forked ones,
and with a launcher's variables."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from olvae.config import save
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import Run
from olvae.training.run import RUN_ENV, train
from olvae.training.settings import TrainOptions
from tests.forks import fork_each
from tests.training.origins import without_networks


@pytest.fixture
def train_with(tmp_path, image_folder, monkeypatch, quick_training):
    """Train with a config; returns the run."""

    def run(*overrides: str, config: dict | None = None, **options) -> Run:
        monkeypatch.delenv(RUN_ENV, raising=False)
        save(without_networks(image_folder) if config is None else config, tmp_path / "cfg.yaml")
        base = [] if "resume" in options else [tmp_path / "cfg.yaml"]
        settings = {"base": base, "logdir": tmp_path / "runs", "gpus": "0", "overrides": overrides}
        return train(TrainOptions(**{**settings, **options}))

    return run


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[[], object]], None]:
    """Do something once, before the step of this number, counted from 0."""

    def patch(number: int, action: Callable[[], object]) -> None:
        whole, done = LiteAutoencoderKL.training_step, []

        def step(self, batch, batch_idx):
            if self.global_step == number and not done:
                done.append(action())
            return whole(self, batch, batch_idx)

        monkeypatch.setattr(LiteAutoencoderKL, "training_step", step)

    return patch


def torchrun(rank: int = 0, nodes: int = 1, per_node: int = 1) -> dict[str, str]:
    """The variables that torchrun sets."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "GROUP_RANK": str(rank // per_node),
        "WORLD_SIZE": str(nodes * per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
    }


def srun(rank: int = 0, nodes: int = 1, per_node: int = 1) -> dict[str, str]:
    """The variables that SLURM sets with --nodes and --ntasks-per-node."""
    return {
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(rank // per_node),
    }


@pytest.fixture
def under(monkeypatch) -> Callable[[dict[str, str]], None]:
    """Set a launcher's variables."""

    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    for name in (RUN_ENV, "MASTER_ADDR", "MASTER_PORT", *torchrun(), *srun()):
        monkeypatch.delenv(name, raising=False)
    return set_all


@pytest.fixture
def train_two(train_with, under, tmp_path):
    """Train in two processes of torchrun, forked from this one.

    Returns the run, or None if both are to fail.
    """

    def run(*overrides: str, raises: str | None = None, **options) -> Run | None:
        devices = ("lightning.trainer.accelerator=cpu", "lightning.trainer.devices=2")

        def work(rank: int) -> None:
            under(torchrun(rank, per_node=2))
            with (
                nullcontext()
                if raises is None
                else pytest.raises((ValueError, OSError), match=raises)
            ):
                run = train_with(*overrides, *devices, **{"name": "two", **options})
                (tmp_path / f"path{rank}").write_text(str(run.path))

        fork_each(work)
        if raises is not None:
            return None
        (path,) = {Path((tmp_path / f"path{rank}").read_text()) for rank in range(2)}
        return Run(path)

    return run
