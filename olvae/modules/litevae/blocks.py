"""Blocks of encoder and decoder: residual blocks, the two UNets, self-modulated convolution [P Eq. 3].

The UNets, which extract and aggregate features, have a constant resolution: "down" and "up" are channels only.
``OpenUNet`` is open-LiteVAE's [R][M], with its parameter names; ``PaperUNet`` is the paper's [P App. G].
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import Operands, Steps, casts_together


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def conv1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1)


def shortcut(in_channels: int, out_channels: int) -> nn.Module:
    return conv1(in_channels, out_channels) if in_channels != out_channels else nn.Identity()


class GroupNorm(nn.GroupNorm):
    """torch's, but groups of one value, as in images of one latent position, are allowed and become 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class PostActivationBlock(nn.Module):
    """conv, GroupNorm, SiLU, conv, GroupNorm, SiLU, then the (1x1-projected) input is added [M]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 8) -> None:
        super().__init__()
        self.conv1 = conv3(in_channels, out_channels)
        self.norm1 = GroupNorm(groups, out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels)
        self.residual_conv = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        h = F.silu(self.norm2(self.conv2(h)))
        out: Tensor = h + self.residual_conv(x)
        return out


class PreActivationBlock(nn.Module):
    """GroupNorm, SiLU, conv, GroupNorm, SiLU, dropout, conv, then the (1x1-projected) input is added [P App. G].

    The number of groups is gcd(32, channels), because 32 does not divide S's widths [D].
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = GroupNorm(gcd(32, in_channels), in_channels)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm2 = GroupNorm(gcd(32, out_channels), out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3(out_channels, out_channels)
        self.shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        out: Tensor = h + self.shortcut(x)
        return out


class UNet(Steps, ABC):
    """The order of steps and skips, which both UNets share.

    Each block on the way down leaves its output as a skip, each block on the way up takes one; convolutions change the
    width.
    """

    init_conv: nn.Conv2d
    conv_out: nn.Conv2d

    @abstractmethod
    def steps(self) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        """Blocks and convolutions on the way down, in the middle, and on the way up."""

    @casts_together
    def forward(self, x: Tensor) -> Tensor:
        h = self.init_conv(x)
        skips: list[Tensor] = []
        down, middle, up = self.steps()
        for step in down:
            if isinstance(step, nn.Conv2d):
                h = step(h)
            else:
                h = self.step(step, h)
                skips.append(h)
        for step in middle:
            h = self.step(step, h)
        for step in up:
            h = step(h) if isinstance(step, nn.Conv2d) else self.step(partial(_joined, step), h, skips.pop())
        out: Tensor = self.conv_out(h)
        return out


def _joined(block: nn.Module, h: Tensor, skip: Tensor) -> Tensor:
    out: Tensor = block(torch.cat((h, skip), dim=1))  # (B, 2 width, H, W)
    return out


class OpenUNet(UNet):
    """open-LiteVAE's UNet [R][M].

    Widths are ``channels * mult``; every width but the last is a level with ``blocks`` residual blocks, whose
    outputs are skips, and a 1x1 convolution to the next width; the last width is the middle. On the way up a
    1x1 convolution narrows, then each block takes one skip. Ends in a 1x1 convolution.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int, mult: Sequence[int], blocks: int) -> None:
        super().__init__()
        *widths, middle = (channels * m for m in mult)
        self.init_conv = conv3(in_channels, channels)
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()

        for width, wider in zip(widths, [*widths[1:], middle], strict=True):
            level = [PostActivationBlock(width, width) for _ in range(blocks)]
            self.down_blocks.append(nn.ModuleList([*level, conv1(width, wider)]))
        self.mid_block = nn.Sequential(*(PostActivationBlock(middle, middle) for _ in range(blocks)))
        for width, wider in zip(reversed(widths), [middle, *reversed(widths[1:])], strict=True):
            level = [PostActivationBlock(2 * width, width) for _ in range(blocks)]
            self.up_blocks.append(nn.ModuleList([conv1(wider, width), *level]))
        self.conv_out = conv1(channels * mult[0], out_channels)

    def steps(self) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        down = [step for level in self.down_blocks for step in level.children()]
        up = [step for level in self.up_blocks for step in level.children()]
        return down, list(self.mid_block), up


class PaperUNet(UNet):
    """The paper's UNet [P App. G]: pre-activation blocks, widths change inside a level's first block.

    ``blocks`` blocks per level down and up, each leaving and taking one skip, and two in the middle; a 3x3
    convolution at both ends and no norm before the last: that is the layout with the paper's counts [M].

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H, W).
    """

    def __init__(
        self, in_channels: int, out_channels: int, channels: int, mult: Sequence[int], blocks: int, dropout: float
    ) -> None:
        super().__init__()
        self.init_conv = conv3(in_channels, channels)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        skips: list[int] = []
        width = channels
        for m in mult:
            for _ in range(blocks):
                down.append(PreActivationBlock(width, channels * m, dropout))
                width = channels * m
                skips.append(width)
        self.mid_blocks = nn.Sequential(*(PreActivationBlock(width, width, dropout) for _ in range(2)))
        for m in reversed(mult):
            for _ in range(blocks):
                up.append(PreActivationBlock(width + skips.pop(), channels * m, dropout))
                width = channels * m
        self.down_blocks = nn.ModuleList(down)
        self.up_blocks = nn.ModuleList(up)
        self.conv_out = conv3(width, out_channels)

    def steps(self) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        return list(self.down_blocks), list(self.mid_blocks), list(self.up_blocks)


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

    @staticmethod
    def derive(layers: Sequence["SMC"]) -> list[Operands]:
        """w', (out_channels, in_channels, k, k), and the bias of each; those of one shape are computed together."""
        alike: dict[Any, list[SMC]] = {}
        for layer in layers:
            trained = tuple(parameter.requires_grad for parameter in layer._given())
            alike.setdefault((layer.conv.weight.shape, layer.eps, trained), []).append(layer)
        weights: dict[SMC, Tensor] = {}
        for (_, eps, _), same in alike.items():
            weights |= zip(same, _modulate([layer._given() for layer in same], eps), strict=True)
        return [(weights[layer], layer.conv.bias) for layer in layers]

    def _given(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.conv.weight, self.scales, self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.derive([self])[0])

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.conv.padding)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The same function as an ordinary convolution, a copy."""
        conv = copy.deepcopy(self.conv)
        conv.weight.copy_(self.derive([self])[0][0])
        return conv


def _modulate(given: Sequence[tuple[Tensor, Tensor, Tensor]], eps: float) -> Tensor:
    """w' of n layers of one shape, (n, out_channels, in_channels, k, k), from their weights, scales and gains."""
    w, scales, gain = (torch.stack(t) if len(t) > 1 else t[0][None] for t in zip(*given, strict=True))
    w = w * scales[:, None, :, None, None]
    return gain[..., None, None, None] * w * (w.square().sum(dim=(2, 3, 4), keepdim=True) + eps).rsqrt()


def fold_smc(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with an ordinary Conv2d for every SMC, for inference."""
    if isinstance(module, SMC):
        return module.fold()
    folded = copy.deepcopy(module)
    for name, child in list(folded.named_modules()):
        if isinstance(child, SMC):
            folded.set_submodule(name, child.fold())
    return folded
