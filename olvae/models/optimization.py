"""What a training step needs around its losses: seeds, optimizers, rates, the scale of fp16, a ratio of gradients."""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from olvae.config import ConfigError

__all__ = ["adam_of", "adam_state_bytes", "grad_scaler", "gradient_ratio", "last_convolution", "lr_factor", "mix_seeds"]


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers, different for each list of them."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, dtype=np.uint64)[0]) >> 1


def adam_of(name: str) -> Callable[..., torch.optim.Optimizer]:
    """torch's ``adam``, or bitsandbytes' ``adam8bit``, whose states take two bytes a weight instead of eight.

    Raises:
        ValueError: another name.
        ConfigError: bitsandbytes is not installed.
    """
    if name == "adam":
        return partial(torch.optim.Adam, fused=True)
    if name != "adam8bit":
        raise ValueError(f"optimizer must be adam or adam8bit, got {name!r}")
    try:
        from bitsandbytes.optim.adam import Adam8bit
    except ImportError as error:
        raise ConfigError(
            "model.params.optimizer: adam8bit needs bitsandbytes: pip install 'open-litevae[adam8bit]'"
        ) from error
    return cast("Callable[..., torch.optim.Optimizer]", Adam8bit)


def adam_state_bytes(name: str, parameter: Tensor) -> int:
    """Bytes of the two moments that an optimizer of :func:`adam_of` holds for a parameter.

    In 8 bits each block of 256 values has a scale in float32; a parameter of less than 4096 values stays in float32.
    """
    values = parameter.numel()
    if name == "adam" or values < 4096:
        return 2 * parameter.element_size() * values
    return 2 * (values + 4 * -(-values // 256))


def lr_factor(step: int, name: str, warmup_steps: int, decay_steps: int, min_factor: float) -> float:
    """The factor of the base rate at a step, counted from 0.

    Linear from 1/warmup_steps to 1 over the warm-up; then 1 (``constant``), or half a cosine from 1 down to
    ``min_factor`` at ``decay_steps`` and ``min_factor`` from there on (``cosine``).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def grad_scaler(module: pl.LightningModule) -> torch.amp.GradScaler | None:
    """The scaler of the losses under fp16; None in any other precision."""
    scaler: torch.amp.GradScaler | None = getattr(module.trainer.precision_plugin, "scaler", None)
    return scaler


def last_convolution(module: nn.Module) -> nn.Conv2d:
    """The last convolution in the order of definition: in a decoder, the one that makes the image."""
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1]


def gradient_ratio(module: pl.LightningModule, one: Tensor, other: Tensor, network: nn.Module | None = None) -> Tensor:
    """|gradient of one loss| / |gradient of the other| at a network's last layer, the decoder's by default; in float32.

    The gradients are those of the whole batch, over all ranks. Under fp16 both losses carry the loss scale, which the
    ratio does not, or small gradients would be lost.
    """
    measured = module.decoder if network is None else network
    assert isinstance(measured, nn.Module)
    weight = last_convolution(measured).weight
    scaler = grad_scaler(module)

    def scaled(x: Tensor) -> Tensor:
        return x if scaler is None else scaler.scale(x)

    norms: list[Tensor] = []
    for loss in (one, other):
        (gradient,) = torch.autograd.grad(scaled(loss), weight, retain_graph=True)
        if module.trainer.world_size > 1:
            gradient = module.trainer.strategy.reduce(gradient, reduce_op="mean")
        norms.append(gradient.float().norm())
    return norms[0] / torch.maximum(norms[1], 1e-12 * scaled(norms[1].new_ones(())))
