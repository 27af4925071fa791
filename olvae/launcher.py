"""Join, leave and use the process group of a launcher: torchrun, SLURM or Lightning itself."""

import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from olvae.config import ConfigError

if TYPE_CHECKING:  # slow to import
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


_T = TypeVar("_T")

# Timeout of collectives. Long, because processes with small shares wait for the others; when one
# fails, torchrun ends all of them anyway.
PATIENCE = timedelta(days=7)


def this_process() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def local_rank() -> int:
    """Return this process's rank on its machine, as torchrun, srun and Lightning set it."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def srun_environment() -> "SLURMEnvironment | None":
    """Return Lightning's view of the SLURM step; None if srun did not start this process."""
    if "SLURM_STEP_ID" not in os.environ:
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    # In an interactive shell, only the variables are there.
    if not SLURMEnvironment.detect():
        return None
    if int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError("srun: give it the options ntasks-per-node and nodes, not ntasks")
    # A job that is queued again would start a new run.
    return SLURMEnvironment(auto_requeue=False)


def join(backend: str = "gloo", timeout: timedelta = PATIENCE) -> tuple[int, int]:
    """Join the processes that torchrun or srun started; return the rank and the world size.

    That is (0, 1) for a single process. From then on the loaders of a
    :class:`~olvae.data.source.Source` give each process its share. End with :func:`leave`. An
    existing process group is left as it is. gloo exchanges objects in memory, not tensors of GPUs.
    """
    if dist.is_initialized():
        return this_process()
    # torchrun first, because srun may start one torchrun on each node.
    if "RANK" in os.environ:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend, timeout=timeout)
        return this_process()
    slurm = srun_environment()
    if slurm is not None and slurm.world_size() > 1:
        os.environ["MASTER_ADDR"] = slurm.main_address
        os.environ["MASTER_PORT"] = str(slurm.main_port)
        dist.init_process_group(
            backend, timeout=timeout, rank=slurm.global_rank(), world_size=slurm.world_size()
        )
    return this_process()


def gather(part: _T) -> list[_T] | None:
    """Collect one object per process, with tensors on the CPU: a list on rank 0, None on others."""
    rank, world = this_process()
    if world == 1:
        return [part]
    parts: list[_T | None] | None = [None] * world if rank == 0 else None
    dist.gather_object(part, parts, dst=0)
    return cast("list[_T] | None", parts)


def gather_parts(parts: Iterable[_T]) -> Iterator[_T]:
    """Yield on rank 0 the parts of all other ranks, one of each at a time; nothing elsewhere.

    So the memory is one part of each rank, whatever their number. Every rank has to iterate to the
    end. Parts are not None, and rank 0's own are not read.
    """
    rank, world = this_process()
    own = iter(parts)
    left = [world > 1]
    while left[0]:
        found = gather(next(own, None) if rank else None) or []
        received = [part for part in found if part is not None]
        yield from received
        left = [bool(received)]
        dist.broadcast_object_list(left)


def leave() -> None:
    """Wait for all processes, and leave the group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Agreement:
    """Agree on a request that any rank may make, so that all ranks follow it at the same step.

    Nothing waits for a device: the flags are reduced between the CPUs while the next step runs, so
    with several processes the answer comes one call later.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._flag = torch.zeros((), dtype=torch.uint8)
        self._sent: dist.Work | None = None

    def any_asked(self, asked: int, wait: bool = False) -> int:
        """Return the largest ``asked`` of all ranks in the previous call; all ranks have to call.

        ``wait`` includes this call. 0 asks for nothing; the caller tells requests apart by numbers
        up to 255.
        """
        if this_process()[1] == 1:
            return asked
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        # Receive the previous call's answer before the flag is used again.
        answer = self._received()
        self._flag.fill_(asked)
        self._sent = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        if wait:
            return max(self._received(), answer)
        return answer

    def _received(self) -> int:
        """Wait for the reduction under way; the flag holds its result."""
        if self._sent is not None:
            self._sent.wait()
        self._sent = None
        return int(self._flag.numpy())
