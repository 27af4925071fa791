"""Files of pretrained networks, as far as they can be had without a download."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from olvae.pretrained_networks import ALEXNET, INCEPTION, VGG16, VGG19


def _he(module: nn.Module) -> None:
    """Keeps the scale of what passes through, so that far layers still tell images apart."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.uniform_(module.bias, -0.1, 0.1)


def classifier_of_torchvision(build) -> dict[str, torch.Tensor]:
    """A state dict with every name and shape; the classifier's values, which LPIPS has no use for,
    are zero.
    """
    with torch.device("meta"):
        model = build(weights=None)
    model.features.to_empty(device="cpu").apply(_he)
    return {
        name: tensor if name.startswith("features.") else torch.zeros(1).expand(tensor.shape)
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory) -> Path:
    """Randomly initialised weights in the published files' format."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(classifier_of_torchvision(torchvision.models.vgg16), folder / VGG16.name)
    torch.save(classifier_of_torchvision(torchvision.models.alexnet), folder / ALEXNET.name)
    inception = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    for layer in inception.modules():
        _he(layer)
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= (
                1.05  # over a hundred layers: features of about 0.4, as the published weights give
            )
    torch.save(inception.state_dict(), folder / INCEPTION.name)
    return folder


@pytest.fixture(scope="session")
def vgg19(weights_dir) -> Path:
    """The same of VGG19, which few tests need."""
    path: Path = weights_dir / VGG19.name
    torch.manual_seed(0)
    torch.save(classifier_of_torchvision(torchvision.models.vgg19), path)
    return path


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """No weights in the environment, an empty hub cache, and no network;
    gives the cache's folder.
    """

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("OLVAE_WEIGHTS", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    return tmp_path / "hub" / "checkpoints"
