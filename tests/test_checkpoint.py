import pickle

import pytest
import torch
from safetensors.torch import save_file

from olvae.checkpoint import load_weights, read_checkpoint, read_weights
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import tiny_config


def model() -> LiteAutoencoderKL:
    return LiteAutoencoderKL(**tiny_config()["model"]["params"])


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.fixture
def weights():
    return {name: torch.randn_like(t) for name, t in model().state_dict().items()}


def test_every_format_loads(weights, tmp_path):
    extra = {"loss.discriminator.weight": torch.zeros(3), "model_ema.decay": torch.zeros(())}
    torch.save({"state_dict": weights | extra, "epoch": 3}, tmp_path / "lightning.ckpt")
    torch.save(weights, tmp_path / "bare.pt")
    save_file(weights, tmp_path / "model.safetensors")
    for file in ("lightning.ckpt", "bare.pt", "model.safetensors"):
        m = model()
        load_weights(m, read_weights(tmp_path / file), file)
        assert all(torch.equal(t, weights[name]) for name, t in m.state_dict().items())


def test_another_model_is_refused_whole(weights):
    m = model()
    before = {name: t.clone() for name, t in m.state_dict().items()}
    first, second, *_ = weights
    weights["encoder.extra"] = torch.zeros(1)
    weights[second] = torch.zeros(2, 2)
    del weights[first]
    with pytest.raises(
        ValueError, match=r"1 missing .*; 1 unexpected \(encoder\.extra\); 1 of another shape .*2x2 for"
    ):
        load_weights(m, weights, "file.ckpt")
    assert all(torch.equal(before[name], t) for name, t in m.state_dict().items())


def test_code_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "x": Harmful()}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Harmful()))
    for file in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            read_checkpoint(tmp_path / file)
    assert "code ran" not in capsys.readouterr().out


def test_broken_files(weights, tmp_path):
    torch.save(weights, tmp_path / "whole.ckpt")
    save_file(weights, tmp_path / "whole.safetensors")
    for name, message in (("ckpt", "not a readable checkpoint"), ("safetensors", "not a readable safetensors")):
        cut = tmp_path / f"cut.{name}"
        cut.write_bytes((tmp_path / f"whole.{name}").read_bytes()[:-1000])
        with pytest.raises(ValueError, match=message):
            read_weights(cut)
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            read_weights(tmp_path / f"missing.{name}")


def test_no_autoencoder_in_it(tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no autoencoder in it"):
        read_weights(tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="but a list"):
        read_weights(tmp_path / "list.ckpt")
