"""Float32 islands: computations that stay in float32 under autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x`` (devices such as meta have none)."""
    kind = x.device.type
    return bool(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off for the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def island(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@contextmanager
def full_float32(x: Tensor) -> Iterator[None]:
    """Turn off autocast, and TF32 in convolutions, cuDNN's default: for numbers that are compared with others'."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with no_autocast(x):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
