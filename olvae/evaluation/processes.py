"""Several processes on one job, as torchrun starts them: which one is this, and their results in the first."""

import os
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from olvae.config import ConfigError
from olvae.data.source import this_process

__all__ = ["device_of", "gather", "join", "leave"]

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
