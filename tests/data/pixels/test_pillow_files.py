"""Pictures that Pillow opens: which, and what it would misread."""

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, UnidentifiedImageError

from olvae.data.image import Photo, image_to_tensor, read_picture
from olvae.data.pixels.pillow_files import exif_orientation, is_deep, open_by_pillow
from olvae.data.pixels.size_and_range import AS_STORED, EIGHT_BITS, PixelRange
from olvae.data.read_errors import UnreadableImageError
from tests.data.images import picture, saved
from tests.data.pixels.files import npy, png, tiff, values

WIDE = PixelRange.from_node([-40_000, 70_000])


def test_a_tiff_of_thousands_of_pages_is_refused_before_all_are_read():
    """Each took half a millisecond, so that 7 MB kept a reader busy for half a minute."""
    tags = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (279, 16)]
    page = struct.pack("<H", len(tags))
    page += b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    pages = 60_000
    content = bytearray(b"II*\0\x08\0\0\0")
    for left in reversed(range(pages)):
        following = len(content) + len(page) + 4 if left else 0
        content += page + struct.pack("<I", following)
    with pytest.raises(UnreadableImageError, match="more than 1000"):
        Photo(bytes(content), "pages.tif")


def test_a_tiff_of_signed_bytes_is_refused(tmp_path):
    """Pillow reads -128 as 128 and -1 as 255."""
    values = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    tifffile.imwrite(tmp_path / "signed.tif", values, photometric="minisblack")
    tifffile.imwrite(tmp_path / "bytes.tif", values.view(np.uint8), photometric="minisblack")
    with pytest.raises(UnreadableImageError, match="from -128 to 127"):
        read_picture(tmp_path / "signed.tif")
    assert np.asarray(read_picture(tmp_path / "bytes.tif"))[0, 0].tolist() == [128] * 3


def test_a_tiff_with_a_smaller_copy_or_a_mask_of_its_page_is_one_picture(tmp_path):
    """As GIS programs write them; a second page of its own is refused."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)

    def write(*kinds: int) -> Path:
        path = tmp_path / f"{kinds}.tif"
        with tifffile.TiffWriter(path) as file:
            file.write(pixels, photometric="rgb")
            for kind in kinds:
                smaller = np.ones((32, 48), dtype=bool) if kind & 4 else pixels[::2, ::2]
                photometric = "mask" if kind & 4 else "rgb"
                file.write(smaller, photometric=photometric, subfiletype=kind)
        return path

    for kinds in ((1,), (4,), (4, 1), (1, 5)):
        found = image_to_tensor(read_picture(write(*kinds)))
        assert np.array_equal(found.movedim(0, -1).numpy(), pixels)
    for kinds in ((0,), (2,), (4, 0)):
        with pytest.raises(UnreadableImageError, match="2 pages"):
            read_picture(write(*kinds))


@pytest.mark.parametrize(
    "start", ["P6 5 4 65535", "P6 5 4 1023", "P3 5 4 1023", "P5 5 4 65535", "P5 5 4 1023"]
)
def test_a_deep_ppm_is_refused(start):
    """With a range, without one, and where one is measured or images are packed:
    there is no range to state."""
    for channels, stated in ((3, EIGHT_BITS), (3, WIDE), (0, AS_STORED), (3, AS_STORED)):
        with pytest.raises(UnreadableImageError, match="PNG or TIFF"):
            Photo(f"{start}\n".encode() + b"77 " * 60, "a.ppm", channels, stated)
    assert Photo(b"P6 5 4 100\n" + bytes(60), "a.ppm").read().size == (5, 4)


def test_the_fourth_band_of_a_picture_is_no_alpha():
    """Pillow reads a picture of three, as the file says.

    Where four channels are asked for, it has four.
    """
    array = values("uint8", 4)
    content = tiff(array, "rgb", extrasamples=["unspecified"])
    for channels in (4, 3):
        tensor = image_to_tensor(Photo(content, "a.tif", channels).read())
        np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), array[..., :channels])
    turned = tiff(array, "rgb", extrasamples=["unspecified"], extratags=[(274, "H", 1, 6, True)])
    with pytest.raises(UnreadableImageError, match="orientation 1"):
        Photo(turned, "a.tif", 4)


@pytest.mark.parametrize("extra", [["unassalpha"], ["unspecified"] * 3])
def test_packed_planes_are_not_taken_for_their_first_one(extra):
    """As GDAL stores bands by default: they would be grey, and alpha noise."""
    array = values("uint8", 1 + len(extra))
    planes = np.moveaxis(array, -1, 0)
    content = tiff(planes, extrasamples=extra, planarconfig="separate", compression="deflate")
    for channels in (1, 3):
        with pytest.raises(UnreadableImageError, match=r"got uint8 of .* is `channels` right"):
            Photo(content, "a.tif", channels)
    tensor = image_to_tensor(Photo(content, "a.tif", len(planes)).read())
    np.testing.assert_array_equal(tensor.numpy(), planes)


def test_colours_in_planes_that_pillow_misreads_are_refused():
    planes = np.moveaxis(values("uint8"), -1, 0)
    content = tiff(planes, "cielab", planarconfig="separate", metadata=None)
    with pytest.raises(UnreadableImageError, match=r"its LAB colours are in planes: save it"):
        Photo(content, "a.tif")
    content = tiff(planes, "rgb", planarconfig="separate", compression="deflate")
    np.testing.assert_array_equal(image_to_tensor(Photo(content, "a.tif").read()).numpy(), planes)


def test_a_tiff_of_several_pages_is_refused():
    """Only the first would be read."""
    with pytest.raises(UnreadableImageError, match="3 pages"):
        Photo(tiff(np.stack([values("uint8")] * 3), "rgb"), "a.tif")


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_formats_are_known_by_their_content(kind):
    opened = open_by_pillow(saved(picture(0), kind), 3)
    assert (opened.format, opened.size) == (kind, (40, 32))


@pytest.mark.parametrize("kind", ["EPS", "PCX", "ICO", "PDF"])
def test_other_formats_are_refused(kind):
    """EPS, for one, would start Ghostscript."""
    with pytest.raises(UnidentifiedImageError):
        open_by_pillow(saved(picture(0), kind), 3)
    with pytest.raises(UnidentifiedImageError):
        open_by_pillow(npy(values("uint8")), 3)


def test_a_tiff_that_pillow_does_not_know_is_left_to_the_reader_of_arrays(tmp_path):
    content = tiff(values("float32"), "rgb")
    (tmp_path / "a.tif").write_bytes(content)
    assert open_by_pillow(content, 3) is open_by_pillow(tmp_path / "a.tif", 3) is None


@pytest.mark.parametrize(
    ("content", "deep"),
    [
        (png(values("uint8")), False),
        (png(values("uint16")), True),
        (png(values("uint16", 1)), True),
        (tiff(values("uint8"), "rgb"), False),
        (tiff(values("uint16", 1)[..., 0]), True),
        (tiff(values("float32", 1)[..., 0]), True),
        (b"P5 4 3 255\n" + bytes(12), False),
        (b"P5 4 3 256\n" + bytes(24), True),
        (b"P6 2 1 255\n" + bytes(6), False),
        (b"P6 2 1 65535\n" + bytes(12), True),
        (saved(Image.new("1", (9, 9)), "PNG"), False),
        (saved(Image.new("I", (9, 9), 3), "TIFF"), True),
    ],
)
def test_pictures_of_more_than_eight_bits_are_known_by_their_header(content, deep):
    assert is_deep(open_by_pillow(content, 1)) is deep


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_orientation_is_the_files(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert exif_orientation(open_by_pillow(saved(picture(0), kind, exif=exif), 3)) == orientation


def test_a_picture_without_exif_or_with_a_broken_one_is_upright():
    assert exif_orientation(open_by_pillow(saved(picture(0), "JPEG"), 3)) == 1
    broken = saved(picture(0), "PNG", exif=b"Exif\0\0no such thing")
    assert exif_orientation(open_by_pillow(broken, 3)) == 1
