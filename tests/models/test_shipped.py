import huggingface_hub
import pytest
import torch

from olvae import LiteVAE
from olvae.models import pretrained, shipped
from olvae.models.loading.targets import find_target
from tests.export.tiny import tiny_litevae


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of shipped models; whoever asks the hub fails."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")

    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(pretrained, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return tmp_path / "pretrained"


def test_a_shipped_model_is_a_target_like_its_export(folder):
    model = tiny_litevae()
    model.save_pretrained(folder / "small-f8")
    target = find_target("olvae:small-f8")
    assert target.name == target.given == "olvae:small-f8"
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = model.encode(x).mode()
    for loaded in (target.load(), LiteVAE.from_pretrained("olvae:small-f8")):
        assert torch.equal(loaded.encode(x).mode(), expected)


def test_the_names_that_there_are(folder):
    with pytest.raises(FileNotFoundError, match=r"^olvae:x: no model of this name in the package, which has none$"):
        find_target("olvae:x")
    for name in ("b", "a"):
        tiny_litevae().save_pretrained(folder / name)
    for wrong in ("olvae:c", "olvae:", "olvae:../pretrained/a", "olvae:a/config.json"):
        with pytest.raises(FileNotFoundError, match=r"no model of this name.* has olvae:a, olvae:b$"):
            find_target(wrong)
        with pytest.raises(FileNotFoundError, match=r"no model of this name.* has olvae:a, olvae:b$"):
            LiteVAE.from_pretrained(wrong)


def test_what_ships_loads():
    for name in shipped.shipped_names():
        files = {file.name for file in (shipped.FOLDER / name).iterdir()}
        assert {"config.json", "diffusion_pytorch_model.safetensors", "README.md"} <= files
        find_target(f"olvae:{name}").load()
