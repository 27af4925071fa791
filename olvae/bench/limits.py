"""What a device reaches with plain operations: a matrix product, a convolution as the network's largest, a copy."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from olvae.modules.base import ShapesOnly

__all__ = ["Convolution", "copy_of", "heaviest_convolution", "matrix_product"]

SIDES = {"cpu": 1024, "cuda": 8192}
"""Of the matrices that are multiplied: large enough that a product takes milliseconds."""


def matrix_product(device: str, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A product of two square matrices, and its multiply-accumulates."""
    side = SIDES[device.partition(":")[0]]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, side**3


def copy_of(x: Tensor) -> tuple[Callable[[], Tensor], int]:
    """A copy into memory that is there already, and the bytes that it reads and writes."""
    target = torch.empty_like(x)
    return lambda: target.copy_(x), 2 * x.nbytes


class Convolution(NamedTuple):
    """A convolution in two dimensions, by the shapes of its input and weight."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    def macs(self) -> int:
        """Multiply-accumulates."""
        with torch.device("meta"):
            out = self._run(torch.empty(self.shape), torch.empty(self.weight))
        return out.numel() * self.weight[1] * self.weight[2] * self.weight[3]

    def build(self, device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> Callable[[], Tensor]:
        """A function that computes it on random numbers."""
        x, weight = (
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
            for shape in (self.shape, self.weight)
        )
        return lambda: self._run(x, weight)

    def _run(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, groups=self.groups)


def heaviest_convolution(network: nn.Module, shape: tuple[int, ...]) -> Convolution:
    """The 3x3 convolution of most multiply-accumulates in a network's forward pass on an input of this shape.

    Found on the meta device, without memory.

    Raises:
        ValueError: it has none.
    """
    meta = copy.deepcopy(network).to("meta")
    with torch.no_grad(), ShapesOnly(), _Convolutions() as convolutions:
        meta(torch.empty(shape, device="meta"))
    if not convolutions.found:
        raise ValueError(f"{type(network).__name__} has no 3x3 convolution")
    heaviest: Convolution = max(sorted(convolutions.found), key=Convolution.macs)
    return heaviest


class _Convolutions(TorchDispatchMode):
    """Keeps the shapes of 3x3 convolutions, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[Convolution] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, _, transposed, _, groups = args
            if tuple(weight.shape[2:]) == (3, 3) and not transposed:
                self.found.add(Convolution(tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), groups))
        return func(*args, **(kwargs or {}))
