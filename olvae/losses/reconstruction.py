"""Pixel losses between an image and its reconstruction: means over all elements, in float32."""

from collections.abc import Callable

from torch import Tensor

from olvae.modules.precision import island

__all__ = ["RECONSTRUCTION", "charbonnier", "l1", "l2"]


def l1(x: Tensor, y: Tensor) -> Tensor:
    return (island(x) - island(y)).abs().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    return (island(x) - island(y)).square().mean()


def charbonnier(x: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:
    """mean sqrt(d^2 + eps^2): an L1 that is smooth at 0. Its value for equal inputs is eps [P 4.3]."""
    return ((island(x) - island(y)).square() + eps**2).sqrt().mean()


RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1,
    "l2": l2,
    "charbonnier": charbonnier,
}
