"""Networks that a model uses and does not contain: frozen, in no state dict, parameter list or copy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Constant", "Normalise"]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Constant(nn.Module):
    """Holds a frozen ``network``, which moves with the module from device to device and is no part of it otherwise.

    Copies of the module share the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.__dict__["network"] = network.requires_grad_(False).eval()

    @property
    def network(self) -> nn.Module:
        found = self.__dict__["network"]
        assert isinstance(found, nn.Module)
        return found

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Constant":
        self.network._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Constant":
        return self


class Normalise(nn.Module):
    """Images in [-1, 1], (B, 3, H, W), as a network of ImageNet expects them: in [0, 1], less a mean, over a deviation.

    Args:
        mean, std: of each channel of images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * (x + 1.0) - self.mean) / self.std
