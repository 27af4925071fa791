"""Caches for other trainers, made of our shards, and read with NumPy,
safetensors and torch alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file
from torch import Tensor

from olvae.data.image import image_to_tensor
from olvae.data.pixels.size_and_range import from_uint8
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Deterministic, keyed_generator
from tests.data.images import encoded, picture, write_tar
from tests.examples.loading import load_example
from tests.export.latents import encode, pictures, tiny_vae


def kohya(*arguments: object) -> int:
    return load_example("kohya_cache").main([str(argument) for argument in arguments])


def lightningdit(*arguments: object) -> int:
    return load_example("lightningdit_cache").main([str(argument) for argument in arguments])


class Means(Autoencoder):
    """The means of 8x8 pixels, repeated to a number of channels."""

    in_channels, downscale = 3, 8

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.latent_channels = channels
        self.one = torch.nn.Parameter(torch.ones(()))

    def encode(self, x: Tensor) -> Deterministic:
        means = torch.nn.functional.avg_pool2d(x, 8).repeat(1, 6, 1, 1)
        return Deterministic(means[:, : self.latent_channels] * self.one)

    def decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError


def caches(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npz"))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_kohya_one_file_beside_each_image(tmp_path, image_folder, kind):
    """Named by the picture's own size, arrays by the latent's; only Flux's are scaled."""
    model = Means(16 if kind in ("sd3", "flux") else 4)
    encode(image_folder, tmp_path / "latents", model, flip=True, dtype="float32")
    assert kohya(tmp_path / "latents", image_folder, "--model", kind) == 12
    images = sorted(image_folder.rglob("*.png"))
    assert len(caches(image_folder)) == len(images) == 12
    x = pictures(image_folder)
    for image, one, mirrored in zip(
        images, model.encode(x).mean, model.encode(x.flip(-1)).mean, strict=True
    ):
        with np.load(image.with_name(f"{image.stem}_0048x0040_{kind}.npz")) as cache:
            arrays = dict(cache)
        assert set(arrays) == {
            f"{n}_2x2" for n in ("latents", "latents_flipped", "original_size", "crop_ltrb")
        }
        for name, z in (("latents_2x2", one), ("latents_flipped_2x2", mirrored)):
            expected = (z - 0.1159) * 0.3611 if kind == "flux" else z
            assert (arrays[name].dtype, arrays[name].shape) == (
                np.float32,
                (model.latent_channels, 2, 2),
            )
            assert np.allclose(arrays[name], expected.detach().numpy(), atol=1e-6)
        assert arrays["original_size_2x2"].tolist() == [48, 40]
        # 48x40 in 16x16
        assert arrays["crop_ltrb_2x2"].tolist() == pytest.approx([0, 1, 16, 1 + 16 * 40 / 48])


def test_kohya_leaves_out_what_its_trainer_would_misread(tmp_path, capsys):
    """Images that were padded, that are turned when shown, or that are not there.

    The others in their own sizes.
    """
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, size in enumerate([(24, 16), (13, 16), (16, 24), (8, 8)]):
        picture(i, size).save(photos / f"{i}.png")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.linear_gradient("L").resize((48, 40)).convert("RGB").save(
        photos / "turned.jpg", exif=turned
    )
    encode(photos, tmp_path / "latents", Means(4), size=0, dtype="float32")
    (photos / "3.png").unlink()
    assert kohya(tmp_path / "latents", photos, "--model", "sdxl") == 2
    assert caches(photos) == ["0_0024x0016_sdxl.npz", "2_0016x0024_sdxl.npz"]
    err = capsys.readouterr().err
    assert "skipped 1.png: 13x16 " in err
    assert "skipped 3.png: " in err
    assert "skipped turned.jpg: " in err
    x = from_uint8(image_to_tensor(picture(2, (16, 24))))[None]
    with np.load(photos / "2_0016x0024_sdxl.npz") as cache:
        assert np.allclose(
            cache["latents_3x2"], Means(4).encode(x).mean[0].detach().numpy(), atol=1e-6
        )
        assert cache["crop_ltrb_3x2"].tolist() == [0, 0, 16, 24]


def test_kohya_refuses_other_channels_and_images_of_one_name(tmp_path, image_folder):
    encode(image_folder, tmp_path / "latents", tiny_vae())
    with pytest.raises(ValueError, match=r"flux .*16 .*1/8 .* 4 at 1/8"):
        kohya(tmp_path / "latents", image_folder, "--model", "flux")
    assert not caches(image_folder)
    shutil.copy(image_folder / "class0/0.png", image_folder / "class0/0.webp")
    encode(image_folder, tmp_path / "twins", tiny_vae())
    with pytest.raises(ValueError, match=r"class0/0\.(png|webp): another"):
        kohya(tmp_path / "twins", image_folder, "--model", "sd")


@pytest.mark.parametrize("moments", [False, True])
def test_lightningdit_latents_labels_and_statistics(tmp_path, image_folder, moments):
    model, out = tiny_vae(), tmp_path / "out"
    stats = encode(
        image_folder,
        tmp_path / "latents",
        model,
        classes=True,
        flip=True,
        moments=moments,
        dtype="float32",
    )
    assert lightningdit(tmp_path / "latents", "--out", out) == 12
    assert {path.name for path in out.iterdir()} == {
        *(f"00000{i}.safetensors" for i in range(3)),
        "latents_stats.pt",
    }
    parts = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    latents, mirrored, labels = (
        torch.cat([part[n] for part in parts]) for n in ("latents", "latents_flip", "labels")
    )
    assert (labels.dtype, labels.tolist()) == (torch.int64, [0] * 4 + [1] * 4 + [2] * 4)
    x = pictures(image_folder)
    keys = [
        path.relative_to(image_folder).as_posix() for path in sorted(image_folder.rglob("*.png"))
    ]
    for images, ending, got in ((x, "", latents), (x.flip(-1), "\nflip", mirrored)):
        with torch.inference_mode():
            posterior = model.encode(images)
        noise = [
            torch.randn(4, 2, 2, generator=keyed_generator(f"0\n{key}{ending}")) for key in keys
        ]
        assert (got.dtype, got.shape) == (torch.float32, (12, 4, 2, 2))
        assert torch.allclose(got, posterior.mean + posterior.std * torch.stack(noise), atol=1e-4)
    known = torch.load(out / "latents_stats.pt")
    for name in ("mean", "std"):
        assert (known[name].dtype, known[name].shape) == (torch.float32, (1, 4, 1, 1))
        assert np.allclose(known[name].flatten(), stats[f"latents_{name}"])


def test_lightningdit_labels_of_shards(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    write_tar(
        tmp_path / "shards/000.tar", [("a.jpg", encoded(0)), ("a.cls", b"7"), ("b.jpg", encoded(1))]
    )
    encode(tmp_path / "shards", tmp_path / "latents", flip=True)
    assert lightningdit(tmp_path / "latents", "--out", tmp_path / "out") == 1
    assert "skipped 000000/b: no .cls" in capsys.readouterr().err
    assert load_file(tmp_path / "out/000000.safetensors")["labels"].tolist() == [7]


def test_lightningdit_refuses_latents_without_flips_labels_or_one_size(tmp_path, image_folder):
    for i, (options, text) in enumerate(
        [
            ({"flip": False}, "encode with --flip"),
            ({"size": 0}, "latents of several sizes"),
            ({"classes": False}, "no image has a label"),
        ]
    ):
        if options == {"size": 0}:
            picture(0, (8, 16)).save(image_folder / "class0" / "other.png")
        encode(image_folder, tmp_path / str(i), **{"classes": True, "flip": True, **options})
        with pytest.raises(ValueError, match=text):
            lightningdit(tmp_path / str(i), "--out", tmp_path / "out")
    (tmp_path / "out" / "000007.safetensors").touch()
    with pytest.raises(ValueError, match=r"out: has 000007\.safetensors"):
        lightningdit(tmp_path / "2", "--out", tmp_path / "out")
