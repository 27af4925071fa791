import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.data.pixels import from_uint8, image_to_tensor, tensor_to_picture, to_uint8
from olvae.data.reading import read_picture


def test_uint8_and_back():
    x = torch.arange(256, dtype=torch.uint8)
    assert from_uint8(x).min() == -1
    assert from_uint8(x).max() == 1
    assert torch.equal(to_uint8(from_uint8(x)), x)


def test_clamped_and_rounded():
    assert to_uint8(torch.tensor([-7.0, 7.0, 1 / 255, -1 / 255])).tolist() == [0, 255, 128, 127]
    assert to_uint8(torch.tensor([0.5]).bfloat16()).tolist() == [191]


def test_pictures_and_tensors():
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = image_to_tensor(Image.fromarray(array))
    assert tensor.shape == (3, 5, 7)
    assert tensor[:, 2, 4].tolist() == array[2, 4].tolist()
    assert torch.equal(image_to_tensor(tensor_to_picture(tensor)), tensor)


def colour(path):
    image = read_picture(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_modes(tmp_path):
    cases = {
        "grey.png": (Image.new("L", (4, 4), 100), (100, 100, 100)),
        "palette.png": (
            Image.new("RGB", (4, 4), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
            (10, 20, 30),
        ),
        "alpha.png": (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        "half.png": (Image.new("LA", (4, 4), (0, 128)), (127, 127, 127)),
        "deep.png": (Image.fromarray(np.full((4, 4), 25700, dtype=np.uint16)), (100, 100, 100)),
        "cmyk.tif": (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        "bits.png": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        assert colour(tmp_path / name) == expected, name


@pytest.mark.parametrize(("channels", "expected"), [(1, [141]), (3, [200, 100, 200]), (4, [200, 100, 200, 255])])
def test_channels_of_a_picture(tmp_path, channels, expected):
    Image.new("RGB", (4, 4), (200, 100, 200)).save(tmp_path / "a.png")
    assert image_to_tensor(read_picture(tmp_path / "a.png", channels))[:, 0, 0].tolist() == expected


def test_alpha_is_kept_in_four_channels(tmp_path):
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save(tmp_path / "a.png")
    assert image_to_tensor(read_picture(tmp_path / "a.png", 4))[:, 0, 0].tolist() == [1, 2, 3, 4]


def test_arrays_of_any_number_of_channels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 5, 7), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    picture = read_picture(tmp_path / "a.npy", 7)
    shutil.copy(tmp_path / "a.npy", tmp_path / "B.NPY")  # which folders are searched for as well
    assert read_picture(tmp_path / "B.NPY", 7).size == picture.size
    assert (picture.width, picture.height) == (5, 6)
    assert np.array_equal(image_to_tensor(picture).permute(1, 2, 0).numpy(), array)
    for bad, message in ((array[..., :3], r"shape \(H, W, 7\)"), (array.astype(float), "expected uint8")):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ValueError, match=message):
            read_picture(tmp_path / "bad.npy", 7)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut"):
        read_picture(tmp_path / "cut.npy", 7)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"read from \.npy files"):
        read_picture(tmp_path / "a.png", 7)


def test_orientation_is_honoured(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (4, 8)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png: not a readable image"):
        read_picture(path)


def test_a_cut_off_file(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(ValueError, match="not a readable image"):
        read_picture(cut)
