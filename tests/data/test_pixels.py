import numpy as np
import pytest
import torch
from PIL import Image

from olvae.data.pixels import from_uint8, image_to_tensor, read_rgb, tensor_to_image, to_uint8


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
    assert np.array_equal(np.asarray(tensor_to_image(tensor)), array)


def colour(path):
    image = read_rgb(path)
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


def test_orientation_is_honoured(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_rgb(tmp_path / "turned.jpg").size == (4, 8)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png: not a readable image"):
        read_rgb(path)


def test_a_cut_off_file(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(ValueError, match="not a readable image"):
        read_rgb(cut)
