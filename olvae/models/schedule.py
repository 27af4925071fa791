"""The learning rate as a function of the step, where a step is one update."""

import math
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["adam_with_schedule", "lr_factor"]


def lr_factor(step: int, name: str, warmup_steps: int, decay_steps: int, min_factor: float) -> float:
    """What to multiply the base rate by at a step, counted from 0.

    Linear from 1/warmup_steps to 1 over the warm-up; then 1 (``constant``), or half a cosine from 1 down to
    ``min_factor`` at ``decay_steps`` and ``min_factor`` from there on (``cosine``).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def adam_with_schedule(
    parameters: list[nn.Parameter], rate: float, betas: tuple[float, float], factor: Callable[[int], float]
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Adam [P App. F], and the schedule that multiplies its rate by ``factor`` of the step."""
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=betas, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
