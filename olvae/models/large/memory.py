"""How much memory an inference takes, computed before it is run."""

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
    """Bytes that a computation may take where nobody says: half of a GPU's free memory, elsewhere 1 GiB."""
    return int(torch.cuda.mem_get_info(device)[0]) // 2 if device.type == "cuda" else GIB


def peak_bytes(module: M, run: Callable[[M, Tensor], object], shape: tuple[int, ...]) -> int:
    """The most bytes that tensors take while ``run(module, x)`` runs without gradients, x and parameters apart.

    It runs on the meta device: on shapes alone, in the parameters' dtype, in milliseconds whatever the size. A
    convolution counts its input and output twice, because oneDNN and cuDNN may bring both into a layout of their own.
    """
    meta = _meta_copy(module)
    x = torch.empty(shape, dtype=next(meta.parameters()).dtype, device="meta")
    with torch.no_grad(), _LiveBytes() as live:
        run(meta, x)
    return int(live.peak)


def _meta_copy(module: M) -> M:
    """The module with parameters and buffers of no content, which are not copied on the way, and without its hooks,
    which are not for trials."""
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
    """Adds up the storages that operations make, until they are freed."""

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
        extra = 0
        if func in CONVOLUTIONS:
            extra = sum(t.numel() * t.element_size() for t in (args[0], out))
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
