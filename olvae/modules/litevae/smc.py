"""Self-modulated convolution [P Eq. 3], which LiteVAE's decoder has in place of GroupNorm."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.mixed_precision import Operands, upcast


class SMC(nn.Module):
    """A convolution whose filters are scaled per input channel, then normalised to length ``gain``.

    w'(o,i,k) = gain * s_i w(o,i,k) / sqrt(sum_{i,k} (s_i w(o,i,k))^2 + eps)             [P Eq. 3]

    The scales s (one per input channel) and the gain (one per layer) are learned and start at 1.
    Nothing depends on the sample, so at inference the layer is an ordinary convolution: see
    :meth:`fold`.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H, W), for odd kernel sizes.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, eps: float = 1e-8
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(
                f"SMC needs an odd kernel_size to keep the image's size, got {kernel_size}"
            )
        self.conv = _ModulatedConv2d(in_channels, out_channels, kernel_size, eps)
        self.scales = nn.Parameter(torch.ones(in_channels))
        self.gain = nn.Parameter(torch.ones(1))

    @staticmethod
    def derive(layers: Sequence["SMC"]) -> list[Operands]:
        """Return w', (out_channels, in_channels, k, k), and the bias of each layer.

        Layers of one shape are computed together, in few launches.
        """
        # Trained and frozen layers apart: in a stack all would require gradients.
        alike: dict[Any, list[SMC]] = {}
        for layer in layers:
            trained = tuple(parameter.requires_grad for parameter in layer._given())
            alike.setdefault((layer.conv.weight.shape, layer.conv.eps, trained), []).append(layer)

        weights: dict[SMC, Tensor] = {}
        for (_, eps, _), same in alike.items():
            modulated = _modulate([layer._given() for layer in same], eps)
            weights.update(zip(same, modulated.unbind(), strict=True))
        return [(weights[layer], layer.conv.bias) for layer in layers]

    def _given(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.conv.weight, self.scales, self.gain

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x, self.scales, self.gain)
        return out

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.conv.padding)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """Return a new ordinary convolution that computes the same."""
        ((weight, _),) = self.derive([self])
        given = self.conv
        size = given.kernel_size[0]
        # On the meta device nothing is drawn: both parameters are replaced.
        folded = nn.Conv2d(
            given.in_channels, given.out_channels, size, padding=size // 2, device="meta"
        )
        folded.weight = nn.Parameter(weight, given.weight.requires_grad)
        folded.bias = copy.deepcopy(given.bias)
        return folded.train(given.training)


class _ModulatedConv2d(nn.Conv2d):
    """An SMC's convolution, which takes the SMC's scales and gain as inputs.

    It uses its own weight in its own ``forward``, so that what hooks itself to modules finds it
    there: offloading to the CPU, storage in another dtype.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, eps: float) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.eps = eps

    def forward(self, x: Tensor, scales: Tensor, gain: Tensor) -> Tensor:  # type: ignore[override]
        (weight,) = _modulate([(self.weight, scales, gain)], self.eps).unbind()
        return F.conv2d(x, weight, self.bias, padding=self.padding)


def _modulate(given: Sequence[tuple[Tensor, Tensor, Tensor]], eps: float) -> Tensor:
    """Compute w' of n layers of one shape from their weights, scales and gains.

    (n, out_channels, in_channels, k, k).
    """
    # One layer needs no copy of its weight.
    w, scales, gain = (
        torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
        for tensors in zip(*given, strict=True)
    )
    # In half precision eps and the squares would be 0.
    dtype = w.dtype
    w = upcast(w) * scales[:, None, :, None, None]
    scaled = gain[..., None, None, None] * w
    inverse_length = (w.square().sum(dim=(2, 3, 4), keepdim=True) + eps).rsqrt()
    return (scaled * inverse_length).to(dtype)


def fold_smc(module: nn.Module) -> nn.Module:
    """Copy ``module`` with an ordinary Conv2d for every SMC, for inference."""
    if isinstance(module, SMC):
        return module.fold()
    folded = copy.deepcopy(module)
    for name, child in list(folded.named_modules()):
        if isinstance(child, SMC):
            folded.set_submodule(name, child.fold())
    return folded
