import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from tests.examples.loading import load_example
from tests.export.latents import encode, tiny_vae


@pytest.fixture
def example(monkeypatch):
    module = load_example("train_diffusion")
    monkeypatch.setattr(module, "EULER_STEPS", 4)
    return module


def test_train_diffusion_lowers_its_loss_and_makes_images(example, tmp_path, capsys):
    tiny_vae().save_pretrained(tmp_path / "vae")
    arguments = [
        str(tmp_path / "vae"),
        "--out",
        str(tmp_path / "out"),
        "--size=32",
        "--crops=20",
        "--steps=15",
    ]
    losses = example.main(arguments)
    assert len(losses) == 15
    assert sum(losses[-5:]) < sum(losses[:5])
    out = capsys.readouterr().out
    assert "20 latents of (4, 4, 4), mean 0.00, standard deviation 1.00" in out.replace(
        "-0.00", "0.00"
    )
    with Image.open(tmp_path / "out" / "samples.png") as samples:
        assert samples.width > 8 * 32
    with pytest.raises(ValueError, match=r"--size 24: .*16"):
        example.main([str(tmp_path / "vae"), "--size=24"])
    assert (
        UNet2DModel.from_pretrained(
            tmp_path / "out" / "unet", low_cpu_mem_usage=False
        ).config.in_channels
        == 4
    )


@pytest.fixture
def own(tmp_path):
    """Photographs of one's own, 36 of them, a model, and its latents, mirrored too."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(36):
        colour = rng.integers(0, 256, (1, 1, 3), dtype=np.uint8)
        Image.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy()).save(
            tmp_path / "photos" / f"{number}.png"
        )
    tiny_vae().save_pretrained(tmp_path / "vae")
    encode(tmp_path / "photos", tmp_path / "latents", size=32, flip=True)
    return [str(tmp_path / "vae"), "--latents", str(tmp_path / "latents")]


@pytest.mark.parametrize("per_channel", [pytest.param(False, marks=pytest.mark.slow), True])
def test_own_latents_train_a_model_whose_samples_are_decoded(
    example, own, per_channel, tmp_path, capsys, monkeypatch
):
    asked = ["--per-channel"] if per_channel else []
    scaled, decoded = [], []
    train, labelled_grid = example.train, example.labelled_grid

    def watch(unet, batches, steps):
        drawn = [z for z, _ in zip(batches, range(steps), strict=False)]
        scaled.extend(drawn)
        return train(unet, iter(drawn), steps)

    monkeypatch.setattr(example, "train", watch)
    monkeypatch.setattr(
        example, "labelled_grid", lambda rows: decoded.append(rows) or labelled_grid(rows)
    )
    losses = example.main([*own, *asked, "--steps=12", "--out", str(tmp_path / "out")])
    assert sum(losses[-5:]) < sum(losses[:5])
    assert "36 latents of (4, 4, 4), by tiny" in capsys.readouterr().out
    assert (tmp_path / "out" / "samples.png").is_file()

    # mean 0 and deviation 1 of what it trained on: of all channels, or of each
    z = torch.cat(scaled)
    over = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    assert z.mean(over).abs().max() < 0.1
    assert (z.std(over) - 1).abs().max() < 0.1
    spread = z.std((0, 2, 3))
    assert per_channel or (spread.max() / spread.min() > 1.1)

    # the first row is what the model's decoder makes of the first latents, with no scale left
    vae = tiny_vae()
    names = sorted(str(number) for number in range(36))[:8]
    pixels = [np.asarray(Image.open(tmp_path / "photos" / f"{name}.png")) for name in names]
    images = torch.from_numpy(np.stack(pixels)).movedim(3, 1) / 127.5 - 1
    with torch.no_grad():
        expected = example.to_uint8(vae.decode(vae.encode(images).mode()))
    (rows,) = decoded
    shown = rows["latents, decoded"]
    assert (shown.int() - expected.int()).abs().max() <= 1  # stored in float16
    assert rows["made from noise"].shape == shown.shape == (8, 3, 32, 32)


def test_latents_that_can_not_be_used_are_refused(example, own, tmp_path):
    vae, _, latents = own
    with pytest.raises(FileNotFoundError, match=r"nowhere: .*stats\.json"):
        example.main([vae, "--latents", str(tmp_path / "nowhere")])

    tiny_vae(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other weights .*other: "):
        example.main([str(tmp_path / "other"), "--latents", latents])

    few = tmp_path / "few"
    few.mkdir()
    for number in range(3):
        (few / f"{number}.png").write_bytes((tmp_path / "photos" / f"{number}.png").read_bytes())
    encode(few, tmp_path / "three", size=32)
    with pytest.raises(ValueError, match=r"three: 3 latents.* 32"):
        example.main([vae, "--latents", str(tmp_path / "three")])

    encode(tmp_path / "photos", tmp_path / "odd", size=24)
    with pytest.raises(ValueError, match=r"odd: .*3x3: .*16"):
        example.main([vae, "--latents", str(tmp_path / "odd")])

    stats = tmp_path / "three" / "stats.json"
    stats.write_text(json.dumps({**json.loads(stats.read_text()), "latent_shape": None}))
    with pytest.raises(ValueError, match=r"three: .*several sizes"):
        example.main([vae, "--latents", str(tmp_path / "three")])


@pytest.mark.parametrize("options", [["--latents=x", "--crops=5"], ["--per-channel"]])
def test_options_of_the_other_data_are_wrong_usage(example, options):
    with pytest.raises(SystemExit) as leaving:
        example.main(["vae", *options])
    assert leaving.value.code == 2
