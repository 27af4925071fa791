"""The caches of kohya's sd-scripts, read with NumPy alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.image import from_uint8, image_to_tensor
from olvae.export.encode import EncodeJob
from olvae.export.inputs import find_inputs
from olvae.export.writers import EncodeOptions
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Deterministic
from tests.data.images import picture, write_shards
from tests.export.latents import encode, pictures, tiny_vae


class Means(Autoencoder):
    """The means of 8x8 pixels, repeated to a number of channels."""

    in_channels, downscale = 3, 8
    scaling_factor, shift_factor = 0.3611, 0.1159

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.latent_channels = channels
        self.one = torch.nn.Parameter(torch.ones(()))

    def encode(self, x: Tensor) -> Deterministic:
        means = torch.nn.functional.avg_pool2d(x, 8).repeat(1, 6, 1, 1)
        return Deterministic(means[:, : self.latent_channels] * self.one)

    def decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError


def to_kohya(source: Path, folder: Path, model: Autoencoder | None = None, kind: str = "sdxl", **options):
    options = {"format": f"kohya-{kind}", "moments": False, "dtype": "float32", **options}
    return encode(source, folder, model or Means(16 if kind in ("sd3", "flux") else 4), **options)


def caches(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_one_file_beside_each_image(tmp_path, image_folder, kind):
    """Named by the picture's own size, arrays by the latent's; only Flux's are scaled."""
    stats = to_kohya(image_folder, image_folder, kind=kind, flip=True)
    assert (stats["count"], stats["format"]) == (12, f"kohya-{kind}")
    images = sorted(image_folder.rglob("*.png"))
    assert len(caches(image_folder)) == len(images) == 12
    model = Means(16 if kind in ("sd3", "flux") else 4)
    x = pictures(image_folder)
    for image, one, mirrored in zip(images, model.encode(x).mean, model.encode(x.flip(-1)).mean, strict=True):
        with np.load(image.with_name(f"{image.stem}_0048x0040_{kind}.npz")) as cache:
            arrays = dict(cache)
        assert set(arrays) == {f"{n}_2x2" for n in ("latents", "latents_flipped", "original_size", "crop_ltrb")}
        for name, z in (("latents_2x2", one), ("latents_flipped_2x2", mirrored)):
            expected = (z - 0.1159) * 0.3611 if kind == "flux" else z
            assert (arrays[name].dtype, arrays[name].shape) == (np.float32, (model.latent_channels, 2, 2))
            assert np.allclose(arrays[name], expected.detach().numpy(), atol=1e-6)
        assert arrays["original_size_2x2"].tolist() == [48, 40]
        assert arrays["crop_ltrb_2x2"].tolist() == pytest.approx([0, 1, 16, 1 + 16 * 40 / 48])  # 48x40 in 16x16


def test_resumed_and_shared(tmp_path, image_folder):
    whole = tmp_path / "whole"
    to_kohya(image_folder, whole)
    inputs = find_inputs(str(image_folder), 3, 5)
    options = EncodeOptions(16, moments=False, dtype="float32", format="kohya-sdxl")
    folder = tmp_path / "shared"
    jobs = [EncodeJob(Means(4), inputs, options, folder, {}) for _ in range(2)]
    for rank, job in enumerate(jobs):
        job.run(rank, 2, batch_size=3)
    assert caches(folder) == caches(whole)
    lost, *others = sorted(folder.rglob("*.npz"))
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in others}
    (folder / ".encode/.partial-killed-a.npz").touch()
    jobs[0].run()
    stats = jobs[0].finish()
    assert caches(folder) == caches(whole)
    assert sum(path.stat().st_mtime_ns != time for path, time in times.items()) == 4  # of the lost one's shard
    assert stats["scaling_factor"] > 0
    assert not list((folder / ".encode").glob(".partial*"))
    with pytest.raises(ConfigError, match=r"begun with dtype|begun with flip False"):
        to_kohya(image_folder, folder, flip=True)


def test_images_of_their_own_sizes(tmp_path):
    """The one that would be padded is left out, and listed."""
    for i, size in enumerate([(24, 16), (13, 16), (16, 24)]):
        picture(i, size).save(tmp_path / f"{i}.png")
    stats = to_kohya(tmp_path, tmp_path / "out", size=0, batch_size=4)
    assert list(caches(tmp_path / "out")) == ["0_0024x0016_sdxl.npz", "2_0016x0024_sdxl.npz"]
    assert stats["unreadable"]["images"] == [
        {"name": "1.png", "reason": "13x16 pixels would be padded to multiples of 8"}
    ]
    x = from_uint8(image_to_tensor(picture(2, (16, 24))))[None]
    with np.load(tmp_path / "out/2_0016x0024_sdxl.npz") as cache:
        assert np.allclose(cache["latents_3x2"], Means(4).encode(x).mean[0].detach().numpy(), atol=1e-6)
        assert cache["crop_ltrb_3x2"].tolist() == [0, 0, 16, 24]


def test_what_it_refuses(tmp_path, image_folder):
    out = tmp_path / "out"
    write_shards(tmp_path / "shards", (2,))
    twins = tmp_path / "twins"
    shutil.copytree(image_folder, twins)
    shutil.copy(twins / "class0/0.png", twins / "class0/0.webp")
    for source, options, text in [
        (image_folder, {"kind": "flux", "model": tiny_vae()}, "takes 16 channels at 1/8 .* has 4 at 1/8"),
        (image_folder, {"moments": True}, "--moments: kohya-sdxl holds one latent per image"),
        (image_folder, {"images": True}, "--images: kohya-sdxl has no place"),
        (image_folder, {"classes": True}, "--classes: kohya-sdxl has no place for labels"),
        (image_folder, {"dtype": "float16"}, "--dtype float16: kohya-sdxl is float32"),
        (image_folder, {"kind": "sd2"}, "--format kohya-sd2: choose from shards, lightningdit, kohya-sd,"),
        (tmp_path / "shards", {}, "lie beside images: give a folder, not shards"),
        (twins, {}, r"class0/0\.(png|webp): another image has this name"),
    ]:
        with pytest.raises(ConfigError, match=text):
            to_kohya(source, out, **options)
        assert not out.exists()
    to_kohya(image_folder, image_folder)
    shutil.rmtree(image_folder / ".encode")
    with pytest.raises(ConfigError, match="has other files already"):
        to_kohya(image_folder, image_folder)


def test_pictures_that_are_turned_are_left_out(tmp_path):
    """The trainer reads the file's pixels, and names its cache by their size."""
    (tmp_path / "in").mkdir()
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    gradient = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
    gradient.save(tmp_path / "in" / "turned.jpg", exif=turned)
    gradient.save(tmp_path / "in" / "upright.jpg")
    stats = to_kohya(tmp_path / "in", tmp_path / "out", size=0)
    assert stats["count"] == 1
    assert list(caches(tmp_path / "out")) == ["upright_0048x0040_sdxl.npz"]
