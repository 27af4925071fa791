"""Devices, precision, host memory, cores, and the processes that torchrun or srun started."""

import ctypes
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist

from olvae.config import ConfigError

if TYPE_CHECKING:  # slow to import
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


def resolve_device(device: str | None = None) -> str:
    """Choose a device: the given one, which has to be there (ConfigError), else a GPU of this process, else the CPU."""
    present = torch.cuda.device_count()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith("cuda"):
        return device
    if int(device.partition(":")[2] or 0) >= present:
        raise ConfigError(f"`device` {device}: this machine has {present} GPUs")
    device = f"cuda:{local_rank() % present}" if device == "cuda" and present > 1 else device
    if ":" in device:
        torch.cuda.set_device(
            device
        )  # else what names no GPU takes memory of the first one, in every process
    return device


T = TypeVar("T")
PATIENCE = timedelta(
    days=7
)  # of collectives: shares differ, and torchrun ends all processes if one fails


@dataclass(frozen=True)
class Precision:
    """A precision to compute in: the dtype of autocast, and Lightning's name for training in it."""

    dtype: torch.dtype
    lightning: Literal["16-mixed", "bf16-mixed", "32-true"]


FULL = "32"
PRECISIONS = {
    "fp16": Precision(torch.float16, "16-mixed"),
    "bf16": Precision(torch.bfloat16, "bf16-mixed"),
    FULL: Precision(torch.float32, "32-true"),
}
"""The one table of precisions: every flag and setting takes these names."""

# What weights and latents can be stored in.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ALIASES = {"16": "fp16", "float16": "fp16", "bfloat16": "bf16", "float32": FULL}


def precision_name(text: str) -> str:
    """Return a name of :data:`PRECISIONS`, also for 16, float16, bfloat16 and float32; else raise ConfigError."""
    name = _ALIASES.get(text, text)
    if name not in PRECISIONS:
        raise ConfigError(f"`precision` {text}: choose from {', '.join(PRECISIONS)}")
    return name


def resolve_precision(precision: str, accelerator: str) -> str:
    """Return Lightning's name for a precision of training; raise ConfigError for an unknown one, or fp16 on the CPU."""
    name = precision_name(precision)
    if name == "fp16" and accelerator == "cpu":
        raise ConfigError(
            f"`precision` {precision}: loss scaling needs a GPU: use bf16 or 32 on the CPU"
        )
    return PRECISIONS[name].lightning


# Of products and convolutions, in TFLOP/s without sparsity, from the makers' data sheets: of half precision, summed in
# float32, and of float32, in TF32 where a GPU has it, as torch computes convolutions there.
_PEAKS = {
    "B200": (2250, 1125),
    "H[12]00 NVL": (835, 418),
    "H100 PCIe": (756, 378),
    "G?H[12]00": (989, 495),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L4": (121, 60),
    "RTX 5090$": (210, 105),
    "RTX 4090$": (165, 83),
    "RTX 3090$": (71, 36),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}
_WITHOUT_BF16 = r"\bV100|\bT4\b"


def peak_tflops(name: str, precision: str) -> float | None:
    """The most TFLOP/s of a GPU, by torch's name for it, in a precision of :data:`PRECISIONS`; None if unknown."""
    if "MIG" in name or (precision == "bf16" and re.search(_WITHOUT_BF16, name)):
        return None
    found = (peaks for known, peaks in _PEAKS.items() if re.search(rf"\b(?:{known})\b", name))
    return next((peaks[precision == FULL] for peaks in found), None)


def autocast(kind: str, precision: str) -> AbstractContextManager[object]:
    """Return autocast on devices of a kind, such as cuda, to a precision of :data:`PRECISIONS`; none for float32."""
    return torch.autocast(kind, PRECISIONS[precision].dtype, enabled=precision != FULL)


def now(device: str) -> float:
    """Synchronise the device, and read a clock, in seconds."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_per_image(work: Callable[[], object], images: int, seconds: float) -> float:
    """Repeat ``work``, which gives ``images`` each time, for some seconds; return the mean time of an image."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        done += images
    return (time.perf_counter() - start) / done


@contextmanager
def peak_memory(device: str, peaks: list[int]) -> Iterator[None]:
    """Append the most bytes that the work in this context takes on a GPU, beyond those allocated before it."""
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    peaks.append(torch.cuda.max_memory_allocated(device) - before)


def resolve_devices(gpus: str | None, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Choose Lightning's ``accelerator`` and ``devices``; ConfigError if this machine does not have that GPU.

    ``gpus``: N for the first N GPUs, "0,2" for a list of them, or 0 for the CPU, with as many processes as
    lightning.trainer.devices says if its accelerator is cpu; None leaves it to ``trainer``, lightning.trainer: by
    default every GPU, or the CPU if there is none.
    """
    present = torch.cuda.device_count()
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    if gpus is not None:
        if (given := _count_or_list(gpus)) is None:
            raise ConfigError(
                f"`gpus` {gpus}: give a number of GPUs, as in 2, or a list, as in 0,2; 0 is the CPU"
            )
        wanted = list(range(given)) if isinstance(given, int) else given
        if not wanted:
            return {
                "accelerator": "cpu",
                "devices": trainer.get("devices", 1) if accelerator == "cpu" else 1,
            }
        if max(wanted) >= present:
            has = f"{present} GPU{'s' * (present > 1)}" if present else "no GPU"
            raise ConfigError(f"`gpus` {gpus}: this machine has {has}; 0 is the CPU")
        return {"accelerator": "cuda", "devices": wanted}
    if accelerator == "auto":
        if not present:
            return {"accelerator": "cpu", "devices": 1}
        accelerator = "cuda"
    on_gpu = accelerator in ("cuda", "gpu")
    if on_gpu and not present:
        raise ConfigError(
            f"lightning.trainer.accelerator: {accelerator}: this machine has no GPU; cpu is the CPU"
        )
    if devices in ("auto", -1, "-1"):
        devices = present if on_gpu else 1
    elif isinstance(devices, str):
        given = _count_or_list(devices)
        if given is None or (isinstance(given, list) and not on_gpu):
            form = "a number, a list of GPUs as in 0,2" if on_gpu else "a number of processes"
            raise ConfigError(f"lightning.trainer.devices: {devices!r}: give {form}, or auto")
        devices = given
    return {"accelerator": accelerator, "devices": devices}


def _count_or_list(text: str) -> int | list[int] | None:
    """Read a number, or a list as in ``0,2`` or ``0,``, as Lightning does; None for another text."""
    if not re.fullmatch(r"\d+|(\d+,)+\d*", text := text.replace(" ", "")):
        return None
    return [int(part) for part in text.split(",") if part] if "," in text else int(text)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; returns False for C libraries without that option.

    glibc gives blocks of over 32 MB back to the system at once, and gets fresh pages for the next tensor, which the
    system clears first. On a CPU that takes up to half of the time of a network on large images. From then on a process
    holds its peak, and may hold half as much again in gaps: not for commands that promise a limit on memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # parameters of mallopt(3), from malloc.h
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(mmap_max, 0)) and bool(set_option(trim_threshold, -1))


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sharing_cores(ranks: int) -> int:
    """Count the ranks that share this process's cores, of those on its machine: 1 where srun bound each to its own."""
    given = int(os.environ.get("SRUN_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_PER_TASK") or 0)
    by_srun = (
        "RANK" not in os.environ and srun_environment() is not None
    )  # srun's one task may be a torchrun
    return (
        1 if by_srun and cores() < 2 * given else ranks
    )  # rounded up to whole cores of two threads


def this_process() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_rank() -> int:
    """Return this process's rank on its machine, as torchrun, srun and Lightning set it."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def srun_environment() -> "SLURMEnvironment | None":
    """Return Lightning's view of the SLURM step; None if srun did not start this process."""
    if "SLURM_STEP_ID" not in os.environ:
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if not SLURMEnvironment.detect():  # an interactive shell
        return None
    if int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError("srun: give it the options ntasks-per-node and nodes, not ntasks")
    return SLURMEnvironment(auto_requeue=False)  # a job that is queued again would start a new run


def join(backend: str = "gloo", timeout: timedelta = PATIENCE) -> tuple[int, int]:
    """Join the processes that torchrun or srun started; returns rank and world size, (0, 1) for a single process.

    From then on the loaders of a :class:`~olvae.data.source.Source` give each process its share. End with
    :func:`leave`. An existing process group is left as it is. gloo exchanges objects in memory, not tensors of GPUs.
    """
    if dist.is_initialized():
        return this_process()
    if "RANK" in os.environ:  # torchrun; also where srun starts one on each node
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend, timeout=timeout)
    elif (slurm := srun_environment()) is not None and slurm.world_size() > 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = (
            slurm.main_address,
            str(slurm.main_port),
        )
        dist.init_process_group(
            backend, timeout=timeout, rank=slurm.global_rank(), world_size=slurm.world_size()
        )
    return this_process()


def gather(part: T) -> list[T] | None:
    """Collect one object of each process, its tensors on the CPU: a list by rank in the first one, None in others."""
    rank, world = this_process()
    if world == 1:
        return [part]
    parts: list[T | None] | None = [None] * world if rank == 0 else None
    dist.gather_object(part, parts, dst=0)
    return cast("list[T] | None", parts)


def leave() -> None:
    """Wait for all processes, and leave the group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Agreement:
    """Agree on a request that any rank may make, so that all ranks follow it at the same step.

    Nothing waits for a device: the flags are reduced between the CPUs while the next step runs, so with several
    processes the answer comes one call later.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._flag = torch.zeros((), dtype=torch.uint8)
        self._sent: dist.Work | None = None

    def any_asked(self, asked: int, wait: bool = False) -> int:
        """Return the largest ``asked`` of all ranks in the previous call, with ``wait`` in this one too. Collective.

        0 asks for nothing; other numbers, up to 255, are for the caller to tell requests apart.
        """
        if this_process()[1] == 1:
            return asked
        self._group = self._group or dist.new_group(backend="gloo")
        answer = self._received()
        self._flag.fill_(asked)
        self._sent = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return max(self._received(), answer) if wait else answer

    def _received(self) -> int:
        if self._sent is not None:
            self._sent.wait()
        self._sent = None
        return int(self._flag.numpy())
