import sys
from typing import Any

import pytest
import torch

from olvae.config import ConfigError
from olvae.models.loading.loader import Target, factors_outdated
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


def test_an_untrained_model_is_of_the_runs_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        "lightning.pytorch.seed_everything", lambda seed, **more: seeds.append((seed, more))
    )
    network = torch.nn.Linear(3, 2).train()
    target = Target(lambda: network, lambda: network, {"run": {"initial_seed": 5, "seed": 6}})
    assert target.untrained() is network
    assert not network.training
    assert seeds == [(5, {"verbose": False})]


TEACHER = {"target": "olvae.models.parts.teacher.Teacher"}
ANCHOR = {"target": "olvae.models.parts.anchor.Anchor"}
FREE = {"target": "olvae.models.parts.equivariance.Equivariance"}


@pytest.mark.parametrize(
    ("weights", "params", "outdated"),
    [
        ("a.ckpt", {"scaling_factor": 2.0}, True),
        ("a.ckpt", {"scaling_factor": 1.0, "shift_factor": None, "latents_std": None}, False),
        ("a.ckpt", {"shift_factor": 0.5}, True),
        ("a.ckpt", {"latents_mean": [0.0]}, True),
        (None, {"scaling_factor": 2.0}, False),
        ("a.ckpt", {"scaling_factor": 2.0, "freeze_encoder": True}, False),
        ("a.ckpt", {"scaling_factor": 2.0, "parts": {"a": None, "b": FREE}}, True),
        ("a.ckpt", {"scaling_factor": 2.0, "parts": {"a": TEACHER, "b": FREE}}, False),
        ("a.ckpt", {"scaling_factor": 2.0, "parts": {"a": ANCHOR}}, False),
        ("a.ckpt", None, False),
    ],
)
def test_factors_are_outdated_once_the_encoder_was_trained_from_other_weights(
    weights, params, outdated
):
    """Unless a part held the latents."""
    config: dict[str, Any] = {"run": {"weights": weights}}
    if params is not None:
        config["model"] = {"params": params}
    assert factors_outdated(config) == outdated
    assert Target(lambda: None, config=config).factors_outdated == outdated
