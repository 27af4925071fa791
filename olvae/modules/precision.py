"""Floating-point islands: what must stay in float32 when the rest runs under autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocast_enabled", "full_float32", "island", "no_autocast"]


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x`` (devices such as meta have none)."""
    kind = x.device.type
    return bool(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off, where it is on, for the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def island(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is float32 or float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@contextmanager
def full_float32(x: Tensor) -> Iterator[None]:
    """No autocast, and no TF32 in convolutions, which cuDNN uses by default: for numbers that others compare with."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with no_autocast(x):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
