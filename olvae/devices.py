"""Choose devices and precision, count cores, and look up what a GPU can do."""

import ctypes
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.files import counted
from olvae.launcher import local_rank, local_ranks, srun_environment

MPS = "mps"  # torch's name for the GPU of a Mac, "Metal performance shaders"


def present_gpus() -> tuple[str, int]:
    """The kind of the GPUs that torch can use here, cuda or mps, and how many there are.

    A build for ROCm calls AMD's cuda. A Mac's GPU counts from macOS 14 on, and on arm64 alone.
    """
    if torch.backends.mps.is_available():
        return MPS, 1
    return "cuda", torch.cuda.device_count()


def resolve_device(device: str | None = None) -> str:
    """Choose the given device, or else a GPU for this process, or else the CPU.

    ConfigError if this machine does not have the given device.
    """
    kind, present = present_gpus()
    if device is None:
        device = kind if kind == MPS or torch.cuda.is_available() else "cpu"
    wanted, _, number = device.partition(":")
    if wanted == "cpu":
        return device
    if wanted != kind or int(number or 0) >= present:
        has = counted(present, "GPU") if wanted == kind else f"no {wanted}"
        raise ConfigError(f"`device` {device}: this machine has {has}")
    if device == "cuda" and present > 1:
        device = f"cuda:{local_rank() % present}"
    if wanted == "cuda" and ":" in device:
        # Otherwise tensors on "cuda" would go to the first GPU in every process.
        torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Precision:
    """A precision to compute in: the dtype of autocast, and Lightning's name for training in it.

    ``tf32``: whether a GPU may round what float32 products and convolutions multiply to TF32's 10
    bits.
    """

    dtype: torch.dtype
    lightning: Literal["16-mixed", "bf16-mixed", "32-true"]
    tf32: bool = False


FULL = "32"
PRECISIONS = {
    "fp16": Precision(torch.float16, "16-mixed"),
    "bf16": Precision(torch.bfloat16, "bf16-mixed"),
    "tf32": Precision(torch.float32, "32-true", tf32=True),
    FULL: Precision(torch.float32, "32-true"),
}
"""The one table of precisions: every flag and setting takes these names."""

# Names of the dtypes that weights and latents can be stored in.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ALIASES = {"16": "fp16", "float16": "fp16", "bfloat16": "bf16", "float32": FULL}


def precision_name(text: str) -> str:
    """Return a name of :data:`PRECISIONS`, also for aliases such as float16; else ConfigError."""
    name = _ALIASES.get(text, text)
    if name not in PRECISIONS:
        raise ConfigError(f"`precision` {text}: choose from {', '.join(PRECISIONS)}")
    return name


def resolve_precision(precision: str, accelerator: str) -> str:
    """Return Lightning's name for a training precision; ConfigError if unknown, or fp16 on CPU."""
    name = precision_name(precision)
    if name == "fp16" and accelerator == "cpu":
        raise ConfigError(
            f"`precision` {precision}: loss scaling needs a GPU: use bf16 or 32 on the CPU"
        )
    return PRECISIONS[name].lightning


# Peak TFLOP/s of products and convolutions, without sparsity, from the makers' data sheets: in half
# precision, accumulated in float32; and in float32, with TF32 where a GPU has it, because torch
# computes convolutions in TF32 there. Keys are patterns of names; the first match counts.
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
    """Return the peak TFLOP/s of a GPU, by torch's name for it; None if unknown.

    ``precision``: one of :data:`PRECISIONS`.
    """
    if "MIG" in name or (precision == "bf16" and re.search(_WITHOUT_BF16, name)):
        return None
    for known, (half, full) in _PEAKS.items():
        if re.search(rf"\b(?:{known})\b", name):
            return full if PRECISIONS[precision].dtype == torch.float32 else half
    return None


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU compute products and convolutions of float32 in TF32, or not; then as before.

    torch's own defaults are TF32 for convolutions, and float32 for products. torch's newer names
    of the two settings, ``fp32_precision``, can't be mixed with these.
    """
    convolutions = torch.backends.cudnn
    products = torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = allowed
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


@contextmanager
def autocast(kind: str, precision: str) -> Iterator[None]:
    """Compute in a precision of :data:`PRECISIONS`, on a kind of device such as cuda.

    Half precision is autocast's. What is computed in float32 has no TF32, unless the precision is
    tf32: then numbers of two machines can be compared.
    """
    chosen = PRECISIONS[precision]
    half = chosen.dtype != torch.float32
    casting: AbstractContextManager[object] = nullcontext()
    if torch.amp.is_autocast_available(kind):  # meta has none
        casting = torch.autocast(kind, chosen.dtype, enabled=half)
    with tf32(chosen.tf32), casting:
        yield


def full_float32(x: Tensor) -> AbstractContextManager[None]:
    """Compute in float32 on the device of ``x``, for numbers that others compare with."""
    return autocast(x.device.type, FULL)


def device_name(device: str | torch.device) -> str:
    """Name a device: a GPU's model, or the CPU with the number of threads."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind == MPS:
        return "Apple GPU"
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def now(device: str) -> float:
    """Synchronise the device, and read a clock, in seconds."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith(MPS):
        torch.mps.synchronize()
    return time.perf_counter()


def seconds_per_image(work: Callable[[], object], images: int, seconds: float) -> float:
    """Repeat ``work`` for some seconds; return the mean time of an image.

    ``images``: the number of images that each call of ``work`` does.
    """
    start = time.perf_counter()
    done = 0
    while time.perf_counter() - start < seconds:
        work()
        done += images
    return (time.perf_counter() - start) / done


@contextmanager
def peak_memory(device: str, peaks: list[int]) -> Iterator[None]:
    """Append the peak bytes that this context allocates on a GPU, beyond those before it.

    mps counts no peak.
    """
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    peaks.append(torch.cuda.max_memory_allocated(device) - before)


def resolve_devices(gpus: str | None, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Choose Lightning's ``accelerator`` and ``devices``; ConfigError if a GPU is not there.

    ``gpus``: N for the first N GPUs, "0,2" for a list of them, or 0 for the CPU, with
    lightning.trainer.devices processes if lightning.trainer.accelerator is cpu. None leaves the
    choice to ``trainer``, lightning.trainer: by default every GPU, or the CPU if there is none.
    """
    kind, present = present_gpus()
    accelerator = trainer.get("accelerator", "auto")
    devices = trainer.get("devices", "auto")

    # The command's own setting comes first.
    if gpus is not None:
        given = _count_or_list(gpus)
        if given is None:
            raise ConfigError(
                f"`gpus` {gpus}: give a number of GPUs, as in 2, or a list, as in 0,2; 0 is the CPU"
            )
        wanted = list(range(given)) if isinstance(given, int) else given
        if not wanted:
            processes = trainer.get("devices", 1) if accelerator == "cpu" else 1
            return {"accelerator": "cpu", "devices": processes}
        if max(wanted) >= present:
            has = counted(present, "GPU") if present else "no GPU"
            raise ConfigError(f"`gpus` {gpus}: this machine has {has}; 0 is the CPU")
        return {"accelerator": kind, "devices": wanted}

    # Otherwise the config's accelerator, and then its devices.
    if accelerator == "auto":
        if not present:
            return {"accelerator": "cpu", "devices": 1}
        accelerator = kind
    on_gpu = accelerator in ("cuda", "gpu", MPS)
    if on_gpu and (not present or accelerator not in ("gpu", kind)):
        has = f"no {accelerator}" if present else "no GPU"
        raise ConfigError(
            f"lightning.trainer.accelerator: {accelerator}: this machine has {has}; cpu is the CPU"
        )
    if kind == MPS and on_gpu:
        accelerator = kind
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
    """Read a number, or a list as in ``0,2`` or ``0,``, as Lightning does; else return None."""
    text = text.replace(" ", "")
    if not re.fullmatch(r"\d+|(\d+,)+\d*", text):
        return None
    if "," not in text:
        return int(text)
    return [int(part) for part in text.split(",") if part]


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; return False if the C library can't.

    glibc gives blocks of over 32 MB back to the system at once, and gets fresh pages for the next
    tensor, which the system clears first. On a CPU that takes up to half of the time of a network
    on large images. From then on a process holds its peak, and may hold half as much again in gaps:
    not for commands that promise a limit on memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    # Parameters of mallopt(3), from malloc.h.
    trim_threshold = -1
    mmap_max = -4
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(mmap_max, 0)) and bool(set_option(trim_threshold, -1))


def return_freed_memory() -> None:
    """Give the memory that this process freed back to the system, if the C library keeps any.

    glibc keeps freed blocks of up to 32 MB. Later blocks of other sizes don't fit into the gaps,
    since small ones that stay in use lie between them.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sharing_cores(ranks: int) -> int:
    """Count the ranks, of ``ranks`` on this machine, that share this process's cores.

    1 if srun bound each rank to cores of its own.
    """
    given = int(os.environ.get("SRUN_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_PER_TASK") or 0)
    # With RANK in the environment, srun's one task is a torchrun, whose ranks share its cores.
    by_srun = "RANK" not in os.environ and srun_environment() is not None
    # Below twice its share, because srun rounds up to whole cores of two threads.
    if by_srun and cores() < 2 * given:
        return 1
    return ranks


def cores_of_rank() -> int:
    """Count the cores for each of the ranks that share this process's."""
    return max(1, cores() // sharing_cores(local_ranks()))
