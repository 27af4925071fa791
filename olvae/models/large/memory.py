"""The memory that an inference takes, computed before it runs."""

import copy
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["GIB", "default_memory", "peak_bytes"]


GIB = 2**30

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)  # the latter in inference mode

M = TypeVar("M", bound=nn.Module)


def default_memory(device: torch.device) -> int:
    """The default limit in bytes: half of a GPU's free memory, or 1 GiB on the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) // 2 if device.type == "cuda" else GIB


def peak_bytes(module: M, run: Callable[[M, Tensor], object], shape: tuple[int, ...]) -> int:
    """The peak of bytes in tensors while ``run(module, x)`` runs without gradients, beside x and parameters.

    Computed on the meta device, from shapes alone, in the parameters' dtype, in milliseconds for any size. A
    convolution's input and output count twice, because oneDNN and cuDNN may copy both into another layout.
    """
    meta = _meta_copy(module)
    x = torch.empty(shape, dtype=next(meta.parameters()).dtype, device="meta")
    with torch.no_grad(), _LiveBytes() as live:
        run(meta, x)
    return int(live.peak)


def _meta_copy(module: M) -> M:
    """A copy of the module on the meta device, without copying its tensors, and without its hooks."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    meta = copy.deepcopy(module, memo)
    for part in meta.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return meta


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in known:
                self._count(leaf.untyped_storage())
        extra = sum(t.nbytes for t in (args[0], out)) if func in CONVOLUTIONS else 0
        self.peak = max(self.peak, self.now + extra)
        return out

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.alive:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
