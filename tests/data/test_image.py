import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from olvae.data import image as image_module
from olvae.data.image import (
    MultiBand,
    Photo,
    RandomScaleCrop,
    image_to_tensor,
    read_picture,
    tensor_to_picture,
)
from olvae.data.pixels.size_and_range import (
    AS_STORED,
    EIGHT_BITS,
    PixelRange,
    from_uint8,
    to_uint8,
)
from olvae.data.read_errors import UnreadableImageError
from tests.data.images import encoded, picture, saved
from tests.data.pixels.files import tiff

RED = (200, 30, 40)


def plain(mode: str = "RGB", colour: object = RED) -> Image.Image:
    return Image.new(mode, (24, 20), colour)  # type: ignore[arg-type]


def flipped(data: bytes, where: float) -> bytes:
    """One byte in the middle of the data changed."""
    i = int(len(data) * where)
    return data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :]


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG whose header claims so many pixels."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    info = PngInfo()
    info.add_text("comment", "a" * 80_000_000, zip=True)
    return saved(plain(), "PNG", pnginfo=info)


def animated() -> bytes:
    return saved(plain(), "GIF", save_all=True, append_images=[plain(colour=(0, 0, 255))])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(plain(), "JPEG", exif=exif, quality=100)


def avif_without_an_image() -> bytes:
    if "AVIF" not in Image.SAVE:
        return b"as unknown as any other format"
    return saved(plain(), "AVIF").replace(b"pitm", b"free")


SKIPPED = {
    "zero.jpg": b"",
    "text.jpg": b"this is no picture",
    "cut.jpg": encoded(1)[:200],
    "cut.png": encoded(1, "PNG")[:60],
    "cut.webp": encoded(1, "WEBP")[:30],
    "cut.gif": encoded(1, "GIF")[:40],
    "cut.bmp": encoded(1, "BMP")[:100],
    "cut.tif": encoded(1, "TIFF")[:200],
    "bad-checksum.png": flipped(encoded(1, "PNG"), 0.5),
    "noise.jpg": np.random.default_rng(0).bytes(5000),
    "bomb.png": bomb(),
    "line.png": bomb(178_000_000, 1),
    "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 20\n%%EndComments\nshowpage\n",
    "text-bomb.png": text_bomb(),
    "float.tif": saved(Image.fromarray(np.ones((20, 24), dtype=np.float32)), "TIFF"),
    "integers.tif": saved(Image.fromarray(np.full((20, 24), 65536, dtype=np.int32)), "TIFF"),
    "sixteen.ppm": b"P5 24 20 65535\n" + np.full((20, 24), 257 * 100, dtype=">u2").tobytes(),
    "negative.tif": saved(Image.fromarray(np.full((20, 24), -1, dtype=np.int32)), "TIFF"),
    "broken-avif.jpg": avif_without_an_image(),
    "header.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'shape': (20, 24, 3" + b" " * 81 + b"\n",
    "zip.npy": b"PK\x03\x04" + bytes(100),
    "pickle.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    + b" " * 60
    + b"\n",
    "grey.npy": b"",
}

CONVERTED = {
    "rgb.jpg": (saved(plain(), "JPEG", quality=100), RED),
    "wrong-name.jpg": (saved(plain(), "PNG"), RED),
    "grey.png": (saved(plain("L", 90), "PNG"), (90, 90, 90)),
    "palette.png": (saved(plain().quantize(4), "PNG"), RED),
    "palette-transparent.png": (saved(plain("P", 0), "PNG", transparency=0), (255, 255, 255)),
    "alpha.png": (saved(plain("RGBA", (0, 0, 0, 128)), "PNG"), (127, 127, 127)),
    "grey-alpha.png": (saved(plain("LA", (0, 128)), "PNG"), (127, 127, 127)),
    "cmyk.jpg": (saved(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "broken-exif.png": (saved(plain(), "PNG", exif=b"Exif\0\0no such thing"), RED),
    "broken-exif.jpg": (saved(plain(), "JPEG", exif=b"Exif\0\0no such thing", quality=100), RED),
    "turned.jpg": (turned(), RED),
    "animated.gif": (animated(), RED),
    "lab.tif": (saved(plain("LAB", (255, 128, 128)), "TIFF"), (255, 255, 255)),
    "extra-bytes.jpg": (saved(plain(), "JPEG", quality=100) + b"garbage at the end", RED),
}
if int(PIL.__version__.partition(".")[0]) >= 13:
    # Older Pillows write such a file and take it for a truncated one.
    CONVERTED["ycbcr.tif"] = (saved(plain("YCbCr", (128, 128, 128)), "TIFF"), (128, 128, 128))


@pytest.mark.parametrize("name", SKIPPED)
def test_read_picture_refuses_what_is_no_picture_with_its_name(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(SKIPPED[name])
    with pytest.raises(UnreadableImageError, match="readable image") as from_file:
        read_picture(path)
    with pytest.raises(UnreadableImageError) as from_bytes:
        Photo(SKIPPED[name], name).read()
    assert from_file.value.name == str(path)
    assert from_bytes.value.reason
    assert "\n" not in str(from_file.value)


@pytest.mark.parametrize("name", CONVERTED)
def test_pictures_of_other_modes_are_converted_to_rgb(name, tmp_path):
    content, expected = CONVERTED[name]
    for photo in (Photo(content, name), Photo(_write(tmp_path / name, content), name)):
        image = photo.read()
        assert image.mode == "RGB"
        assert image.size == photo.size == ((20, 24) if name == "turned.jpg" else (24, 20))
        np.testing.assert_allclose(np.asarray(image)[10, 10], expected, atol=3)


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(512, 384), (333, 251), (13, 9)])
def test_jpegs_are_decoded_at_a_fraction_of_their_size(shrink, size, tmp_path):
    image = picture(3, size)
    path = tmp_path / "a.jpg"
    image.save(path, quality=95)
    photo = Photo(path, "a.jpg")
    small = photo.read(shrink)
    assert photo.size == size
    assert small.size == tuple(-(-side // shrink) for side in size)
    assert (
        Photo(Path(_write(tmp_path / "a.png", saved(image, "PNG"))), "a.png").read(shrink).size
        == size
    )


def test_a_turned_jpeg_knows_its_upright_size_before_it_is_decoded():
    photo = Photo(turned(), "turned.jpg")
    assert photo.size == (20, 24)
    assert photo.read(2).size == (10, 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_cut_as_any_other_turned_file(orientation):
    """Pillow turns TIFFs itself, newer ones their size before the pixels are there."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(7, (60, 20))
    tiff = Photo(saved(image, "TIFF", tiffinfo={0x0112: orientation}), "a.tif")
    png = Photo(saved(image, "PNG", exif=exif), "a.png")
    assert tiff.size == png.size
    cut = [RandomScaleCrop(8)(photo, np.random.default_rng(1)) for photo in (tiff, png)]
    np.testing.assert_array_equal(np.asarray(cut[0]), np.asarray(cut[1]))
    assert tiff.read().size == tiff.size
    assert Photo(tiff.read(), "in memory").size == tiff.size


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_uint8_and_back_clamped_and_rounded():
    x = torch.arange(256, dtype=torch.uint8)
    assert from_uint8(x).aminmax() == (-1, 1)
    assert torch.equal(to_uint8(from_uint8(x)), x)
    assert to_uint8(torch.tensor([-7.0, 7.0, 1 / 255, -1 / 255])).tolist() == [0, 255, 128, 127]
    assert to_uint8(torch.tensor([0.5]).bfloat16()).tolist() == [191]


def test_pictures_become_tensors_and_come_back():
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = image_to_tensor(Image.fromarray(array))
    assert tensor.shape == (3, 5, 7)
    assert tensor[:, 2, 4].tolist() == array[2, 4].tolist()
    assert torch.equal(image_to_tensor(tensor_to_picture(tensor)), tensor)


@pytest.mark.parametrize(
    ("colour", "channels", "expected"),
    [
        ((200, 100, 200), 1, [141]),
        ((200, 100, 200), 3, [200, 100, 200]),
        ((200, 100, 200), 4, [200, 100, 200, 255]),
        ((1, 2, 3, 4), 4, [1, 2, 3, 4]),
    ],
)
def test_read_picture_gives_the_asked_channels(tmp_path, colour, channels, expected):
    plain("RGB" if len(colour) == 3 else "RGBA", colour).save(tmp_path / "a.png")
    assert image_to_tensor(read_picture(tmp_path / "a.png", channels))[:, 0, 0].tolist() == expected


def test_an_array_has_the_channels_that_are_asked_for(tmp_path):
    """As they are stored, a deep TIFF or PNG may have any number of them."""
    five = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    np.save(tmp_path / "a.npy", five)
    (tmp_path / "a.tif").write_bytes(tiff(five.astype(np.uint16) * 99, planarconfig="contig"))
    for pixel_range in (EIGHT_BITS, AS_STORED):
        with pytest.raises(UnreadableImageError, match=r"\(H, W, 3\)"):
            read_picture(tmp_path / "a.npy", 3, pixel_range)
    with pytest.raises(UnreadableImageError, match=r"a\.tif: .*5"):
        read_picture(tmp_path / "a.tif", 3, PixelRange.from_node([0, 65535]))
    found = image_to_tensor(read_picture(tmp_path / "a.tif", 3, AS_STORED))
    assert found.permute(1, 2, 0).tolist() == (five.astype(int) * 99).tolist()


def test_a_picture_in_memory_has_its_channels_or_any():
    bands = MultiBand([Image.new("L", (4, 3), level) for level in (7, 8, 9)])
    for channels in (0, 3):
        assert Photo(bands, "it", channels).read() is bands
    for channels in (1, 2, 4):
        with pytest.raises(UnreadableImageError, match=f"3 channels, not {channels}"):
            Photo(bands, "it", channels)


def test_more_than_8_bits_are_read_of_formats_that_are_read_as_arrays(tmp_path):
    deep = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
    (tmp_path / "a.pgm").write_bytes(b"P5 5 4 65535\n" + deep.astype(">u2").tobytes())
    Image.fromarray(deep).save(tmp_path / "a.png")
    stated = PixelRange.from_node([0, 65535])
    for name, pixel_range, why in (
        ("a.pgm", EIGHT_BITS, "not read from this format"),
        ("a.pgm", AS_STORED, "not read from this format"),
        ("a.png", EIGHT_BITS, r"data\.params\.range"),
    ):
        with pytest.raises(UnreadableImageError, match=why):
            read_picture(tmp_path / name, 1, pixel_range)
    for pixel_range in (stated, AS_STORED):
        picture = read_picture(tmp_path / "a.png", 1, pixel_range)
        assert image_to_tensor(picture)[0].tolist() == deep.tolist()


def test_read_picture_takes_arrays_of_any_number_of_channels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 5, 7), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    picture = read_picture(tmp_path / "a.npy", 7)
    shutil.copy(tmp_path / "a.npy", tmp_path / "B.NPY")  # which folders are searched for as well
    assert read_picture(tmp_path / "B.NPY", 7).size == picture.size
    assert (picture.width, picture.height) == (5, 6)
    assert np.array_equal(image_to_tensor(picture).permute(1, 2, 0).numpy(), array)
    for bad, message in (
        (array[..., :3], r"shape \(H, W, 7\)"),
        (array.astype(float), "expected uint8"),
    ):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ValueError, match=message):
            read_picture(tmp_path / "bad.npy", 7)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut"):
        read_picture(tmp_path / "cut.npy", 7)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"read from \.npy"):
        read_picture(tmp_path / "a.png", 7)


def test_picture_sizes_are_checked_before_decoding():
    for size, message in (
        ((178_000_000, 1), "178000000x1 pixels, more than 160 million"),
        ((100, 10_001), "100 times"),
    ):
        with pytest.raises(UnreadableImageError, match=message):
            Photo(bomb(*size), "a.png")
    for size in ((14_204, 10_652), (1000, 100_000)):  # the largest camera's, a long strip
        assert Photo(b"P6 %d %d 255\n" % size + bytes(9), "a.ppm").size == size


def claiming(data: bytes, marker: bytes, offset: int, sides: bytes) -> bytes:
    """A file with other sides in its header."""
    place = data.index(marker) + offset
    return data[:place] + sides + data[place + 4 :]


LARGE = (12_000).to_bytes(2, "big") + (13_000).to_bytes(2, "big")
CLAIMS = {
    "a.jpg": claiming(saved(plain(), "JPEG"), b"\xff\xc0", 5, LARGE),
    "progressive.jpg": claiming(saved(plain(), "JPEG", progressive=True), b"\xff\xc2", 5, LARGE),
    "a.gif": claiming(saved(plain("P", 0), "GIF"), b"GIF8", 6, b"\x60\xea\xd0\x07"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_file_too_small_for_the_pixels_that_it_claims(name, tmp_path):
    """Pillow gives a grey picture."""
    path = tmp_path / name
    path.write_bytes(CLAIMS[name])
    for content in (path, CLAIMS[name]):
        with pytest.raises(UnreadableImageError, match=r"more than .*\d+ bytes"):
            Photo(content, name)


def test_pictures_of_one_colour_are_as_small_as_their_format_allows():
    flat = Image.new("L", (3000, 2000), 90)
    for content in (
        saved(flat, "JPEG", optimize=True, quality=1),
        saved(flat, "JPEG", optimize=True, progressive=True, quality=1),
        saved(flat, "GIF"),
        saved(flat.convert("P"), "GIF"),
    ):
        np.testing.assert_allclose(np.asarray(Photo(content, "flat").read()), 90, atol=8)


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_strips_of_a_large_picture_are_converted_as_the_whole(name, channels, monkeypatch):
    whole = np.asarray(Photo(CONVERTED[name][0], name, channels).read())
    monkeypatch.setattr(image_module, "STRIP_PIXELS", 24 * 7)
    photo = Photo(CONVERTED[name][0], name, channels)
    heights = []
    convert = photo.converted
    monkeypatch.setattr(
        photo, "converted", lambda *args: [heights.append(args[0].height), convert(*args)][1]
    )
    np.testing.assert_array_equal(photo.read(), whole)
    # RGB, which needs no conversion, at once.
    strips = [8, 8, 8] if name == "turned.jpg" else [7, 7, 6]
    assert heights == ([len(whole)] if photo.mode == "RGB" and channels == 3 else strips)


@pytest.mark.slow
def test_a_large_picture_with_alpha_is_in_memory_twice_at_most(tmp_path):
    """Its 400 kB have 16 million pixels, 64 MB; strips and libraries may take 96 MB more."""
    Image.new("RGBA", (4000, 4000)).save(tmp_path / "a.png")
    code = (
        "import resource, sys; from pathlib import Path; from olvae.data.image import Photo\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = peak(); Photo(Path(sys.argv[1]), 'a').read(); print(peak() - start)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < (2 * 64 + 96) * 1000
