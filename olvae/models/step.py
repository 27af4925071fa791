"""Small functions that the training step is made of."""

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["grad_scaler", "gradient_ratio", "last_convolution", "mix_seeds"]


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers, another for each list of them."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, dtype=np.uint64)[0] >> 1)


def grad_scaler(module: pl.LightningModule) -> torch.amp.GradScaler | None:
    """What scales the losses under fp16; None in any other precision."""
    scaler: torch.amp.GradScaler | None = getattr(module.trainer.precision_plugin, "scaler", None)
    return scaler


def last_convolution(module: nn.Module) -> nn.Conv2d:
    """The last one in the order of definition, which in a decoder makes the image."""
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1]


def gradient_ratio(module: pl.LightningModule, one: Tensor, other: Tensor) -> Tensor:
    """|gradient of one loss| / |gradient of the other| at the decoder's last layer, in float32.

    The gradients are those of the whole batch, over all ranks. Under fp16 both losses are scaled for it, because
    small gradients would be lost.
    """
    assert isinstance(module.decoder, nn.Module)
    weight = last_convolution(module.decoder).weight
    scaler = grad_scaler(module)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    norms: list[Tensor] = []
    for loss in (one, other):
        (gradient,) = torch.autograd.grad(scale * loss, weight, retain_graph=True)
        if module.trainer.world_size > 1:
            gradient = module.trainer.strategy.reduce(gradient, reduce_op="mean")
        norms.append(gradient.float().norm() / scale)
    return norms[0] / norms[1].clamp_min(1e-12)
