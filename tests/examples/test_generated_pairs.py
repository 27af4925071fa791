"""Latents that were noised and denoised, in pairs with their images."""

import pytest
import torch

from olvae.cli.main import main as olvae
from olvae.data.shards.latent_source import PairSource
from tests.examples.loading import load_example
from tests.export.latents import tiny_vae


@pytest.fixture
def example():
    return load_example("generated_pairs")


def test_noise_is_followed_back_to_the_latent_by_an_exact_velocity(example):
    """Of one latent alone the velocity is known: the line leads to it, from any strength."""
    latent = torch.randn(3, 4, 4)

    def velocity(x, t):
        return (x - latent) / t[:, None, None, None]

    z = latent.expand(6, 3, 4, 4)
    made = example.generate(velocity, z, 0.8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made, z, rtol=0, atol=1e-5)

    # A velocity of 0 leaves the noise, as strong as was drawn for each.
    noisy = example.generate(
        lambda x, t: torch.zeros_like(x), z, 0.5, torch.Generator().manual_seed(0)
    )
    t = 0.5 * torch.rand(6, generator=torch.Generator().manual_seed(0))
    kept = (1 - t)[:, None, None, None] * z
    assert ((noisy - kept).flatten(1).std(1) / t).tolist() == pytest.approx([1.0] * 6, rel=0.4)


def test_generated_pairs_have_the_images_and_other_latents(example, tmp_path, image_folder):
    tiny_vae().save_pretrained(tmp_path / "vae")
    given = ["encode", str(tmp_path / "vae"), "--data", str(image_folder), "--size", "32"]
    given += ["--images", "--flip", "--shard-size", "3", "--out", str(tmp_path / "pairs")]
    with pytest.raises(SystemExit) as leaving:
        olvae(given)
    assert leaving.value.code == 0
    small = ["--steps=2", "--batch-size=4", "--width=32", "--depth=1"]
    for out in ("a", "b"):
        example.main([str(tmp_path / "pairs"), "--out", str(tmp_path / out), *small])

    loaders = (
        PairSource(folder, batch_size=2, val_fraction=0.5).val_loader()
        for folder in (tmp_path / "pairs", tmp_path / "a" / "pairs", tmp_path / "b" / "pairs")
    )
    for plain, made, again in zip(*loaders, strict=True):
        assert torch.equal(made["image"], plain["image"])
        assert made["key"] == plain["key"]
        assert torch.equal(made["moments"], again["moments"])
        means, logvars = made["moments"].chunk(2, dim=1)
        assert not torch.isclose(means, plain["moments"].chunk(2, dim=1)[0]).any(dim=0).all()
        assert (logvars == -30).all()


def test_generated_pairs_refuse_other_folders(example, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="run `olvae encode`"):
        example.main([str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        example.main([str(tmp_path), "--out", str(tmp_path / "out"), "--strength=0"])
    assert "--strength 0.0: " in capsys.readouterr().err
