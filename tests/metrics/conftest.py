"""A machine without pretrained weights, and pairs of images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """No weights in the environment, an empty hub cache, and no network; gives the cache's folder."""

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("OLVAE_WEIGHTS", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    return tmp_path / "hub" / "checkpoints"


def pairs(n: int, size: int, seed: int = 0) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Keys, smooth random images of their own contrast, and their noisy copies, whose noise differs from one to one."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(size=(n, 3, 6, 6)) * rng.uniform(10, 60, (n, 1, 1, 1))).float()
    x = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") + 128
    y = x + torch.from_numpy(rng.normal(size=x.shape) * rng.uniform(1, 25, (n, 1, 1, 1))).float()
    keys = [f"{i:04d}.png" for i in range(n)]
    return keys, x.round().clamp(0, 255).to(torch.uint8), y.round().clamp(0, 255).to(torch.uint8)
