import io
import json
import logging
import math
import shutil
import struct
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from olvae.config import ConfigError
from olvae.data.image import image_to_tensor, read_picture
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.read_errors import UnreadableImageError
from olvae.export import raster_rows, tiff_rows
from olvae.export.raster_rows import boxes_of, find_profile, open_raster, read_raster
from tests.data.pixels.files import tiff, values
from tests.data.test_image import bomb
from tests.export.rasters import jpeg_2000, note_results, with_profile, zarr

SIZE = (93, 150)
RGB = values("uint8", 3, SIZE)
BANDS = np.moveaxis(values("float32", 13, SIZE), -1, 0)
DEEP = PixelRange.from_node([-40_000, 70_000])
MEMORY = 400_000  # too little for the image, enough for a row of tiles


def planes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 0))


def codes(path: Path) -> None:
    path.write_bytes(imagecodecs.jpeg2k_encode(RGB, level=0, reversible=True, codecformat="j2k"))


def colours(path: Path, number: int, array: np.ndarray = RGB) -> None:
    jpeg_2000(path, array, photometric="RGB")
    content = bytearray(path.read_bytes())
    content[content.index(b"colr") + 10] = number
    path.write_bytes(content)


FOUR = values("uint8", 4, SIZE)
FILES = {
    "tiles": (RGB, lambda path: jpeg_2000(path, RGB)),
    "tiles of RGB": (RGB, lambda path: jpeg_2000(path, RGB, photometric="RGB")),
    "one tile": (RGB, lambda path: jpeg_2000(path, RGB, tile=256)),
    "without boxes": (RGB, codes),
    "grey": (RGB[..., :1], lambda path: jpeg_2000(path, RGB[..., :1])),
    "alpha": (
        values("uint8", 4, SIZE),
        lambda path: jpeg_2000(path, values("uint8", 4, SIZE), photometric="RGB", alpha="yes"),
    ),
    "16 bits": (
        values("uint16", 3, SIZE),
        lambda path: jpeg_2000(path, values("uint16", 3, SIZE)),
    ),
    "16 bits of LAB": (
        values("uint16", 3, SIZE),
        lambda path: colours(path, 14, values("uint16", 3, SIZE)),
    ),
    "four bands": (FOUR, lambda path: jpeg_2000(path, FOUR)),
    "Zarr": (RGB, lambda path: zarr(path, planes(RGB), (3, 32, 48))),
    "Zarr, blosc": (RGB, lambda path: zarr(path, planes(RGB), (1, 32, 48), "blosc")),
    "Zarr, zstd": (RGB, lambda path: zarr(path, planes(RGB), (2, 50, 150), "zstd")),
    "Zarr, grey": (RGB[..., :1], lambda path: zarr(path, RGB[..., 0].copy(), (32, 48))),
    "Zarr, OME": (RGB, lambda path: zarr(path, planes(RGB)[None, :, None], (1, 1, 1, 32, 48))),
    "Zarr, 13 bands": (
        np.moveaxis(BANDS, 0, -1),
        lambda path: zarr(path, BANDS, (5, 32, 48)),
    ),
    "Zarr, int16": (
        values("int16", 3, SIZE),
        lambda path: zarr(path, planes(values("int16", 3, SIZE)).astype(">i2"), (3, 32, 48)),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_those_of_the_same_picture_as_tiff(name, tmp_path):
    array, write = FILES[name]
    write(tmp_path / "a")
    channels = {"Zarr, 13 bands": 13, "four bands": 4}.get(name, 3)
    pixel_range = EIGHT_BITS if array.dtype == np.uint8 else DEEP
    photometric = "rgb" if array.shape[2] in (3, 4) else "minisblack"
    extra = {"extrasamples": ["unassalpha"]} if array.shape[2] == 4 else {}
    flat = array[..., 0] if array.shape[2] == 1 else np.ascontiguousarray(array)
    (tmp_path / "a.tif").write_bytes(tiff(flat, photometric, planarconfig="contig", **extra))
    whole = image_to_tensor(read_picture(tmp_path / "a.tif", channels, pixel_range))

    rows = open_raster(tmp_path / "a", channels, pixel_range, MEMORY)
    assert rows.shape == whole.shape
    assert rows.tile_bytes == math.prod(rows.tile) * array.shape[2] * array.itemsize
    for start, stop in ((0, 93), (0, 1), (63, 65), (5, 88), (92, 93), (0, 64)):
        assert torch.equal(rows.read(start, stop), whole[:, start:stop])
    rows.close()
    assert rows.dataset.closed
    assert torch.equal(read_raster(tmp_path / "a", channels, pixel_range, MEMORY)[0], whole)
    if array.dtype == np.uint8 and array.shape[2] == 3:
        assert np.array_equal(whole.permute(1, 2, 0), array)


def test_a_window_is_a_row_of_tiles(tmp_path, monkeypatch):
    """Each is read once for strips that follow each other, and two are kept."""
    jpeg_2000(tmp_path / "a.jp2", RGB, tile=32)
    zarr(tmp_path / "a.zarr", planes(RGB), (3, 32, 48))
    for name in ("a.jp2", "a.zarr"):
        rows = open_raster(tmp_path / name, 3, EIGHT_BITS, MEMORY)
        dataset = rows.dataset
        windows = []

        class Counted:
            def read(self, window, dataset=dataset, windows=windows):
                windows.append(window)
                return dataset.read(window=window)

        rows.dataset = Counted()
        for start in range(0, 93, 8):
            rows.read(start, min(93, start + 12))
        assert windows == [((top, min(93, top + 32)), (0, 150)) for top in (0, 32, 64)]
        assert rows.band.cache_info().maxsize == 2
        dataset.close()


def test_a_profile_is_converted_as_a_pngs(tmp_path):
    """Red and green change places."""
    primaries = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = primaries.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ")
    swapped = swapped.replace(b"tXYZ", b"gXYZ")
    jpeg_2000(tmp_path / "a.jp2", RGB, photometric="RGB")
    with_profile(tmp_path / "a.jp2", swapped)
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=swapped)
    found, _ = read_raster(tmp_path / "a.jp2", 3, EIGHT_BITS, MEMORY)
    assert torch.equal(found, image_to_tensor(read_picture(tmp_path / "a.png")))
    assert not np.array_equal(found.permute(1, 2, 0), RGB)


def test_small_images_and_other_files_are_for_the_usual_reader(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").write_bytes(bomb(20, 20))
    jpeg_2000(tmp_path / "a.jp2", RGB)
    for name in ("folder", "a.png", "missing.jp2"):
        assert open_raster(tmp_path / name, 3, EIGHT_BITS, MEMORY) is None
        assert read_raster(tmp_path / name, 3, EIGHT_BITS, MEMORY) is None
    opened = note_results(monkeypatch, raster_rows, "open_dataset")
    enough = RGB.size * 24
    assert open_raster(tmp_path / "a.jp2", 3, EIGHT_BITS, enough) is None
    assert open_raster(tmp_path / "a.jp2", 3, EIGHT_BITS, enough - 1) is not None
    assert [dataset.closed for dataset in opened] == [True, False]
    whole, _ = read_raster(tmp_path / "a.jp2", 3, EIGHT_BITS, enough)
    assert np.array_equal(whole.permute(1, 2, 0), RGB)


def claiming(path: Path, size: tuple[int, int], tile: int) -> None:
    """A JPEG 2000 with other numbers in its headers."""
    jpeg_2000(path, RGB)
    content = bytearray(path.read_bytes())
    struct.pack_into(">II", content, content.index(b"ihdr") + 4, *reversed(size))
    start = content.index(b"\xff\x4f\xff\x51")
    struct.pack_into(">II", content, start + 8, *size)
    struct.pack_into(">II", content, start + 24, tile, tile)
    path.write_bytes(content)


def truncated(path: Path) -> None:
    jpeg_2000(path, RGB)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def described(path: Path, **changes: object) -> None:
    """A Zarr with other numbers in its description."""
    zarr(path, planes(RGB), (3, 32, 48))
    file = path / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def of_group(path: Path, name: str) -> None:
    path.mkdir()
    (path / name).write_text('{"zarr_format": 2}')


def bare(path: Path) -> None:
    path.write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n")


REFUSED = {
    "header alone": (bare, "not a readable image"),
    "wide": (lambda p: claiming(p, (20_000, 100), 512), "one side is more than 100 times"),
    "tiles of 2^31": (lambda p: claiming(p, (40_000, 40_000), 2**31 - 1), "allow more memory"),
    "16 bits": (lambda p: jpeg_2000(p, RGB.astype(np.uint16)), "3 channels of uint16: save it as"),
    "four bands": (lambda p: jpeg_2000(p, FOUR), "4 channels of uint8: save it as grey, RGB"),
    "two bands": (lambda p: jpeg_2000(p, FOUR[..., :2]), "2 channels of uint8: save it as grey"),
    "LAB": (lambda p: colours(p, 14), "its colours are neither a profile's nor sRGB"),
    "Zarr of (H, W, C)": (
        lambda p: zarr(p, RGB, (32, 48, 3)),
        "93 channels of uint8: .*; of Zarr, arrays of format 2 are read, .bands, rows, columns.",
    ),
    "Zarr's group": (lambda p: of_group(p, ".zgroup"), "a group's have names, as a/0; of Zarr"),
    "Zarr's format 3": (lambda p: of_group(p, "zarr.json"), "no array of format 2.*lines that"),
    "Zarr that runs code": (lambda p: described(p, compressor={"id": "pickle"}), "pickle"),
    "Zarr's huge chunks": (
        lambda p: described(p, chunks=[3, 2**20, 2**20]),
        "a tile takes|its tiles are|chunk",
    ),
    "Zarr's deep chunks": (lambda p: described(p, chunks=[1000, 32, 48]), "a tile takes 0.00143"),
    "Zarr's broken description": (lambda p: described(p, shape="all"), "; of Zarr"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_read_is_refused_in_a_line(name, tmp_path, capfd, caplog):
    write, message = REFUSED[name]
    write(tmp_path / "a")
    with pytest.raises(UnreadableImageError, match=message) as error:
        open_raster(tmp_path / "a", 3, EIGHT_BITS, MEMORY)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "a"))
    assert not capfd.readouterr().err
    assert not [record for record in caplog.records if record.levelno < logging.CRITICAL]


def bombs(path: Path, compressor: str) -> None:
    """Chunks that unpack to 64 MB."""
    zarr(path, planes(RGB), (3, 32, 48), compressor)
    content = getattr(imagecodecs, f"{compressor}_encode")(bytes(2**26))
    for file in path.glob("[0-9]*"):
        file.write_bytes(content)


BROKEN = {
    "truncated": truncated,
    "claims": lambda path: claiming(path, (30_000, 30_000), 512),
    "zlib": lambda path: bombs(path, "zlib"),
    "zstd": lambda path: bombs(path, "zstd"),
    "blosc": lambda path: bombs(path, "blosc"),
    "cut": lambda path: (
        zarr(path, planes(RGB), (3, 32, 48)),
        (path / "0.0.0").write_bytes(b"\0" * 9),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pixels_end_in_a_line_that_names_the_rows(name, tmp_path, capfd):
    BROKEN[name](tmp_path / "a")
    rows = open_raster(tmp_path / "a", 3, EIGHT_BITS, 2**26, small=True)
    with pytest.raises(UnreadableImageError, match="rows 0 to 92: ") as error:
        rows.read(0, 93)
    assert "\n" not in str(error.value)
    assert "See previous" not in str(error.value)
    assert isinstance(error.value.__cause__, ValueError)
    assert not capfd.readouterr().err


def test_too_many_pixels_are_not_read_whole(tmp_path):
    claiming(tmp_path / "a", (30_000, 20_000), 512)
    with pytest.raises(UnreadableImageError, match=r"30000x20000 .*160 million") as error:
        read_raster(tmp_path / "a", 3, EIGHT_BITS, 2**30)
    assert error.value.name == str(tmp_path / "a")


def test_a_jpeg_2000_of_one_tile_is_in_memory_packed(tmp_path, monkeypatch):
    """A band of it would fit, its bytes do not."""
    monkeypatch.setattr(tiff_rows, "MAX_PIXELS", 1000)
    noise = values("uint8", 3, (700, 700))
    jpeg_2000(tmp_path / "one", noise, tile=1024)
    jpeg_2000(tmp_path / "many", noise, tile=128)
    stored = (tmp_path / "one").stat().st_size
    with pytest.raises(UnreadableImageError, match=r"tile takes .*GiB"):
        open_raster(tmp_path / "one", 3, EIGHT_BITS, stored - 1)
    assert open_raster(tmp_path / "one", 3, EIGHT_BITS, stored) is not None
    # Whatever the memory, of too many pixels.
    for memory in (stored // 4, 2**30):
        assert open_raster(tmp_path / "many", 3, EIGHT_BITS, memory) is not None


def test_a_chunk_of_many_bands_is_in_memory_as_a_whole(tmp_path, monkeypatch):
    """Ten bands of two bytes, of which the image has three."""
    monkeypatch.setattr(tiff_rows, "MAX_PIXELS", 1000)
    zarr(tmp_path / "a", planes(values("int16", 3, SIZE)), (10, *SIZE))
    chunk = 10 * math.prod(SIZE) * 2
    assert open_raster(tmp_path / "a", 3, DEEP, chunk) is not None
    with pytest.raises(UnreadableImageError, match="a tile takes"):
        open_raster(tmp_path / "a", 3, DEEP, chunk - 1)
    with pytest.raises(UnreadableImageError, match="3 channels of int16, not 4 of uint8, "):
        open_raster(tmp_path / "a", 4, DEEP, chunk)


def box(kind: bytes, content: bytes) -> bytes:
    return (len(content) + 8).to_bytes(4, "big") + kind + content


def test_boxes_end_before_one_whose_size_is_not_stated():
    content = box(b"free", b"") + box(b"colr", b"abc")
    assert list(boxes_of(io.BytesIO(content))) == [(b"free", b""), (b"colr", b"abc")]
    for rest in (bytes(4) + b"jp2c" + bytes(20), b"\0\0\0\x09jp2"):
        assert len(list(boxes_of(io.BytesIO(content + rest)))) == 2


@pytest.mark.parametrize(
    ("colour", "profile"),
    [
        (b"\1\0\0" + bytes((0, 0, 0, 16)), None),
        (b"\1\0\0" + bytes((0, 0, 0, 17, 9)), None),
        (b"\2\0\0icc", b"icc"),
        (b"\3\0\0", b""),
        (b"\1\0\0" + bytes((1, 0, 0, 16)), ValueError),
        (b"\4\0\0" + bytes((0, 0, 0, 16)), ValueError),
        (b"", ValueError),
    ],
)
def test_colours_are_a_profile_or_a_known_number(colour, profile, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(box(b"jP  ", b"\r\n\x87\n") + box(b"jp2h", box(b"colr", colour)))
    if profile is ValueError:
        with pytest.raises(ValueError, match="neither a profile's nor sRGB"):
            find_profile(path)
    else:
        assert find_profile(path) == profile


def test_files_beside_the_image_are_not_read(tmp_path):
    """GDAL's own: they would state other colours, or a missing value."""
    jpeg_2000(tmp_path / "a.jp2", RGB, photometric="RGB")
    (tmp_path / "a.jp2.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><NoDataValue>7</NoDataValue>'
        "<ColorInterp>Alpha</ColorInterp></PAMRasterBand></PAMDataset>"
    )
    rows = open_raster(tmp_path / "a.jp2", 3, EIGHT_BITS, MEMORY)
    assert rows.dataset.nodata is None
    assert np.array_equal(rows.read(0, 93).permute(1, 2, 0), RGB)
    rows.close()


def test_without_rasterio_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    jpeg_2000(tmp_path / "a.jp2", RGB)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for read in (open_raster, read_raster):
        with pytest.raises(ConfigError, match="rasterio: pip install"):
            read(tmp_path / "a.jp2", 3, EIGHT_BITS, MEMORY)


def test_chunks_that_are_not_stored_are_the_fill_value(tmp_path):
    """As Zarr defines them, which leaves empty ones out."""
    zarr(tmp_path / "a", planes(RGB), (3, 32, 48))
    (tmp_path / "a/0.0.0").unlink()
    expected = RGB.copy()
    expected[:32, :48] = 0
    found, _ = read_raster(tmp_path / "a", 3, EIGHT_BITS, MEMORY)
    assert np.array_equal(found.permute(1, 2, 0), expected)
    shutil.rmtree(tmp_path / "a")
