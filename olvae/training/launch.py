"""Distributed launch: process counts, torchrun and srun, joining the process group, dead processes, requeueing."""

import logging
import re
import subprocess
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.constants import default_pg_timeout

from olvae.config import ConfigError
from olvae.data.read_errors import worker_death
from olvae.devices import join, local_rank, srun_environment
from olvae.training.progress import notify
from olvae.training.setup import slurm_job

log = logging.getLogger("olvae.training")


def find_launcher() -> ClusterEnvironment | None:
    """Detect torchrun or srun, for Lightning to ask for ranks; None if Lightning starts the processes itself."""
    if TorchElasticEnvironment.detect():  # also where srun starts one torchrun on each node
        return TorchElasticEnvironment()
    return srun_environment()


def is_first() -> bool:
    """Whether this is the first process of a training, known before they meet."""
    launcher = find_launcher()
    return launcher.global_rank() == 0 if launcher is not None else local_rank() == 0


def cluster() -> list[ClusterEnvironment]:
    """Lightning's plugins for the launcher that was found."""
    launcher = find_launcher()
    if launcher is None and SLURMEnvironment.detect():  # a batch script without srun has one process
        launcher = LightningEnvironment()
    return [] if launcher is None else [launcher]


def process_count(trainer_args: Mapping[str, Any]) -> int:
    """The number of processes of a run, over all nodes; ConfigError if torchrun or srun started another number.

    Then Lightning would let each process train a model of its own, or wait for processes that never come.
    """
    devices, nodes = trainer_args["devices"], int(trainer_args.get("num_nodes", 1))
    per_node = devices if isinstance(devices, int) else len(devices)
    if (launcher := find_launcher()) is not None:
        try:
            launcher.validate_settings(per_node, nodes)
            if (started := launcher.world_size()) != per_node * nodes:  # srun without ntasks-per-node
                raise ValueError(f"srun started {started} process(es), but these name {per_node * nodes} devices")
        except ValueError as error:
            raise ConfigError(f"`gpus`, or lightning.trainer.devices and num_nodes: {error}") from error
    elif nodes > 1:
        raise ConfigError(
            f"lightning.trainer.num_nodes: {nodes}: start the command on each node with torchrun or srun: "
            "https://open-litevae.github.io/open-litevae/training/ shows how"
        )
    return per_node * nodes


def meet() -> tuple[int, int]:
    """Join the processes that torchrun or srun started; return rank and number of processes.

    It is (0, 1) where Lightning starts the others, which join when training begins.
    """
    if find_launcher() is None:
        return 0, 1
    return join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", default_pg_timeout)


def from_first(text: str) -> str:
    """Return the first process' text in all processes that have met."""
    texts = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(texts)
    return texts[0]


def process_death(error: Exception) -> str | None:
    """Explain an error that comes from the death of a loader process or another process of this run; else None."""
    broken = r"closed by peer|reset by peer|remote process exited|Broken pipe"
    if dist.is_initialized() and re.search(broken, str(error)):
        return "another process of this training died: see its own output, or the system's log of killed processes"
    return worker_death(error)


def requeue() -> None:
    """Let SLURM queue this job again; when it starts for the second time, it continues its run."""
    job = slurm_job()
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error.strerror
        log.warning("SLURM does not queue job %s again: scontrol requeue: %s", job, said)
    else:
        notify(f"SLURM queues job {job} again")
