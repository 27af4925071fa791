"""``torch.compile`` of networks in place, where a compiler is installed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["compile_networks"]


def compile_networks(modules: Sequence[nn.Module], device: torch.device) -> bool:
    """Compile networks in place, without new names in their state dicts, unless no compiler works here.

    Returns:
        Whether one does; if not, the networks are as they were.
    """
    if not _works(device):
        return False
    for module in modules:
        module.compile()
    return True


def _works(device: torch.device) -> bool:
    def tiny(x: Tensor) -> Tensor:
        return x.sin() + 1.0

    try:
        torch.compile(tiny)(torch.zeros(8, device=device))
    except (RuntimeError, OSError, ImportError):  # what the backend raises has many names
        return False
    return True
