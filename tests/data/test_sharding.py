"""How images are stored: as they are, or without loss, or smaller."""

import io

import numpy as np
import pytest
from PIL import Image

from olvae.config import ConfigError
from olvae.data.pack import pack
from olvae.data.sharding import PackOptions, shard_count, usual_shard_size
from tests.data.packing import members, picture


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_other_formats_become_png_without_loss(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for extension in ("bmp", "tiff", "ppm"):
        picture(1).save(root / f"a.{extension}")
    sideways = Image.Exif()
    sideways[274] = 6
    picture(1).save(root / "turned.tiff", exif=sideways)
    picture(1).save(root / "turned.jpg", exif=sideways)
    picture(1).save(root / "really a png.jpg", "PNG")
    np.save(root / "array.npy", np.asarray(picture(2)))
    pack(str(root), tmp_path / "out", PackOptions())
    packed = members(tmp_path / "out")
    for name in ("a.bmp", "a.tiff", "a.ppm"):
        data, details = packed[name]
        assert details["file"].endswith(".png")
        assert np.array_equal(pixels(data), np.asarray(picture(1)))
    assert np.array_equal(pixels(packed["turned.tiff"][0]), np.rot90(np.asarray(picture(1)), -1))
    for name in ("turned.tiff", "turned.jpg"):
        assert (packed[name][1]["width"], packed[name][1]["height"]) == (20, 24)
    assert packed["turned.jpg"][0] == (root / "turned.jpg").read_bytes()
    assert packed["really a png.jpg"][1]["file"].endswith(".png")
    assert packed["array.npy"][0] == (root / "array.npy").read_bytes()


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_resize_is_bicubic_and_never_enlarges(tmp_path, extension):
    root = tmp_path / "photos"
    root.mkdir()
    big = picture(1, (90, 60)).resize((180, 120), Image.Resampling.BICUBIC)
    big.save(root / "big.png")
    picture(2, (100, 48)).save(root / "just.jpg")
    picture(3, (20, 30)).save(root / "small.bmp")
    pack(str(root), tmp_path / "out", PackOptions(resize=48, format=extension, quality=90))
    packed = members(tmp_path / "out")
    data, details = packed["big.png"]
    assert (details["width"], details["height"], details["file"][9:]) == (72, 48, extension)
    small = big.resize((72, 48), Image.Resampling.BICUBIC)
    if extension == "png":
        assert np.array_equal(pixels(data), np.asarray(small))
    else:
        stream = io.BytesIO()
        chroma = {"subsampling": 0} if extension == "jpg" else {}
        small.save(stream, "JPEG" if extension == "jpg" else "WEBP", quality=90, **chroma)
        assert np.array_equal(pixels(data), pixels(stream.getvalue()))
    assert packed["just.jpg"][0] == (root / "just.jpg").read_bytes()
    assert np.array_equal(pixels(packed["small.bmp"][0]), np.asarray(picture(3, (20, 30))))
    assert packed["small.bmp"][1]["file"].endswith(".png")


def test_arrays_of_other_channels_are_resized_as_arrays(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    array = np.random.default_rng(0).integers(0, 256, (40, 60, 5), dtype=np.uint8)
    np.save(root / "a.npy", array)
    pack(str(root), tmp_path / "out", PackOptions(resize=20, channels=5))
    small = np.load(io.BytesIO(members(tmp_path / "out")["a.npy"][0]))
    assert small.shape == (20, 30, 5)
    for c in range(5):
        band = Image.fromarray(np.ascontiguousarray(array[..., c])).resize((30, 20), Image.Resampling.BICUBIC)
        assert np.array_equal(small[..., c], np.asarray(band))


def test_a_torchvision_data_set_with_its_classes(tmp_path):
    from torchvision.datasets import FakeData

    src = "torchvision:FakeData,size=9,num_classes=4"
    pack(src, tmp_path / "out", PackOptions(shard_size=4), 2)
    packed = members(tmp_path / "out")
    dataset = FakeData(size=9, num_classes=4)
    assert sorted(packed) == [f"{i:08d}" for i in range(9)]
    for name, (data, details) in packed.items():
        image, label = dataset[int(name)]
        assert np.array_equal(pixels(data), np.asarray(image))
        assert details["label"] == label


def test_options_out_of_range():
    for wrong in ({"shard_size": -1}, {"resize": 0}, {"format": "bmp"}, {"quality": 101}):
        with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
            PackOptions(**wrong)
    with pytest.raises(ConfigError, match="jpg has no fourth channel"):
        PackOptions(resize=8, channels=4)


@pytest.mark.parametrize(("images", "size"), [(1, 1), (20, 1), (21, 2), (250, 13), (20_000, 1000), (10**6, 1000)])
def test_few_images_make_twenty_shards_all_the_same(images, size):
    assert usual_shard_size(images) == size
    assert shard_count(images, size) <= max(20, -(-images // 1000))
