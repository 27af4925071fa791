"""Parameters and multiply-accumulates of a network, counted without running it."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_parameters"]


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *shape: int) -> int:
    """Multiply-accumulates of one forward pass of an input of this shape: half of torch's FLOPs.

    Counted on the meta device, so that no memory is needed; matrix products and convolutions only.
    """
    module = copy.deepcopy(module).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops()) // 2
