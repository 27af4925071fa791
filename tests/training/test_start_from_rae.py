"""diffusers' AutoencoderRAE is trained and written back; a linear map stands for its network."""

import json

import diffusers
import pytest
import torch

from olvae.config import ConfigError
from olvae.export.exporting import ExportSettings, export_target
from olvae.models.loading.targets import find_target
from tests.conftest import parts
from tests.models.loading.classes import make, see_patches
from tests.training.origins import checkpoint, without_networks


@pytest.fixture
def rae(tmp_path, monkeypatch) -> str:
    """The TARGET of a folder; statistics of each position, as RAE's, and noise in training."""
    see_patches(monkeypatch)
    torch.manual_seed(4)
    statistics = {"latents_mean": torch.randn(32, 4, 4), "latents_std": torch.rand(32, 4, 4) + 0.5}
    model = make("AutoencoderRAE", **statistics, scaling_factor=0.7, noise_tau=0.8)
    model.save_pretrained(tmp_path / "source")
    return f"diffusers:{tmp_path / 'source'}"


def image() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.rand(2, 3, 16, 16) * 2 - 1


@torch.no_grad()
def by_diffusers(model) -> tuple[torch.Tensor, torch.Tensor]:
    latent = model.encode(image() / 2 + 0.5).latent
    return latent, 2 * model.decode(latent).sample - 1


def test_an_rae_becomes_ours_and_goes_back_with_equal_results(rae, tmp_path):
    """Both directions, to 1e-5: latents and images; in training mode without its noise."""
    theirs = diffusers.AutoencoderRAE.from_pretrained(rae.removeprefix("diffusers:")).eval()
    latent, decoded = by_diffusers(theirs)
    ours = find_target(rae).load().as_litevae(rae).train()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(image()).mean, latent, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(latent), decoded, rtol=0, atol=1e-5)
    assert (ours.side, ours.image_size, ours.downscale, ours.latent_channels) == (16, 16, 4, 32)

    export_target(find_target(rae), tmp_path / "vae", ExportSettings(format="diffusers"))
    back = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "vae").eval()
    for found, wanted in zip(by_diffusers(back), (latent, decoded), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "source", tmp_path / "vae")
    )
    for content in (before, after):
        content.pop("_diffusers_version")
        content.pop("_name_or_path", None)
    assert after == before


def test_its_decoder_is_trained_and_exported_as_an_rae(rae, train_with, tmp_path, image_folder):
    noise = parts(random_noise={"how": "add", "strength": 0.8})
    settings = {"use_ema": True, "parts": noise}
    run = train_with(
        "lightning.trainer.max_steps=2",
        config=without_networks(image_folder, **settings),
        start_from=rae,
    )
    export_target(find_target(run.path), tmp_path / "vae", ExportSettings())
    theirs, back = (
        diffusers.AutoencoderRAE.from_pretrained(folder).eval()
        for folder in (tmp_path / "source", tmp_path / "vae")
    )
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in moved} == {"decoder"}
    model = find_target(run.path).load()
    latent, decoded = by_diffusers(back)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(image()).mean, latent, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.decode(latent), decoded, rtol=0, atol=1e-5)


def test_an_adaptive_adversary_finds_the_last_layer(rae, train_with, image_folder):
    from tests.models.steps import against

    config = without_networks(image_folder, adversary_config=against(adaptive_weight=True))
    run = train_with("lightning.trainer.max_steps=1", config=config, start_from=rae)
    assert checkpoint(run)["global_step"] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.params.size=32"],
            "size: 32, but the encoder takes images of 16 pixels a side only",
        ),
        (
            ["model.params.freeze_encoder=false"],
            "freeze_encoder: RAEEncoder has nothing to train: set it to true",
        ),
    ],
)
def test_what_an_rae_can_not_do_is_refused(rae, train_with, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train_with(*overrides, start_from=rae)
