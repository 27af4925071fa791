"""Devices and processes: what to compute on, in which precision, and which of several processes this is."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from olvae.config import ConfigError

__all__ = ["device_of", "gather", "join", "leave", "resolve_devices", "resolve_precision", "this_process"]


PATIENCE = timedelta(days=7)
"""How long the first process waits for the others: their shares may differ much, and torchrun ends all if one fails."""

T = TypeVar("T")


def join() -> tuple[int, int]:
    """Meet the processes that torchrun started, if it did: this one's rank, and how many they are; else (0, 1).

    From then on the loaders of a :class:`~olvae.data.source.Source` give each process its share. End with
    :func:`leave`. Whoever called ``init_process_group`` before is not disturbed.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=PATIENCE)  # only objects in memory are exchanged, no tensors of GPUs
    return this_process()


def gather(part: T) -> list[T] | None:
    """What each process gives, by rank, in the first process; None in the others. Waits until all have come.

    Objects travel by pickle: their tensors should be on the CPU.
    """
    rank, world = this_process()
    if world == 1:
        return [part]
    parts: list[T | None] | None = [None] * world if rank == 0 else None
    dist.gather_object(part, parts, dst=0)
    return cast("list[T] | None", parts)


def leave() -> None:
    """Wait for all processes, and end what :func:`join` began."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def device_of(device: str | None = None) -> str:
    """The device to compute on: the given one, or a GPU if there is one; of several GPUs each process takes its own.

    Raises:
        ConfigError: it is none that this machine has.
    """
    if device is not None:
        _check(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and torch.cuda.device_count() > 1:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device


def _check(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: choose cpu, cuda, or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: choose cpu, cuda, or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")


def this_process() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def resolve_precision(precision: str, accelerator: str) -> str:
    """Lightning's name for 32, 16 or bf16.

    Raises:
        ConfigError: it is none of them, or 16 without a GPU.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if precision == "16" and accelerator == "cpu":
        raise ConfigError("--precision 16: half precision with loss scaling needs a GPU: use bf16 or 32 on the CPU")
    return PRECISIONS[precision]


def resolve_devices(gpus: str | None, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """``accelerator`` and ``devices``: 0 is the CPU (as many processes as lightning.trainer.devices
    says, if its accelerator is cpu), N the first N GPUs, "0,2" a list of them.

    Without the flag it is what lightning.trainer says, then every GPU that there is, then the CPU.

    Raises:
        ConfigError: a GPU that is not there.
    """
    there = torch.cuda.device_count()
    on_cpu = trainer.get("accelerator") == "cpu"
    if gpus is None:
        accelerator = trainer.get("accelerator", "auto")
        if accelerator == "auto":
            if not there:
                return {"accelerator": "cpu", "devices": 1}
            accelerator = "cuda"
        if accelerator in ("cuda", "gpu") and not there:
            raise ConfigError(f"lightning.trainer.accelerator: {accelerator}: this machine has no GPU; cpu is the CPU")
        devices = trainer.get("devices", "auto")
        if devices in ("auto", -1, "-1"):
            devices = there if accelerator in ("cuda", "gpu") else 1
        if isinstance(devices, str):
            devices = [int(part) for part in devices.split(",") if part] if "," in devices else int(devices)
        return {"accelerator": accelerator, "devices": devices}
    try:
        wanted = [int(part) for part in gpus.split(",") if part.strip()]
    except ValueError:
        wanted = []
    if not wanted or min(wanted) < 0:
        raise ConfigError(f"--gpus {gpus}: give a number of GPUs, as in 2, or a list, as in 0,2; 0 is the CPU")
    if "," not in gpus:
        if wanted[0] == 0:
            return {"accelerator": "cpu", "devices": trainer.get("devices", 1) if on_cpu else 1}
        wanted = list(range(wanted[0]))
    missing = [gpu for gpu in wanted if gpu >= there]
    if missing:
        has = f"this machine has {there} GPU{'' if there == 1 else 's'}" if there else "this machine has no GPU"
        raise ConfigError(f"--gpus {gpus}: {has}; --gpus 0 is the CPU")
    return {"accelerator": "cuda", "devices": wanted}
