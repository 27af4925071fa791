"""Count parameters and multiply-accumulates, and watch the outputs of modules."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class ShapesOnly(TorchFunctionMode):
    """Skip normalisations, SiLU and power iterations when counting operations.

    They are slow on the meta device.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.mv:
            # A column of the matrix has the product's shape.
            return args[0][:, 0]
        if func in _SAME_SHAPE:
            return args[0]
        return func(*args, **(kwargs or {}))


_SAME_SHAPE = frozenset((F.normalize, F.group_norm, torch.group_norm, F.silu))


def count_macs(module: nn.Module, *shape: int, method: str = "__call__") -> int:
    """Count the multiply-accumulates of a module's method on an input of this shape.

    In matrix products and convolutions: half of torch's FLOPs, on the meta device, without memory.
    """
    from torch.utils.flop_counter import FlopCounterMode

    tensors = (*module.parameters(), *module.buffers())
    if any(not tensor.is_meta for tensor in tensors):
        module = copy.deepcopy(module).to("meta")
    with torch.no_grad(), ShapesOnly(), FlopCounterMode(display=False) as counter:
        getattr(module, method)(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops()) // 2


@contextmanager
def watch_outputs(
    modules: Mapping[str, nn.Module], record: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``record(name, output)`` for each output of these modules that is a tensor."""

    # torch's signature of a hook, after the name.
    def hook(name: str, module: nn.Module, given: Any, output: Any) -> None:  # noqa: ARG001
        if isinstance(output, Tensor):
            record(name, output)

    handles = [
        module.register_forward_hook(partial(hook, name)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
