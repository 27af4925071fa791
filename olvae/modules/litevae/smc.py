"""Self-modulated convolution [P Eq. 3], which replaces convolution and normalisation in the decoder."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SMC(nn.Module):
    """A convolution whose filters are scaled per input channel, then normalised to length ``gain``.

    w'(o,i,k) = gain * s_i w(o,i,k) / sqrt(sum_{i,k} (s_i w(o,i,k))^2 + eps)                    [P Eq. 3]

    The scales s (one per input channel) and the gain (one per layer) are learned and start at 1. Nothing depends on the
    sample, so at inference the layer is an ordinary convolution: see :meth:`fold`.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H, W), for odd kernel sizes.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, eps: float = 1e-8) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"SMC needs an odd kernel_size to keep the image's size, got {kernel_size}")
        self.eps = eps
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.scales = nn.Parameter(torch.ones(in_channels))
        self.gain = nn.Parameter(torch.ones(1))

    def modulated_weight(self) -> Tensor:
        """w', (out_channels, in_channels, k, k), in the parameters' dtype."""
        w = self.conv.weight * self.scales.view(1, -1, 1, 1)
        return self.gain * w * (w.square().sum(dim=(1, 2, 3), keepdim=True) + self.eps).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.modulated_weight(), self.conv.bias, padding=self.conv.padding)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The same function as an ordinary convolution, a copy."""
        conv = copy.deepcopy(self.conv)
        conv.weight.copy_(self.modulated_weight())
        return conv


def fold_smc(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with an ordinary Conv2d for every SMC, for inference."""
    if isinstance(module, SMC):
        return module.fold()
    folded = copy.deepcopy(module)
    for name, child in list(folded.named_modules()):
        if isinstance(child, SMC):
            folded.set_submodule(name, child.fold())
    return folded
