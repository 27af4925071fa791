"""Processes that torchrun or srun started: as many as the flags name,
and one run folder for all."""

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from olvae.cli.main import main
from olvae.config import ConfigError, instantiate, save
from olvae.data.places import load
from olvae.launcher import gather, join, leave
from olvae.runs import Run, locked
from olvae.training.processes import (
    OLDER_NAMES,
    check_same,
    choose_workers,
    cluster,
    find_launcher,
    meet,
    process_count,
)
from olvae.training.run import TrainingStopped, train
from olvae.training.settings import TrainOptions
from olvae.training.summary import _warnings
from tests.conftest import plain_config
from tests.data.images import write_shards
from tests.forks import fork_each, free_port
from tests.training.conftest import srun, torchrun

SRUN = {**srun(nodes=8, per_node=8), "SLURM_CPUS_PER_TASK": "6"}


def test_find_launcher_tells_srun_and_torchrun_apart(under):
    assert find_launcher() is None
    under(srun(3, nodes=2, per_node=2))
    slurm = find_launcher()
    assert isinstance(slurm, SLURMEnvironment)
    assert (slurm.global_rank(), slurm.local_rank(), slurm.node_rank(), slurm.world_size()) == (
        3,
        1,
        1,
        4,
    )
    assert not slurm.auto_requeue
    under({"SLURM_JOB_NAME": "interactive"})
    assert find_launcher() is None
    assert cluster() == []
    # one torchrun on each node, by srun
    under({"SLURM_JOB_NAME": "train", **torchrun(1, per_node=2)})
    assert isinstance(find_launcher(), TorchElasticEnvironment)


def test_a_batch_script_that_calls_python_waits_for_nobody(under, monkeypatch):
    under(srun(nodes=2, per_node=2))
    monkeypatch.delenv("SLURM_STEP_ID")
    assert find_launcher() is None
    assert join() == (0, 1)
    (plugin,) = cluster()
    assert isinstance(plugin, LightningEnvironment)
    # Lightning starts them
    assert process_count({"devices": 2}) == process_count({"devices": [0, 3]}) == 2
    with pytest.raises(ConfigError, match="torchrun or srun"):
        process_count({"devices": 2, "num_nodes": 2})


def test_other_commands_meet_under_srun_too(tmp_path, under):

    def work(rank: int) -> None:
        under(srun(rank, nodes=2))
        assert join() == (rank, 2)
        parts = gather(f"part {rank}")
        if rank == 0:
            (tmp_path / "parts").write_text(" ".join(parts or []))
        leave()

    fork_each(work)
    assert (tmp_path / "parts").read_text() == "part 0 part 1"


@pytest.mark.parametrize("launcher", [torchrun, srun])
def test_process_count_matches_the_launchers(under, launcher):
    under(launcher(nodes=2, per_node=3))
    assert process_count({"devices": [0, 1, 2], "num_nodes": 2}) == 6
    for trainer in ({"devices": 1}, {"devices": 3}, {"devices": 4, "num_nodes": 2}):
        with pytest.raises(ConfigError, match=r"^`gpus`, or .*match"):
            process_count(trainer)
    under(launcher())
    process_count({"devices": 1})


def test_process_count_refuses_one_task_of_srun_for_several_devices(under, monkeypatch):
    under(srun())
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    assert process_count({"devices": 1}) == 1
    with pytest.raises(ConfigError, match=r"srun started 1 process\(es\).* 4"):
        process_count({"devices": 4})


def test_process_count_asks_srun_for_ntasks_per_node(under, monkeypatch):
    under(srun(per_node=2))
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ConfigError, match=r"srun: .*ntasks-per-node"):
        process_count({"devices": 2})


def test_a_macs_gpu_is_of_one_process_and_several_open_more_files(under, monkeypatch):
    allowed: list[int] = []
    monkeypatch.setattr("olvae.training.processes.allow_open_files", allowed.append)
    assert process_count({"devices": 1, "accelerator": "mps"}) == 1
    with pytest.raises(ConfigError, match=r"2 processes .*Mac"):
        process_count({"devices": 2, "accelerator": "mps"})
    assert allowed == []
    assert process_count({"devices": 2, "accelerator": "cpu"}) == 2
    assert allowed == [2]


@pytest.mark.parametrize("cuda", [False, True])
def test_processes_meet_through_the_backends_of_their_devices(under, monkeypatch, cuda):
    under(torchrun(1, per_node=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("olvae.training.processes.join", lambda *given: given)
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(name, "given")
    backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    assert meet() == (backends, timedelta(minutes=30))


def test_no_number_of_workers_may_fit(monkeypatch):
    """Too few images for the processes: training says so."""
    node = plain_config("nowhere")["data"]
    tried = []

    class Few(SimpleNamespace):
        def check_processes(self, processes: int) -> None:
            tried.append((self.num_workers, processes))
            raise ValueError("too few")

    monkeypatch.setattr("olvae.training.processes.MOST_WORKERS", 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    source = Few(in_memory=False, num_workers=None)
    choose_workers(source, node, 1, 1)
    assert tried == [(2, 1), (1, 1), (0, 1)]
    assert node["params"]["num_workers"] == source.num_workers == 0


@pytest.mark.parametrize(
    ("cores", "processes", "nodes", "workers", "launcher"),
    [
        *((2, 1, 1, 2, {}), (96, 4, 1, 8, {}), (4, 8, 1, 0, {}), (12, 6, 2, 4, {})),
        *((6, 64, 8, 6, SRUN), (40, 64, 8, 5, SRUN), (6, 64, 8, 0, {**SRUN, **torchrun()})),
    ],
)
def test_choose_workers_shares_a_machines_cores_among_its_ranks(
    image_folder, monkeypatch, under, cores, processes, nodes, workers, launcher
):
    """Shared by the ranks of a machine, unless srun gave each its own.

    A number in the config stays.
    """
    under(launcher)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    # as it is where no fixture trains
    monkeypatch.setattr("olvae.training.processes.MOST_WORKERS", 8)
    node = plain_config(image_folder)["data"]
    source = instantiate(node)
    choose_workers(source, node, processes, nodes)
    assert (source.num_workers, node["params"]["num_workers"]) == (workers, workers)
    trainer = SimpleNamespace(world_size=processes, num_nodes=nodes, max_steps=9)
    sources = [SimpleNamespace(val_images=None, num_workers=workers + more) for more in (0, cores)]
    assert [
        len(list(_warnings(trainer, SimpleNamespace(warmup_steps=0), each))) for each in sources
    ] == [0, 1]
    node["params"]["num_workers"] = 5
    choose_workers(source, node, processes, nodes)
    assert (source.num_workers, node["params"]["num_workers"]) == (workers, 5)
    node = plain_config()["data"]
    choose_workers(instantiate(node), node, processes, nodes)
    assert "num_workers" not in node["params"]


def test_meet_sets_where_the_nccl_recorder_writes(monkeypatch):
    """By the names that the installed torch takes without a warning.

    What the user names, in either way, stays.
    """
    dump = f"{gettempdir()}/olvae_nccl_7_rank_"
    old = list(OLDER_NAMES.values())
    new = list(OLDER_NAMES)
    for version, own, expected in (
        ("2.8.0+cu128", {}, {new[0]: "2000", old[1]: dump}),
        ("2.9.0", {}, dict(zip(new, ("2000", dump), strict=True))),
        ("2.9.0", {old[1]: "/own"}, {new[0]: "2000", old[1]: "/own"}),
        ("2.9.0", {new[1]: "/own"}, {new[0]: "2000", new[1]: "/own"}),
    ):
        variables = {"SLURM_JOB_ID": "7", **own}
        monkeypatch.setattr(os, "environ", variables)
        monkeypatch.setattr(torch, "__version__", version)
        assert meet() == (0, 1)
        assert variables == {"SLURM_JOB_ID": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", **expected}


def test_settings_of_the_nccl_recorder_are_no_deprecation_warning(under, capfd):
    """torch reads them when the first collective is recorded."""

    def work(rank: int) -> None:
        under(torchrun(rank, per_node=2))
        assert meet() == (rank, 2)
        torch.distributed.all_reduce(torch.ones(1))
        leave()

    fork_each(work)
    assert "deprecated" not in capfd.readouterr().err


def test_choose_workers_takes_no_more_than_there_are_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("olvae.training.processes.MOST_WORKERS", 8)
    # which nobody can count
    shards = [f"pipe:cat {path}" for path in write_shards(tmp_path, (3, 3, 3))]
    node = {
        "target": "olvae.data.shards.webdataset.WebDatasetSource",
        "params": {"shards": shards, "size": 8},
    }
    node["params"] |= {"val_shards": shards, "batch_size": 1}
    choose_workers(instantiate(node), node, 1, 1)
    assert node["params"]["num_workers"] == 3


def test_two_nodes_make_one_run_folder(tmp_path, image_folder, under):
    """The first process of all makes it; the others write nothing, and remove nothing.

    tests.together.test_ranks has torchrun's.
    """
    save(plain_config(image_folder, use_ema=True), tmp_path / "tiny.yaml")
    overrides = (
        "lightning.trainer.num_nodes=2",
        "lightning.trainer.max_steps=2",
        "lightning.trainer.accelerator=cpu",
    )

    def work(rank: int) -> None:
        under(srun(rank, nodes=2))
        run = train(TrainOptions([tmp_path / "tiny.yaml"], overrides, tmp_path / "runs", gpus="0"))
        (tmp_path / f"path{rank}").write_text(str(run.path))

    fork_each(work)
    (run,) = (tmp_path / "runs").iterdir()
    assert {Path((tmp_path / f"path{rank}").read_text()) for rank in range(2)} == {run}
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert (checkpoint["global_step"], checkpoint["images_seen"]) == (2, 16)
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    holder = os.getpid()

    def again(rank: int) -> None:
        under(srun(rank, nodes=2))
        with pytest.raises(ConfigError, match=f"trained by process {holder} "):
            train(TrainOptions(resume=run, overrides=("lightning.trainer.max_steps=3",)))

    with locked(Run(run)):
        fork_each(again)  # the first looks, and all of them stop


def test_processes_that_torchrun_starts_again_continue_their_run(
    train_with, image_folder, under, monkeypatch
):
    """With --max-restarts, and a rdzv_id of their own,
    as torchrun makes one on a single machine."""
    under({**torchrun(), "TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": str(free_port())})
    train = partial(train_with, config=plain_config(image_folder))
    begun, other = (train().path for _ in range(2))
    assert load([other / "config.yaml"])["run"]["job"] == "torchrun a"
    under({"TORCHELASTIC_RESTART_COUNT": "1"})
    assert train().path == other != begun
    under({"TORCHELASTIC_RUN_ID": "none"})
    assert train().path not in (begun, other)


def test_processes_that_see_different_folders_stop(monkeypatch):
    monkeypatch.setattr("olvae.training.processes.of_each", lambda run: ["runs/b", run])
    check_same("runs/b")
    with pytest.raises(ConfigError, match=r"no run, .*runs/b"):
        check_same("")


TWO = {"nodes": 2, "per_node": 2}


@pytest.mark.parametrize(
    ("variables", "code", "hint"),
    [
        ({}, 130, True),
        (torchrun(0, per_node=2), 130, True),
        (torchrun(1, per_node=2), 0, False),
        (srun(0, **TWO), 130, True),
        (srun(2, **TWO), 130, False),
        (srun(3, **TWO), 0, False),
    ],
)
def test_the_first_process_of_a_node_reports_a_stop(
    monkeypatch, under, capsys, variables, code, hint
):
    """Launchers kill all processes when one fails, and the first one still draws its curves."""
    under(variables)
    for preempted in (False, True):

        def stopped(_: object, preempted: bool = preempted) -> None:
            raise TrainingStopped(Run(Path("runs/a")), preempted)

        monkeypatch.setattr("olvae.training.run.train", stopped)
        with pytest.raises(SystemExit) as caught:
            main(["train", "--base", "demo"])
        assert caught.value.code == (75 if code and preempted else code)
        assert capsys.readouterr().err == (
            "continue with: olvae train --resume runs/a\n" if hint else ""
        )
