import pytest
from diffusers import UNet2DModel
from PIL import Image

from tests.examples.loading import load_example
from tests.export.latents import tiny_vae


@pytest.fixture
def example():
    return load_example("train_diffusion")


def test_train_diffusion_lowers_its_loss_and_makes_images(example, tmp_path, capsys):
    tiny_vae().save_pretrained(tmp_path / "vae")
    arguments = [
        str(tmp_path / "vae"),
        "--out",
        str(tmp_path / "out"),
        "--size=32",
        "--crops=20",
        "--steps=25",
    ]
    losses = example.main(arguments)
    assert len(losses) == 25
    assert sum(losses[-5:]) < sum(losses[:5])
    out = capsys.readouterr().out
    assert "20 latents of (4, 4, 4), mean 0.00, standard deviation 1.00" in out.replace(
        "-0.00", "0.00"
    )
    with Image.open(tmp_path / "out" / "samples.png") as samples:
        assert samples.width > 8 * 32
    with pytest.raises(ValueError, match="--size 24: choose a multiple of 16"):
        example.main([str(tmp_path / "vae"), "--size=24"])
    assert (
        UNet2DModel.from_pretrained(
            tmp_path / "out" / "unet", low_cpu_mem_usage=False
        ).config.in_channels
        == 4
    )
