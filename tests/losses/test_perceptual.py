import copy
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import lpips as reference
import pytest
import torch
import torchvision

from olvae.losses.perceptual import LPIPS
from olvae.weights import VGG16


@pytest.fixture(scope="module")
def vgg(weights_dir) -> Path:
    return weights_dir / VGG16.name


@pytest.fixture(scope="module")
def loss(vgg) -> LPIPS:
    """Not to be changed."""
    return LPIPS(str(vgg))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("OLVAE_WEIGHTS", raising=False)

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "hub" / "checkpoints"


def test_equals_the_lpips_package(vgg, loss, monkeypatch):
    """The package loads the same file its own way: through torchvision's loader."""
    state = torch.load(vgg, weights_only=True)
    monkeypatch.setattr(torchvision.models.vgg.VGG16_Weights, "get_state_dict", lambda *args, **kwargs: state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reference.LPIPS(net="vgg", verbose=False)
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    ours = loss(x, y)
    assert ours.item() == pytest.approx(theirs(x, y).mean().item(), rel=1e-5)
    assert ours.item() > 0
    assert loss(x, x).item() == 0


def test_gradients_reach_the_reconstruction_and_not_the_network(loss):
    y = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    loss(torch.zeros(1, 3, 32, 32), y).backward()
    assert torch.isfinite(y.grad).all()
    assert (y.grad != 0).any()
    assert all(p.grad is None for p in loss.__dict__["network"].parameters())


def test_is_no_part_of_the_model(vgg):
    loss = LPIPS(str(vgg))
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert copy.deepcopy(loss) is loss
    loss.double()
    assert loss.__dict__["network"].lin0.model[1].weight.dtype == torch.float64  # yet it moves with it


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_compared_one_by_one(loss, channels):
    x, y = torch.rand(2, channels, 32, 32), torch.rand(2, channels, 32, 32)
    grey = [loss(x[:, c : c + 1].expand(-1, 3, -1, -1), y[:, c : c + 1].expand(-1, 3, -1, -1)) for c in range(channels)]
    assert loss(x, y).item() == pytest.approx(torch.stack(grey).mean().item(), rel=1e-5)


def test_float32_under_autocast(loss):
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    outside = loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x, y), outside)


def test_finds_the_cached_file(vgg, loss, hub):
    hub.mkdir(parents=True)
    (hub / VGG16.name).symlink_to(vgg)
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    assert LPIPS()(x, y).item() == loss(x, y).item()


def test_says_what_is_missing(hub):
    with pytest.raises(FileNotFoundError) as error:
        LPIPS()
    text = str(error.value)
    assert "\n" not in text
    for part in (VGG16.name, "https://download.pytorch.org/models/", str(hub), "lpips_weights", "lpips_weight=0"):
        assert part in text


def test_a_named_file_that_is_not_there(hub):
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.pth"):
        LPIPS("/nowhere/elsewhere.pth")


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"features\.0\.bias is missing"):
        LPIPS(str(path))
    path.write_bytes(b"not a file of torch's")
    with pytest.raises(ValueError, match="not a file of VGG16 weights"):
        LPIPS(str(path))


@pytest.mark.network
def test_the_weights_download(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    x, y = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    assert LPIPS()(x, y).item() > 0
    assert (tmp_path / "hub" / "checkpoints" / VGG16.name).is_file()
