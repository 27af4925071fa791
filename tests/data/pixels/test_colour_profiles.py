"""Colour profiles: Adobe RGB by its definition, and nothing where there is nothing to do."""

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageCms

from olvae.data.audit import audit_lines, audit_source
from olvae.data.image import Photo, RandomScaleCrop, image_to_tensor
from olvae.data.packing import PackOptions, pack
from olvae.data.pixels.colour_profiles import read_profile
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import eval_sample
from tests.data.images import noise, saved

PICTURES = Path(skimage.__file__).parent / "data"


def profile(name: str) -> bytes:
    """The profile in a picture of scikit-image: Adobe RGB, Dot Gain 20 %, or sRGB."""
    data: bytes = Image.open(PICTURES / name).info["icc_profile"]
    return data


ADOBE_RGB = profile("rocket.jpg")
DOT_GAIN = profile("page.png")
SRGB = profile("astronaut.png")


def adobe_to_srgb(pixels: np.ndarray) -> np.ndarray:
    """By the standards' numbers: both have the white of D65."""
    to_xyz = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
    to_rgb = [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
    linear = (pixels / 255.0) ** (563 / 256) @ np.array(to_xyz).T @ np.array(to_rgb).T
    linear = linear.clip(0.0, 1.0)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    found: np.ndarray = (curve * 255.0).round()
    return found


def read(content: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(Photo(content, "picture", channels).read())


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_adobe_rgb_becomes_srgb(file_format):
    image = noise(3)
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    found = read(saved(image, file_format, icc_profile=ADOBE_RGB, **lossless))
    wanted = adobe_to_srgb(np.asarray(image))
    np.testing.assert_allclose(found, wanted, atol=2)
    assert np.abs(wanted - np.asarray(image)).max() > 50


@pytest.mark.parametrize(
    "data", [None, SRGB, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_srgb_and_no_profile_stay_bit_for_bit(data):
    photo = Photo(saved(noise(3), "PNG", icc_profile=data), "picture")
    np.testing.assert_array_equal(np.asarray(photo.read()), np.asarray(noise(3)))
    assert (photo.profile, photo.profile_error) == (None, None)


def test_alpha_stays_and_is_laid_over_white_in_srgb():
    image = noise(3).convert("RGBA")
    alpha = Image.linear_gradient("L").resize(image.size)
    image.putalpha(alpha)
    content = saved(image, "PNG", icc_profile=ADOBE_RGB)
    found = read(content, 4)
    np.testing.assert_array_equal(found[..., 3], np.asarray(alpha))
    np.testing.assert_array_equal(
        found[..., :3], read(saved(noise(3), "PNG", icc_profile=ADOBE_RGB))
    )
    over = Image.new("RGBA", image.size, "white")
    over.alpha_composite(Image.fromarray(found))
    np.testing.assert_array_equal(read(content), np.asarray(over.convert("RGB")))


def test_palettes_and_greys_with_a_profile_of_rgb():
    for image in (noise(3).quantize(16), noise(3).convert("L")):
        content = saved(image, "PNG", icc_profile=ADOBE_RGB)
        rgb = saved(image.convert("RGB"), "PNG", icc_profile=ADOBE_RGB)
        np.testing.assert_array_equal(read(content), read(rgb))


def test_greys_of_a_grey_profile():
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = read(saved(Image.fromarray(greys), "PNG", icc_profile=DOT_GAIN))
    assert (found == found[..., :1]).all()
    curve = found[..., 0].ravel().astype(int)
    assert (np.diff(curve) >= 0).all()
    assert (curve[0], curve[255]) == (0, 255)
    assert np.abs(curve - np.arange(256)).max() > 10
    opaque = read(saved(Image.fromarray(greys).convert("LA"), "PNG", icc_profile=DOT_GAIN))
    np.testing.assert_array_equal(opaque, found)


@pytest.mark.parametrize(
    ("image", "data", "why"),
    [
        (noise(3), b"no profile", "cannot open profile"),
        (noise(3), ADOBE_RGB[:300], "cannot"),
        (noise(3), DOT_GAIN, "is not for RGB"),
        (noise(3).convert("CMYK"), ADOBE_RGB, "is not for CMYK"),
    ],
)
def test_a_profile_that_cannot_be_used_leaves_the_pixels(image, data, why):
    photo = Photo(saved(image, "TIFF", icc_profile=data), "picture")
    np.testing.assert_array_equal(np.asarray(photo.read()), np.asarray(image.convert("RGB")))
    assert why in photo.profile_error
    assert photo.profile is None


def test_masks_keep_their_values():
    content = saved(noise(3).convert("L"), "PNG", icc_profile=DOT_GAIN)
    wanted = np.asarray(noise(3).convert("L"))
    cut = RandomScaleCrop(20, 1.0, ["nearest"], flip=False)
    sample = eval_sample(Photo(content, "mask", 1), "mask", cut.evaluation)
    np.testing.assert_array_equal(sample.image[0], wanted[:, 2:22])
    crop = cut(Photo(content, "mask", 1), np.random.default_rng(0))
    assert set(np.unique(crop)) <= set(np.unique(wanted))
    assert read(content, 1).tolist() != wanted.tolist()


@pytest.mark.usefixtures("one_process")
def test_packs_and_their_images_are_in_srgb_and_the_check_counts(tmp_path):
    (tmp_path / "photos").mkdir()
    shutil.copy(PICTURES / "rocket.jpg", tmp_path / "photos")
    for name in ("a.tif", "b.tif"):
        noise(3).save(tmp_path / "photos" / name, icc_profile=ADOBE_RGB)
    noise(3).save(tmp_path / "photos" / "c.png", icc_profile=b"no profile")
    noise(3).save(tmp_path / "photos" / "d.png", icc_profile=SRGB)
    result = audit_source(str(tmp_path / "photos"), 16)
    assert result.profiles == {"Adobe RGB (1998)": 3}
    lines = [*audit_lines(result)]
    assert any("3 Adobe RGB (1998)" in line for line in lines)
    assert any("1 cannot open profile" in line for line in lines)

    # Shards, whose files keep the profile, or are sRGB where they were made smaller.
    pack(str(tmp_path / "photos"), tmp_path / "same", PackOptions(shard_size=3, seed=None))
    pack(str(tmp_path / "photos"), tmp_path / "small", PackOptions(3, None, 20, "png"))
    stored = {"a": 0, "rocket": 4}
    for folder, name in (("same", "a"), ("same", "rocket"), ("small", "rocket")):
        source = WebDatasetSource(str(tmp_path / folder), 20, 1, val_shards=str(tmp_path / folder))
        images = [batch["image"][0] for batch in source.val_loader()]
        (path,) = (tmp_path / "photos").glob(f"{name}.*")
        direct = source.eval_transform(Photo(path, name).read())
        difference = images[stored[name]].int() - image_to_tensor(direct).int()
        assert difference.abs().max() <= (1 if folder == "small" else 0)


@pytest.mark.usefixtures("one_process")
def test_packed_masks_keep_their_values_whatever_their_format(tmp_path):
    """A file that becomes a PNG keeps its pixels and its profile, so shards are like the folder."""
    (tmp_path / "masks").mkdir()
    files = {"a.png": ("L", DOT_GAIN), "b.tif": ("L", DOT_GAIN), "c.tif": ("RGB", ADOBE_RGB)}
    for name, (mode, data) in files.items():
        noise(3).convert(mode).save(tmp_path / "masks" / name, icc_profile=data)
    pack(str(tmp_path / "masks"), tmp_path / "s", PackOptions(shard_size=3, seed=None))
    (shard,) = [*(tmp_path / "s").glob("*.tar")]
    for entry, (name, (mode, _)) in zip(read_shard(Shard(str(shard))), files.items(), strict=True):
        wanted = np.asarray(noise(3).convert(mode).convert("RGB"))
        packed = Photo(entry.data, name)
        np.testing.assert_array_equal(np.asarray(packed.read(masks=True)), wanted)
        direct = Photo(tmp_path / "masks" / name, name)
        np.testing.assert_array_equal(np.asarray(packed.read()), np.asarray(direct.read()))
        assert packed.profile == direct.profile is not None


@pytest.mark.parametrize("data", [ADOBE_RGB, DOT_GAIN])
@pytest.mark.parametrize("most", [2, 3])
def test_a_profile_is_srgb_if_it_changes_none_of_its_probes_by_more_than_2(data, most, monkeypatch):
    """Colours in steps of 15, or all greys."""
    probes = []

    def changed(probe: Image.Image, _: object) -> Image.Image:
        probes.append(np.asarray(probe).reshape(-1, len(probe.getbands())))
        shown = np.array(probe.convert("RGB"))
        shown[-1, -1, 1] -= most
        return Image.fromarray(shown)

    monkeypatch.setattr(ImageCms, "applyTransform", changed)
    found = read_profile.__wrapped__(data)
    assert (found.to_srgb is None) == (most == 2)
    (probe,) = probes
    if data == DOT_GAIN:
        assert set(probe[:, 0]) == set(range(256))
    else:
        levels = range(0, 256, 15)
        assert {tuple(colour) for colour in probe.tolist()} == set(product(levels, repeat=3))
