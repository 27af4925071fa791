"""An autoencoder that is saved, and loaded again."""

import copy
import json
import re
import warnings

import pytest
import torch

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.config import ConfigError, save
from olvae.models.spec import WEIGHTS_NAME
from olvae.models.weight_files import ONE_KIND
from olvae.modules.base import Encoder
from tests.conftest import tiny, tiny_config
from tests.models.files import PER_CHANNEL, same_weights, training_config


@pytest.mark.parametrize(
    ("dtype", "folded"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_save_pretrained_and_from_pretrained_give_the_same_bits(dtype, folded, tmp_path):
    model = tiny(use_quant=True).to(dtype)
    model = model.fold() if folded else model
    model.scaling_factor, model.shift_factor = 0.7, -0.25
    model.save_pretrained(tmp_path)
    again = LiteVAE.from_pretrained(tmp_path, dtype=dtype)
    assert same_weights(again, model)
    assert (again.folded, again.scaling_factor, again.shift_factor) == (folded, 0.7, -0.25)
    x = torch.rand(1, 3, 16, 16, dtype=dtype)
    assert torch.equal(again(x)[0], model(x)[0])
    assert {t.dtype for t in LiteVAE.from_pretrained(tmp_path).parameters()} == {torch.float32}
    compiled = copy.deepcopy(again)
    compiled.encoder = torch.compile(compiled.encoder)  # which renames its tensors
    compiled.save_pretrained(tmp_path / "compiled")
    assert (
        LiteVAE.from_pretrained(tmp_path / "compiled").state_dict().keys()
        == again.state_dict().keys()
    )
    again.save_pretrained(tmp_path / "twice")
    for file in (WEIGHTS_NAME, "config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_an_export_has_one_kind_of_weights(tmp_path):
    """Which is told where the line stands that asks for the others, and to nobody else."""
    tiny().save_pretrained(tmp_path / "export")
    torch.save(tiny().state_dict(), tmp_path / "tiny.ckpt")
    save(training_config(tiny()), tmp_path / "tiny.yaml")
    with pytest.warns(UserWarning, match=re.escape(ONE_KIND)) as warned:
        LiteVAE.from_pretrained(tmp_path / "export", raw=True)
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LiteVAE.from_pretrained(tmp_path / "export")
        LiteVAE.from_pretrained(tmp_path / "tiny.ckpt")


class OwnEncoder(Encoder):
    def __init__(self, latent_dim: int = 8) -> None:
        super().__init__(latent_dim, in_channels=3, downscale=8, image_size=64)
        self.conv = torch.nn.Conv2d(3, latent_dim, 8, stride=8)


def test_own_networks_are_not_saved_and_load_by_a_named_config(tmp_path):
    decoder = tiny().decoder
    model = LiteVAE(OwnEncoder(), decoder)
    with pytest.raises(ValueError, match=r"OwnEncoder .*own"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    torch.save(model.state_dict(), tmp_path / "model.ckpt")
    save(training_config(model), tmp_path / "model.yaml")
    # A file that came along.
    with pytest.raises(ConfigError, match=r"OwnEncoder .*package"):
        LiteVAE.from_pretrained(tmp_path / "model.ckpt")
    # A file one names.
    own = LiteVAE.from_pretrained(tmp_path / "model.ckpt", config=tmp_path / "model.yaml")
    assert same_weights(own, model)


def test_save_pretrained_that_fails_half_way_keeps_the_config(tmp_path, monkeypatch):
    model = tiny()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("olvae.models.weight_files.write_tensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_config_of_an_autoencoder_is_a_copy(tmp_path):
    widths = [1, 2]
    params = tiny_config()["model"]["params"]
    params["encoder_config"]["params"]["aggregate_mult"] = widths
    model = LiteVAE.from_config(
        **{name: params[name] for name in ("encoder_config", "decoder_config", "embed_dim")}
    )
    config = model.config
    config["encoder_config"]["params"]["wavelet"], widths[1] = "db2", 3
    model.save_pretrained(tmp_path)
    assert same_weights(LiteVAE.from_pretrained(tmp_path), model)
    assert LiteVAE.from_pretrained(tmp_path).config == model.config != config


def test_save_pretrained_twice_keeps_the_card_and_a_refusal_keeps_all(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    assert "litevae" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before["README.md"] == b"mine"
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


FACTORS = {"scaling_factor": 0.5, "shift_factor": 0.25, "force_upcast": True, **PER_CHANNEL}


def test_factors_for_diffusion_through_every_format(tmp_path):
    """config.json, diffusers' class and its files, a training config;
    and numbers from a config that are integers.
    """
    model = tiny().set_for_diffusion(FACTORS)
    model.save_pretrained(tmp_path / "ours")
    content = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: content[name] for name in FACTORS} == FACTORS
    theirs = AutoencoderLiteVAE.from_pretrained(tmp_path / "ours")
    assert {name: theirs.config[name] for name in FACTORS} == FACTORS
    theirs.save_pretrained(tmp_path / "theirs")
    again = LiteVAE.from_pretrained(tmp_path / "theirs")
    assert again.for_diffusion == FACTORS
    assert again.fold().for_diffusion == FACTORS
    assert AutoencoderLiteVAE.from_autoencoder(again).autoencoder.for_diffusion == FACTORS

    config = training_config(model)
    config["model"]["params"] |= {
        "scaling_factor": 1,
        "latents_mean": [0, 1, 2, 3],
        "latents_std": [1, 2, 3, 4],
    }
    save(config, tmp_path / "tiny.yaml")
    torch.save(model.state_dict(), tmp_path / "tiny.ckpt")
    found = LiteVAE.from_pretrained(tmp_path / "tiny.ckpt").for_diffusion
    assert found["latents_std"] == [1.0, 2.0, 3.0, 4.0]
    assert all(
        isinstance(value, float) for value in (found["scaling_factor"], *found["latents_mean"])
    )


def test_factors_for_diffusion_are_neutral_by_default(tmp_path):
    defaults = dict.fromkeys(FACTORS) | {
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "force_upcast": False,
    }
    model = tiny()
    assert model.for_diffusion == defaults
    z = torch.randn(2, 4, 2, 2)
    assert torch.equal(model.from_diffusion(z), z)
    config = training_config(model)
    config["model"]["params"] |= dict.fromkeys(FACTORS)  # as a training config may say
    save(config, tmp_path / "tiny.yaml")
    torch.save(model.state_dict(), tmp_path / "tiny.ckpt")
    found = LiteVAE.from_pretrained(tmp_path / "tiny.ckpt")
    assert found.for_diffusion == defaults
    assert found.set_for_diffusion(PER_CHANNEL).for_diffusion == {**defaults, **PER_CHANNEL}
    assert tiny().for_diffusion == defaults  # one's own, not the class's
