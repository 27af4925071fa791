"""The file for ComfyUI; its node is tested in tests/integrations/test_comfyui.py."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from olvae import LiteVAE
from olvae.config import save
from olvae.export import comfyui as module
from olvae.export.comfyui import export_comfyui
from olvae.models.loading.targets import find_target
from olvae.models.pretrained import config_inside, locate
from tests.export.tiny import tiny_litevae


@pytest.fixture
def model() -> LiteVAE:
    return tiny_litevae()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fold", [False, True])
def test_a_model_a_file_a_target(model, dtype, fold, tmp_path):
    model.set_for_diffusion({"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4, "force_upcast": True})
    file = tmp_path / "vae.safetensors"
    differences = export_comfyui(model, file, dtype, fold)
    assert differences["loaded back"] == 0.0
    assert ("folded" in differences) == fold
    meant = (model.fold() if fold else model).state_dict()
    written = load_file(file)
    assert written.keys() == {f"olvae.{name}" for name in meant}
    assert all(torch.equal(written[f"olvae.{name}"], tensor.to(dtype)) for name, tensor in meant.items())
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["config"])["folded"] == fold

    found = find_target(file)
    assert (found.name, found.config, found.run) == (str(file), {}, None)
    for loaded in (found.load(), LiteVAE.from_pretrained(file)):
        assert loaded.for_diffusion == model.for_diffusion
        assert loaded.folded == fold
        own = loaded.state_dict()
        assert all(torch.equal(own[name], tensor.to(dtype).float()) for name, tensor in meant.items())
    with pytest.warns(UserWarning, match=r"an export has one kind of weights: --raw is ignored"):
        find_target(file, raw=True)


def test_a_config_beside_it_does_not_count_but_one_that_is_named(model, tmp_path):
    export_comfyui(model, tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert find_target(tmp_path / "vae.safetensors").load().latent_channels == 4
    with pytest.raises(ValueError, match=r"encoder_config"):
        find_target(tmp_path / "vae.safetensors", config=tmp_path / "config.json")


def test_received_files_build_networks_of_ours_only(model, tmp_path):
    content = {
        **model.export_config(),
        "encoder_config": {"target": "os.system", "params": {"command": "touch harmed"}},
    }
    state = {f"olvae.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors", metadata={"config": json.dumps(content)})
    with pytest.raises(ValueError, match=r"os.system is not a network of this package: refused"):
        find_target(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("in_run", [False, True])
def test_a_training_config_in_a_header_does_not_count(model, tmp_path, in_run):
    """Wherever the file lies: beside a run's config, that one counts."""
    file = tmp_path / "checkpoints" / "vae.safetensors"
    file.parent.mkdir()
    node = {"target": "os.system", "params": {"command": "touch harmed"}}
    content = {**model.export_config(), "model": {"params": {**model.config, "encoder_config": node}}, "data": node}
    state = {f"olvae.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, file, metadata={"config": json.dumps(content)})
    assert config_inside(file) is None
    if in_run:
        save({"model": {"params": model.config}}, tmp_path / "config.yaml")
        assert locate(file).config == {"model": {"params": model.config}}
    else:
        with pytest.raises(ValueError, match=r"no config beside the weights"):
            find_target(file)


def test_what_differs_is_noticed_and_leaves_nothing(model, tmp_path, monkeypatch):
    load = LiteVAE.from_pretrained

    def other(file) -> LiteVAE:
        loaded = load(file)
        loaded.decoder.conv_out.register_forward_hook(lambda _, __, out: out * (1 + 4e-6))
        return loaded

    def of_other_factors(file) -> LiteVAE:
        return load(file).set_for_diffusion({"force_upcast": True})

    for spoiled, message in (
        (other, "loading it back changes the result by"),
        (of_other_factors, "force_upcast differs from what was written"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module.LiteVAE, "from_pretrained", spoiled)
            with pytest.raises(ValueError, match=message):
                export_comfyui(model, tmp_path / "vae.safetensors")
        assert not any(tmp_path.iterdir())


def test_a_flipped_bit_is_seen(tmp_path):
    """Of the weights, and of the config in the header."""
    file = tmp_path / "vae.safetensors"
    export_comfyui(tiny_litevae(), file)
    whole = file.read_bytes()
    place = whole.index(b'scaling_factor\\": 1') + len(b'scaling_factor\\": 1') - 1
    for where in (len(whole) - 5, place):
        file.write_bytes(whole[:where] + bytes([whole[where] ^ 2]) + whole[where + 1 :])
        with pytest.raises(ValueError, match=r"vae.safetensors: damaged: its SHA-256 is not the one in its header"):
            LiteVAE.from_pretrained(file)
