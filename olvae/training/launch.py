"""The processes of a run: how many there should be, who started them, how they meet, what is said where one dies."""

import os
import re
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

__all__ = ["check_launcher", "cluster", "find_launcher", "is_first", "meet", "process_count", "process_death"]


def find_launcher() -> ClusterEnvironment | None:
    """What Lightning asks for rank and number of processes under torchrun or srun; None if it starts them itself."""
    if TorchElasticEnvironment.detect():  # also where srun starts one torchrun on each node
        return TorchElasticEnvironment()
    return srun_environment()


def is_first() -> bool:
    """Whether this is the first process of all, known before they meet."""
    launcher = find_launcher()
    return launcher.global_rank() == 0 if launcher is not None else local_rank() == 0


def cluster() -> list[ClusterEnvironment]:
    """Lightning's plugins for :func:`find_launcher`."""
    launcher = find_launcher()
    if launcher is None and SLURMEnvironment.detect():  # a batch script without srun: nobody else comes
        launcher = LightningEnvironment()
    return [] if launcher is None else [launcher]


def process_count(trainer_args: Mapping[str, Any]) -> int:
    """The number of processes of a run, over all nodes."""
    return _per_node(trainer_args) * _nodes(trainer_args)


def check_launcher(trainer_args: Mapping[str, Any]) -> None:
    """Check that torchrun or srun, if one of them did, started the processes that the run has.

    With one device, Lightning would let each of them train a model of its own in the same folder; with more, it would
    wait for those that never come.

    Args:
        trainer_args: of lightning.trainer, with the ``devices`` of each node.

    Raises:
        ConfigError: it started others, or there are several nodes and neither started anything.
    """
    wanted = _per_node(trainer_args), _nodes(trainer_args)
    if TorchElasticEnvironment.detect():
        name, option, total = "torchrun", "--nproc_per_node", int(os.environ["WORLD_SIZE"])
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", total))
    elif srun_environment() is not None:
        name, option, total = "srun", "--ntasks-per-node", int(os.environ["SLURM_NTASKS"])
        per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", total))
    elif wanted[1] > 1:
        raise ConfigError(
            f"lightning.trainer.num_nodes: {wanted[1]}: start the command on each node with torchrun or srun: "
            "https://open-litevae.github.io/open-litevae/training/ shows how"
        )
    else:
        return
    nodes = max(1, total // per_node)
    if (per_node, nodes) != wanted or per_node * nodes != total:
        raise ConfigError(
            f"{name} started {_counted(total, 'process', nodes)}, but the flags and lightning.trainer name "
            f"{_counted(wanted[0] * wanted[1], 'device', wanted[1])}: set --gpus {per_node}, or on the CPU "
            f"lightning.trainer.accelerator=cpu lightning.trainer.devices={per_node}"
            + (f", and lightning.trainer.num_nodes={nodes}" if nodes != wanted[1] else "")
            + f"; or set {option} to {wanted[0]}"
        )


def meet() -> tuple[int, int]:
    """Join the process group of the processes that torchrun or srun started; returns rank and number of processes.

    (0, 1) if there is one process so far: Lightning starts the others, which join when training begins.
    """
    if find_launcher() is None:
        return 0, 1
    return join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", default_pg_timeout)


def process_death(error: RuntimeError) -> str | None:
    """What to do about an error that says that a loader process, or another process of this run, died; else None."""
    if dist.is_initialized() and re.search(
        r"closed by peer|reset by peer|remote process exited|Broken pipe", str(error)
    ):
        return (
            "another process of this training died: its own output, or the system's log of killed processes, says why"
        )
    return worker_death(error)


def _per_node(trainer_args: Mapping[str, Any]) -> int:
    devices = trainer_args["devices"]
    return devices if isinstance(devices, int) else len(devices)


def _nodes(trainer_args: Mapping[str, Any]) -> int:
    return int(trainer_args.get("num_nodes", 1))


def _counted(number: int, what: str, nodes: int) -> str:
    plural = ("es" if what.endswith("s") else "s") if number != 1 else ""
    return f"{number} {what}{plural}" + (f" on {nodes} nodes" if nodes > 1 else "")
