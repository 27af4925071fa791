"""What a file's header says of a picture, before and beside its pixels."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, ImageCms

from olvae.config import ConfigError
from olvae.data import image as image_module
from olvae.data.image import Photo, image_to_tensor, stated_picture
from olvae.data.pixels.size_and_range import AS_STORED, EIGHT_BITS, PixelRange, check_size
from olvae.data.read_errors import UnreadableImageError
from tests.data.images import saved
from tests.data.pixels.files import npy, npz, tiff
from tests.data.test_image import RED, _write, bomb, claiming, plain


def padded(sides: tuple[int, int], size: int, **options: bool) -> bytes:
    """A JPEG whose header claims such sides, of so many bytes."""
    height, width = (side.to_bytes(2, "big") for side in sides)
    marker = b"\xff\xc2" if options else b"\xff\xc0"
    return claiming(saved(plain(), "JPEG", **options), marker, 5, height + width).ljust(size, b"-")


def test_a_byte_of_a_jpeg_holds_256_pixels_at_most_and_of_a_progressive_one_512():
    for content in (padded((1024, 1280), 5120), padded((1024, 1280), 2560, progressive=True)):
        assert Photo(content, "a.jpg").size == (1280, 1024)
        with pytest.raises(UnreadableImageError, match="1280x1024 pixels, more than its"):
            Photo(content[:-1], "a.jpg")


def test_a_photo_knows_what_its_file_says():
    photo = Photo(saved(plain("L", 90), "PNG"), "a.png")
    assert (photo.format, photo.mode, photo.icc_profile) == ("PNG", "L", None)
    assert (photo.suffix, photo.nodata, photo.pages) == ("npy", None, 0)
    pages = tiff(np.zeros((5, 20, 24), np.uint16), extratags=[(42113, "s", 0, "-1.5", True)])
    photo = Photo(pages, "a.tif", 5, AS_STORED)
    assert (photo.format, photo.mode, photo.icc_profile) == (None, None, None)
    assert (photo.suffix, photo.nodata, photo.pages) == ("tif", -1.5, 5)
    # Its missing values, and what is not finite.
    found = photo.missing(np.array([0.0, -1.5, np.nan, np.inf]))
    assert found.tolist() == [False, True, True, True]
    photo.nodata = None
    assert photo.missing(np.array([0.0, -1.5, np.nan])).tolist() == [False, False, True]


def test_the_content_is_at_hand_undecoded(tmp_path):
    path = _write(tmp_path / "a.png", saved(plain(), "PNG"))
    photo = Photo(path, "it")
    assert photo.undecoded() == path.read_bytes()
    image = plain()
    assert Photo(image, "it").undecoded() is image
    path.unlink()
    with pytest.raises(UnreadableImageError, match="No such file") as error:
        photo.undecoded()
    assert error.value.name == "it"


def test_of_a_tiff_too_large_to_be_read_at_once_the_tiles_are_named(monkeypatch):
    scenes = "scenes:FOLDER"
    monkeypatch.setattr(image_module, "check_size", partial(check_size, most=24 * 20 - 1))
    for name, named in (("a.TIF", True), ("a.tiff", True), ("a.png", False)):
        with pytest.raises(UnreadableImageError, match="24x20 pixels, more than") as error:
            Photo(saved(plain(), "TIFF"), name)
        assert (error.value.name, scenes in error.value.reason) == (name, named)
    with pytest.raises(UnreadableImageError) as error:
        Photo(b"no picture", "a.tif")
    assert error.value.reason == "no known picture format"
    with pytest.raises(UnreadableImageError) as error:
        Photo(bomb(), "a.tif")
    assert error.value.reason.startswith("its header claims more than 160 million pixels: training")


def test_a_mistake_in_the_settings_is_no_fault_of_the_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ConfigError, match="imagecodecs: pip install"):
        Photo(saved(Image.fromarray(np.ones((4, 5), np.uint16)), "PNG"), "a.png", 1, AS_STORED)


def test_a_file_is_opened_as_often_as_its_kind_needs(monkeypatch, tmp_path):
    """A photograph on disk once, by Pillow alone; what Pillow can't give, by its first bytes."""
    opened = []
    for name in ("array_suffix", "open_by_pillow"):
        known = getattr(image_module, name)

        def recorded(*args, known=known, name=name):
            opened.append(name)
            return known(*args)

        monkeypatch.setattr(image_module, name, recorded)
    stated = PixelRange.from_node([0, 65535])
    photograph = saved(plain(), "PNG")
    deep = saved(Image.fromarray(np.ones((4, 5), np.uint16)), "PNG")
    bands = tiff(np.ones((4, 5, 7), np.uint8), planarconfig="contig")
    numpy_file = npy(np.ones((4, 5, 3), np.uint8))
    for content, channels, pixel_range, wanted in (
        (_write(tmp_path / "1", photograph), 3, EIGHT_BITS, ["open_by_pillow"]),
        (photograph, 3, EIGHT_BITS, ["array_suffix", "open_by_pillow"]),
        (_write(tmp_path / "2", photograph), 3, AS_STORED, ["array_suffix", "open_by_pillow"]),
        (_write(tmp_path / "3", deep), 1, stated, ["array_suffix"]),
        (_write(tmp_path / "4", bands), 7, EIGHT_BITS, ["array_suffix"]),
        (numpy_file, 3, EIGHT_BITS, ["array_suffix"]),
    ):
        opened.clear()
        Photo(content, "it", channels, pixel_range)
        assert opened == wanted


def test_what_is_named_an_array_is_one_by_its_first_bytes():
    content = npz(np.ones((4, 5, 3), np.uint8))
    assert Photo(content, "a.npy").suffix == "npz"
    with pytest.raises(UnreadableImageError, match="no known format of arrays"):
        Photo(saved(plain(), "PNG"), "a.NPY")
    with pytest.raises(UnreadableImageError) as error:
        Photo(b"", "a.npy")
    assert error.value.reason == "the file is empty"


def test_four_bands_are_read_where_pillow_has_three():
    """Of a deep file the range comes before the number of channels."""
    array = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    content = tiff(array, "rgb", extrasamples=["unspecified"])
    found = image_to_tensor(Photo(content, "a.tif", 4).read())
    assert found.permute(1, 2, 0).tolist() == array.tolist()
    with pytest.raises(UnreadableImageError, match=r"data\.params\.range"):
        Photo(tiff(array[..., :3].astype(np.uint16), "rgb"), "a.tif", 1)


def test_an_array_is_a_picture_of_its_range_or_refused():
    eight = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    for pixel_range in (EIGHT_BITS, AS_STORED):
        assert image_to_tensor(stated_picture(eight, pixel_range)).dtype == torch.uint8
    with pytest.raises(ValueError, match="8 bits per channel, whose range"):
        stated_picture(eight, PixelRange.from_node([0, 300]))
    for kind in ("uint16", "float32"):
        with pytest.raises(ValueError, match=rf"{kind} of shape \(2, 3, 2\): more than 8 bits"):
            stated_picture(eight.astype(kind), EIGHT_BITS)
        found = stated_picture(eight.astype(kind), PixelRange.from_node([0, 300]))
        assert image_to_tensor(found).permute(1, 2, 0).tolist() == eight.tolist()
        assert found.dtype == kind
    with pytest.raises(ValueError, match="no data there"):
        stated_picture(eight.astype(np.float32), PixelRange.from_node([0, 300]), 7.0)


def test_a_profile_is_applied_to_colours_and_not_to_masks():
    adobe = Image.open(Path(skimage.__file__).parent / "data" / "rocket.jpg").info["icc_profile"]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for data, masks, name, error in (
        (adobe, False, "Adobe RGB (1998)", None),
        (adobe, True, None, None),
        (srgb, False, None, None),
        (b"no profile", False, None, "cannot open profile"),
    ):
        photo = Photo(saved(plain(), "PNG", icc_profile=data), "a.png")
        assert photo.icc_profile == data
        found = np.asarray(photo.read(masks=masks))[0, 0].tolist()
        assert (found == list(RED)) == (name is None)
        assert photo.profile == name
        assert (error or "") in (photo.profile_error or "")
        assert (photo.profile_error is None) == (error is None)
