"""Randomly initialised weights in the published files' format, made once."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from olvae.weights import ALEXNET, INCEPTION, VGG16


def _he(module: nn.Module) -> None:
    """Keeps the scale of what passes through, so that far layers still tell images apart."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.uniform_(module.bias, -0.1, 0.1)


def _classifier_of_torchvision(build) -> dict[str, torch.Tensor]:
    """A state dict with every name and shape; the classifier's values, which LPIPS has no use for, are zero."""
    with torch.device("meta"):
        model = build(weights=None)
    model.features.to_empty(device="cpu").apply(_he)
    return {
        name: tensor if name.startswith("features.") else torch.zeros(1).expand(tensor.shape)
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(_classifier_of_torchvision(torchvision.models.vgg16), folder / VGG16.name)
    torch.save(_classifier_of_torchvision(torchvision.models.alexnet), folder / ALEXNET.name)
    inception = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for layer in inception.modules():
        _he(layer)
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= 1.05  # over a hundred layers: features of about 0.4, as the published weights give
    torch.save(inception.state_dict(), folder / INCEPTION.name)
    return folder


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
