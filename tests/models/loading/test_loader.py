import sys

import pytest

from olvae.config import ConfigError
from olvae.models.loading.targets import find_target
from olvae.models.target_names import check_target

TOY = """
import torch
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.loader import Loader, Target
from olvae.modules.distributions import Deterministic

class Mean(Autoencoder):
    in_channels, latent_channels = 3, 3

    def __init__(self, f):
        super().__init__()
        self.downscale, self.weight = f, torch.nn.Parameter(torch.ones(()))

    def encode(self, x):
        return Deterministic(self.weight * torch.nn.functional.avg_pool2d(x, self.downscale))

    def decode(self, z):
        return torch.nn.functional.interpolate(z, scale_factor=self.downscale)

class MeanLoader(Loader):
    def accepts(self, text):
        return text.isdigit()

    def find(self, text, options):
        return Target(lambda: Mean(int(text)))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch) -> str:
    (tmp_path / "toy_loader.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_loader", raising=False)
    return "toy_loader.MeanLoader"


def test_a_loader_from_outside(toy, image):
    target = find_target(f"{toy}:4")
    assert target.name == target.given == f"{toy}:4"
    # Before torch is imported, a command asks whether there is such a target.
    check_target(f"{toy}:4")
    assert target.load().encode(image).mean.shape == (1, 3, 8, 10)
    assert target.load().image_size == 256
    with pytest.raises(ConfigError, match=r"MeanLoader:4: .*weights"):
        target.untrained()
    with pytest.raises(FileNotFoundError, match="MeanLoader:four: "):
        find_target(f"{toy}:four")
    with pytest.raises(ConfigError, match=r"toy_loader\.Mean .*Loader"):
        find_target("toy_loader.Mean:4")
    with pytest.raises(ConfigError, match=r"toy_loader.MeanLoder"):
        find_target("toy_loader.MeanLoder:4")
