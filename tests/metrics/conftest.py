"""Pairs of images."""

import numpy as np
import torch
from torch import nn


def pairs(n: int, size: int, seed: int = 0) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Keys, smooth random images of their own contrast, and their noisy copies,
    whose noise differs from one to one.
    """
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(
        rng.normal(size=(n, 3, 6, 6)) * rng.uniform(10, 60, (n, 1, 1, 1))
    ).float()
    x = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") + 128
    y = x + torch.from_numpy(rng.normal(size=x.shape) * rng.uniform(1, 25, (n, 1, 1, 1))).float()
    keys = [f"{i:04d}.png" for i in range(n)]
    return keys, x.round().clamp(0, 255).to(torch.uint8), y.round().clamp(0, 255).to(torch.uint8)
