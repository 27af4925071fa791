"""Join, leave and use the process group of a launcher: torchrun, SLURM or Lightning itself."""

import logging
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from olvae.config import ConfigError
from olvae.library_internals import default_store, observe_processes

if TYPE_CHECKING:  # slow to import
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


_T = TypeVar("_T")

# Timeout of collectives. Long, because processes with small shares wait for the others; when one
# fails, torchrun ends all of them anyway.
PATIENCE = timedelta(days=7)

# Of a message about a process that died.
WHERE_TO_LOOK = "see its own output, or the system's log of killed processes"

# Seconds between looks at the progress of others, and at whether they are alive.
POLL_S = 0.1

# Seconds that the first process of :func:`together` has to print an error.
PRINTING_S = 0.5

# Key in the process group's store under which a process of :func:`together` notes that it failed.
FAILED = "olvae/failed"

# Open files that a process needs beside the sockets to others, at least.
OWN_FILES = 30
# Raise the limit on them no further: some programs that a process starts try to close all.
MOST_FILES = 65_536

# Whether this process is inside of :func:`together`.
_is_together = False

# The process group, and the one of gloo beside it for the CPUs, if that was made.
_group_of_cpus: tuple[Any, Any] = (None, None)


class FailedProcessError(Exception):
    """Raised in :func:`together` after an error of one process: the argument, once all have it."""


def this_process() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def local_rank() -> int:
    """Return this process's rank on its machine, as torchrun, srun and Lightning set it."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def local_ranks() -> int:
    """Return the number of ranks on this machine, as torchrun and srun set it; else of all."""
    _, world = this_process()
    if world == 1:
        return 1
    names = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
    return int(next((os.environ[name] for name in names if name in os.environ), world))


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


def allow_open_files(ranks: int) -> None:
    """Raise this process's limit on open files as far as it may, for its sockets to other ranks.

    ConfigError if the limit is too low. The first process has two sockets for each other one.
    """
    try:
        import resource
    except ImportError:  # on Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OWN_FILES + 2 * ranks
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise ConfigError(
            f"{ranks} processes need at least {needed} open files in each, and only {soft} are "
            f"allowed: raise the limit on every machine (`ulimit -n {4 * needed}`, or its "
            "administrator does), or start fewer"
        )


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
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1:
            allow_open_files(world)
            dist.init_process_group(backend, timeout=timeout)
        return this_process()
    slurm = srun_environment()
    if slurm is not None and slurm.world_size() > 1:
        allow_open_files(slurm.world_size())
        os.environ["MASTER_ADDR"] = slurm.main_address
        os.environ["MASTER_PORT"] = str(slurm.main_port)
        dist.init_process_group(
            backend, timeout=timeout, rank=slurm.global_rank(), world_size=slurm.world_size()
        )
    return this_process()


def start_each(accelerator: str, devices: int | list[int]) -> None:
    """Start this command again for each further device, as Lightning does, and join them all.

    ConfigError if torchrun or srun started this process: they say how many there are.
    """
    if "RANK" in os.environ or srun_environment() is not None:
        raise ConfigError("`gpus`: torchrun or srun has started the processes: leave it out")
    # slow to import
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.launchers import subprocess_script

    # None outlives the others: the first watches its children, which watch it.
    observe_processes(subprocess_script, partial(end_with_children, "command", str))
    if local_rank() > 0:
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=PATIENCE),
        plugins=LightningEnvironment(),
    ).launch()


def end_with_children(
    work: str,
    saved: Callable[[], str],
    children: Sequence[subprocess.Popen[Any]],
    grace: float = 5.0,
) -> None:
    """End this process ``grace`` seconds after one that it started fails, from a thread.

    On GPUs its collectives would never return; elsewhere they raise within ``grace``, which tells
    more. The line about it names the ``work``, and ends with what ``saved`` returns.
    """

    def watch() -> None:
        # Wait for the first that fails. An exit code is None while the process runs.
        while True:
            codes = [child.poll() for child in children]
            if any(codes):
                break
            if None not in codes:
                return
            time.sleep(0.5)
        time.sleep(grace)

        # Still here: say which, and end all.
        rank, code = next((rank, code) for rank, code in enumerate(codes, 1) if code)
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        line = f"error: process {rank} of this {work} {how}: {WHERE_TO_LOOK}{saved()}"
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        for child in children:
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, name="watch processes", daemon=True).start()


def gather(part: _T) -> list[_T] | None:
    """Collect one object per process, with tensors on the CPU: a list on rank 0, None on others."""
    rank, world = this_process()
    if world == 1:
        return [part]
    if _is_together:
        of_each(None)
    parts: list[_T | None] | None = [None] * world if rank == 0 else None
    dist.gather_object(part, parts, dst=0)
    return cast("list[_T] | None", parts)


def of_each(value: _T, error: Exception | None = None) -> list[_T]:
    """Collect one value per process, in all processes; before they meet, this one's alone.

    Raise FailedProcessError in all of them if one has an ``error``.
    """
    if not dist.is_initialized():
        return [value]
    pairs = [(value, error)] * dist.get_world_size()
    dist.all_gather_object(pairs, (value, error))
    for _, failure in pairs:
        if failure is not None:
            raise FailedProcessError(failure)
    return [value for value, _ in pairs]


def from_first(make: Callable[[], _T]) -> _T:
    """Make a value in the first process, and give it, or its error, to all others.

    Every process has to call.
    """
    rank, world = this_process()
    if world == 1:
        return make()
    if _is_together:
        of_each(None)
    made: list[Any] = [None, None]
    if rank == 0:
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    dist.broadcast_object_list(made, src=0)
    value, failure = made
    if failure is not None:
        raise failure
    return cast("_T", value)


@contextmanager
def together() -> Iterator[tuple[int, int]]:
    """:func:`join`, and let an error of one process end the body in all of them; leave at its end.

    The first process raises the error, the others exit in silence with a command's code for it.
    They notice it in :func:`gather`, :func:`of_each`, :func:`check_others` and at the body's end.
    Warnings of the package are the first process's, but for each one's unreadable images.
    ChildProcessError if another process died.
    """
    global _is_together
    rank, world = join()
    if world == 1:
        yield rank, world
        return
    own: Exception | None = None
    _is_together = True
    logging.getLogger("olvae").disabled = rank > 0
    try:
        # Exchange errors at the end, unless the body has done it: then the failure has an argument.
        try:
            yield rank, world
        except FailedProcessError as failed:
            if failed.args:
                raise
        except Exception as error:
            own = error
            default_store().set(FAILED, "")
        of_each(None, own)
    except FailedProcessError as failed:
        (first,) = failed.args
        if rank == 0:
            raise own or first from None
        # A launcher ends the first process as soon as another has ended: let it print.
        time.sleep(PRINTING_S)
        raise SystemExit(2 if isinstance(first, ConfigError) else 1) from own
    except RuntimeError as error:
        line = f"another process of this command died: {WHERE_TO_LOOK}"
        raise ChildProcessError(line) from (own or error)
    finally:
        _is_together = False
        logging.getLogger("olvae").disabled = False
        # Its threads would abort a process that ends within the group.
        dist.destroy_process_group()


def check_others() -> None:
    """Raise FailedProcessError if another process of :func:`together` has failed."""
    if _is_together and default_store().check([FAILED]):
        raise FailedProcessError


def gather_parts(parts: Iterable[_T]) -> Iterator[_T]:
    """Yield on rank 0 the parts of all other ranks, one of each at a time; nothing elsewhere.

    So the memory is one part of each rank, whatever their number. Every rank has to iterate to the
    end. Parts are not None, and rank 0's own are not read.
    """
    rank, world = this_process()
    own = iter(parts if rank else ())
    while world > 1:
        part = next(own, None)
        if not any(of_each(part is not None)):
            return
        for received in gather(part) or []:
            if received is not None:
                yield received


def leave() -> None:
    """Wait for all processes, and leave the group."""
    if dist.is_initialized():
        # A barrier of NCCL would need each one's GPU.
        of_each(None)
        dist.destroy_process_group()


def group_of_cpus() -> Any:
    """The process group's gloo, which CPUs talk through, one for all uses: None if it has one.

    A further group would connect each two processes once more.
    """
    global _group_of_cpus
    if "cpu:gloo" in dist.get_backend_config():
        return None
    world, group = _group_of_cpus
    if world is not dist.group.WORLD:
        group = dist.new_group(backend="gloo")
        _group_of_cpus = (dist.group.WORLD, group)
    return group


class Agreement:
    """Agree on a request that any rank may make, so that all ranks follow it at the same step.

    Nothing waits for a device: the flags are reduced between the CPUs while the next step runs, so
    with several processes the answer comes one call later.
    """

    def __init__(self) -> None:
        self._flag = torch.zeros((), dtype=torch.uint8)
        self._sent: dist.Work | None = None

    def any_asked(self, asked: int, wait: bool = False) -> int:
        """Return the largest ``asked`` of all ranks in the previous call; all ranks have to call.

        ``wait`` includes this call. 0 asks for nothing; the caller tells requests apart by numbers
        up to 255.
        """
        if this_process()[1] == 1:
            return asked
        group = group_of_cpus()
        # Receive the previous call's answer before the flag is used again.
        answer = self._received()
        self._flag.fill_(asked)
        self._sent = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group, async_op=True)
        if wait:
            return max(self._received(), answer)
        return answer

    def _received(self) -> int:
        """Wait for the reduction under way; the flag holds its result."""
        if self._sent is not None:
            self._sent.wait()
        self._sent = None
        return int(self._flag.numpy())


def exit_with_parent(parent: int) -> None:
    """Wait until this process's parent ends, and exit at once."""
    # On Windows, a parent's number outlives it.
    process = mp.parent_process()
    while os.getppid() == parent and (process is None or process.is_alive()):
        time.sleep(POLL_S)
    os._exit(1)
