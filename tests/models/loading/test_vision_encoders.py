"""Vision encoders as TARGETs: their weights, what is fresh beside them, and files of the whole."""

from types import SimpleNamespace

import pytest
import torch

from olvae.config import ConfigError
from olvae.export.exporting import ExportSettings, export_target
from olvae.models.loading import vision_encoders
from olvae.models.loading.loader import LoadOptions
from olvae.models.loading.targets import find_target
from olvae.models.loading.vision_encoders import VisionLoader, vision_spec
from olvae.modules.frozen import VisionEncoder

pytest.importorskip("timm")


def image(size: int = 32) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.rand(2, 3, size, size) * 2 - 1


def test_target_has_the_files_weights_and_an_untrained_decoder(vit):
    found = find_target(f"timm:test_vit={vit}")
    model = found.load()
    features = VisionEncoder("test_vit", torch.load(vit))
    network = features.network[1]
    torch.nn.init.ones_(network.norm.weight)
    torch.nn.init.zeros_(network.norm.bias)
    with torch.no_grad():
        posterior = model.encode(image())
        torch.testing.assert_close(posterior.mean, features(image(), (2, 2)), rtol=1e-4, atol=1e-4)
        assert model.decode(posterior.mode()).shape == (2, 3, 32, 32)
    assert (model.latent_channels, model.downscale, model.deterministic) == (64, 16, True)
    assert not model.training
    assert found.untrained().decoder.node == model.decoder.node


@torch.no_grad()
def test_other_weights_are_another_target(vit, tmp_path):
    weights = {name: t + 0.1 * torch.randn_like(t) for name, t in torch.load(vit).items()}
    torch.save(weights, tmp_path / "other.pt")
    one, other = (
        find_target(f"timm:test_vit={file}").load() for file in (vit, tmp_path / "other.pt")
    )
    assert not torch.allclose(one.encode(image()).mean, other.encode(image()).mean, atol=1e-2)


def test_reduced_target_is_the_same_each_time_and_draws_nothing(vit):
    text = f"timm:test_vit={vit}::8"
    before = torch.get_rng_state()
    one = find_target(text).load()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    other = find_target(text).load()
    assert (one.latent_channels, one.deterministic) == (8, False)
    with torch.no_grad():
        assert torch.equal(one.encode(image()).mean, other.encode(image()).mean)
        assert one.encode(image()).logvar.mean() < -2


@pytest.mark.parametrize("channels", ["", "::8"])
def test_export_holds_the_whole_and_loads_without_the_file(vit, tmp_path, channels):
    """The network's weights are in it."""
    target = find_target(f"timm:test_vit={vit}{channels}")
    model = target.load()
    with torch.no_grad():
        wanted = model(image())[0]
    export_target(target, tmp_path / "export", ExportSettings())
    back = find_target(str(tmp_path / "export")).load()
    with torch.no_grad():
        torch.testing.assert_close(back(image())[0], wanted)
    assert str(vit) not in (tmp_path / "export/config.json").read_text()


def test_a_decoder_is_as_wide_and_as_deep_as_the_network_gives_features(monkeypatch):
    """With a head for every 64 channels, and one at least."""
    last = {"num_chs": 130}
    network = SimpleNamespace(feature_info=[{"num_chs": 64}, {"num_chs": 40}, last])
    monkeypatch.setattr(vision_encoders, "vision_network", lambda name, _: (name, network))
    for width, channels, heads in ((130, None, 2), (130, 8, 2), (40, 8, 1), (64, None, 1)):
        last["num_chs"] = width
        spec = vision_spec("any", channels)
        n_z = channels or width
        assert spec.encoder_config["params"] == {
            "encoder": "any",
            "attention": channels is not None,
        }
        size = {"width": width, "depth": 3, "heads": heads}
        assert spec.decoder_config["params"] == {"z_channels": n_z, **size}
        assert spec.embed_dim == n_z


def test_timm_is_asked_for_and_options_are_ignored(monkeypatch, vit):
    with pytest.warns(UserWarning, match="ignored") as warned:
        VisionLoader().find(f"timm:test_vit={vit}", LoadOptions(config="a.yaml", raw=True))
    assert [(str(one.message).partition("`")[2], one.filename) for one in warned] == [
        ("config`: ignored", __file__),
        ("raw`: ignored", __file__),
    ]

    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'timm'")

    monkeypatch.setattr(vision_encoders, "vision_network", missing)
    with pytest.raises(ConfigError, match="pip install timm"):
        vision_spec("any", None)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("timm:", ConfigError, "timm:: expected timm:NAME, timm:NAME=FILE or timm:NAME::CHANNELS"),
        ("timm:test_vit::few", ConfigError, "expected timm:NAME"),
        ("timm:vit_of_nowhere", ConfigError, "timm has no model vit_of_nowhere"),
        ("timm:test_vit3=/nowhere.pt::8", ValueError, "heads have 64 channels, which 96"),
    ],
)
def test_targets_that_are_none_say_what_they_should_be(text, error, message):
    with pytest.raises(error, match=message) as caught:
        find_target(text).load()
    assert "\n" not in str(caught.value)


def test_missing_and_other_weights_are_named(tmp_path, vit):
    with pytest.raises(FileNotFoundError, match=r"/nowhere\.pt: "):
        find_target("timm:test_vit=/nowhere.pt").load()
    with pytest.raises(ValueError, match=r"weights .*test_vit2"):
        find_target(f"timm:test_vit2={vit}").load()
