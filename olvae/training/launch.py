"""Distributed launch: process counts, torchrun and srun, joining the process group, processes that died."""

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
from olvae.runs import Run


class ProcessDiedError(ChildProcessError):
    """A loader process, or another process of the training of ``run``, was killed."""

    def __init__(self, cause: str, run: Run) -> None:
        super().__init__(cause)
        self.run = run


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
    """The number of processes of a run, over all nodes."""
    return _per_node(trainer_args) * _nodes(trainer_args)


def check_launcher(trainer_args: Mapping[str, Any]) -> None:
    """Check that torchrun or srun started as many processes as the run has devices.

    With one device, Lightning would let each process train a model of its own in the same folder; with too many, it
    would wait for processes that never come.

    Args:
        trainer_args: of lightning.trainer, with the ``devices`` of each node.

    Raises:
        ConfigError: the numbers differ, or there are several nodes and no launcher.
    """
    wanted = _per_node(trainer_args), _nodes(trainer_args)
    if TorchElasticEnvironment.detect():
        name, option, total = "torchrun", "nproc_per_node", int(os.environ["WORLD_SIZE"])
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", total))
    elif srun_environment() is not None:
        name, option, total = "srun", "ntasks-per-node", int(os.environ["SLURM_NTASKS"])
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
            f"{name} started {_counted(total, 'process', nodes)}, but `gpus` and lightning.trainer name "
            f"{_counted(wanted[0] * wanted[1], 'device', wanted[1])}: set `gpus` to {per_node}, or on the CPU "
            f"lightning.trainer.accelerator=cpu lightning.trainer.devices={per_node}"
            + (f", and lightning.trainer.num_nodes={nodes}" if nodes != wanted[1] else "")
            + f"; or set {name}'s {option} to {wanted[0]}"
        )


def meet() -> tuple[int, int]:
    """Join the processes that torchrun or srun started; return rank and number of processes.

    It is (0, 1) where Lightning starts the others, which join when training begins.
    """
    if find_launcher() is None:
        return 0, 1
    return join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", default_pg_timeout)


def process_death(error: RuntimeError) -> str | None:
    """Explain an error that comes from the death of a loader process or another process of this run; else None."""
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
