import io
import tracemalloc
import zlib
from contextlib import nullcontext
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from olvae.data.image import image_to_tensor, read_picture
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes.georeference import Georeference, byte_gaps, filled_picture
from olvae.export import tiff_rows as module
from olvae.export.tiff_rows import ImageRows, open_rows
from tests.data.pixels.files import tiff, values
from tests.export.rasters import note_results

SIZE = (93, 150)
RGB = values("uint8", 3, SIZE)
U16 = values("uint16", 3, SIZE)
BANDS = np.moveaxis(values("float32", 13, SIZE), -1, 0)
WIDE = PixelRange.from_node([-40_000, 70_000])
GREY_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def with_a_smaller_copy() -> bytes:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        file.write(RGB, photometric="rgb", tile=(32, 48))
        file.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    return stream.getvalue()


FILES = {
    "smaller copy": (with_a_smaller_copy(), 3),
    "tiles": (tiff(RGB, "rgb", tile=(32, 48)), 3),
    "packed tiles": (tiff(RGB, "rgb", tile=(48, 32), compression="lzw", predictor=2), 3),
    "packed strips": (tiff(RGB, "rgb", rowsperstrip=20, compression="zlib"), 3),
    "plain": (tiff(RGB, "rgb"), 3),
    "planes": (tiff(np.moveaxis(RGB, -1, 0), "rgb", planarconfig="separate"), 3),
    "tiles of planes": (
        tiff(np.moveaxis(RGB, -1, 0), "rgb", planarconfig="separate", tile=(32, 32)),
        3,
    ),
    "grey": (tiff(RGB[..., 0], tile=(32, 48)), 3),
    "grey as grey": (tiff(RGB[..., 0], tile=(32, 48)), 1),
    "unknown profile": (tiff(RGB, "rgb", tile=(32, 48), iccprofile=GREY_PROFILE), 3),
    "alpha": (
        tiff(values("uint8", 4, SIZE), "rgb", tile=(32, 48), extrasamples=["unassalpha"]),
        3,
    ),
    "16 bits": (tiff(U16, "rgb", byteorder=">"), 3),
    "13 bands": (tiff(BANDS, planarconfig="separate", tile=(32, 32), compression="zstd"), 13),
    "13 bands together": (
        tiff(np.ascontiguousarray(np.moveaxis(BANDS, 0, -1)), planarconfig="contig", tile=(16, 16)),
        13,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_those_of_the_whole_picture(name, tmp_path):
    content, channels = FILES[name]
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    pixel_range = WIDE if name[:2] in ("16", "13") else EIGHT_BITS
    whole = image_to_tensor(read_picture(path, channels, pixel_range))
    rows = open_rows(path, channels, pixel_range, 300_000)
    assert rows is not None
    assert rows.shape == whole.shape
    for start, stop in ((0, 93), (0, 1), (31, 33), (5, 88), (92, 93), (0, 64)):
        assert torch.equal(rows.read(start, stop), whole[:, start:stop])
    assert rows.band.cache_info().maxsize == 2
    rows.close()
    assert rows.tiff.filehandle.closed


@pytest.mark.parametrize("kind", ["8 bits", "real values"])
def test_missing_values_of_a_scene_are_those_of_the_whole_picture(kind, tmp_path):
    path = tmp_path / "a.tif"
    if kind == "8 bits":
        array, pixel_range, declared = RGB.copy(), EIGHT_BITS, "7"
    else:
        array, pixel_range, declared = U16.astype(np.int16), WIDE, "-5"
    array[10:50, 20:30] = int(declared)
    path.write_bytes(tiff(array, "rgb", tile=(32, 48), extratags=[(42113, "s", 0, declared, True)]))
    rows = open_rows(path, 3, pixel_range, 300_000)
    assert rows.nodata == (None if kind == "8 bits" else -5.0)
    rows.georeference = Georeference((), float(declared))
    image, gaps = rows.read_with_gaps(5, 93)
    if kind == "8 bits":
        expected = torch.from_numpy(array[5:]).movedim(-1, 0)
        missing = byte_gaps(expected, 7.0)
    else:
        expected, missing = filled_picture(array[5:], rows.georeference, pixel_range)
    assert torch.equal(image, expected)
    assert torch.equal(gaps.missing, missing.missing)
    assert torch.equal(gaps.values, missing.values)
    assert gaps.missing.sum() >= 3 * 40 * 10
    rows.close()


@pytest.mark.parametrize(("array", "pixel_range"), [(RGB, EIGHT_BITS), (U16, WIDE)])
def test_a_row_of_tiles_fits_the_memory_or_is_refused(array, pixel_range, tmp_path, monkeypatch):
    """Four tiles of 32x48 for 150 columns."""
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(array, "rgb", tile=(32, 48)))
    row = 4 * 32 * 48 * 3 * array.itemsize
    open_rows(path, 3, pixel_range, row).close()
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match=r"tiles are 48x32 pixels, .* \d\.\d+e-05 GiB"):
        open_rows(path, 3, pixel_range, row - 1)


@pytest.mark.parametrize(
    "content",
    [
        tiff(np.zeros((93, 150), np.complex64)),
        tiff(U16[..., :2], planarconfig="contig", extrasamples=["unspecified"]),
        tiff(U16[..., 0], "miniswhite"),
    ],
    ids=["dtype", "channels", "photometric"],
)
def test_values_of_other_kinds_are_not_read_by_rows(content, tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match=r"[12] channels of \w+, MINIS\w+$"):
        open_rows(path, 1, WIDE, 10**9)


def test_packed_tiles_need_imagecodecs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "a.tif"
    path.write_bytes(FILES["tiles"][0])
    open_rows(path, 3, EIGHT_BITS, 10**9).close()
    path.write_bytes(FILES["packed tiles"][0])
    with pytest.raises(UnreadableImageError, match="pip install imagecodecs"):
        open_rows(path, 3, EIGHT_BITS, 10**9)


def test_bands_and_files_are_the_subclasss():
    rows = ImageRows("a", (2, 2), 3, EIGHT_BITS)
    with pytest.raises(NotImplementedError):
        rows.read_band(0)
    with pytest.raises(NotImplementedError):
        rows.close()


def test_jpeg_tiles_are_read(tmp_path):
    smooth = np.asarray(Image.fromarray(RGB[:8, :12]).resize((150, 93)))
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(smooth, "ycbcr", tile=(32, 48), compression="jpeg"))
    rows = open_rows(path, 3, EIGHT_BITS, 300_000)
    whole = image_to_tensor(read_picture(path))
    assert (rows.read(0, 93).int() - whole.int()).abs().max() <= 4  # two decoders
    rows.close()


def test_small_images_and_other_files_are_for_the_usual_reader(tmp_path):
    for name, content in (
        ("a.tif", tiff(RGB, "rgb", tile=(32, 48))),
        ("broken.tif", b"II*\0" + bytes(9)),
    ):
        (tmp_path / name).write_bytes(content)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for name in ("a.tif", "broken.tif", "a.png", "missing.tif"):
        assert open_rows(tmp_path / name, 3, EIGHT_BITS, RGB.size * 24) is None


@pytest.mark.parametrize(
    ("content", "channels", "most", "rows"),
    [
        (tiff(RGB, "rgb", tile=(32, 48)), 3, 10**9, True),
        # Smaller, or not to be read by rows, with too many pixels for the usual reader or not.
        (tiff(RGB, "rgb"), 3, 10**9, False),
        (tiff(np.stack((RGB, RGB)), "rgb", tile=(32, 48)), 3, 10**9, False),
        (tiff(np.stack((RGB, RGB)), "rgb", tile=(32, 48)), 3, 1000, False),
        # As many pixels as there may be.
        (tiff(RGB, "rgb"), 3, 93 * 150, False),
        (tiff(np.stack((RGB, RGB)), "rgb", tile=(32, 48)), 3, 93 * 150, False),
    ],
    ids=["rows", "small", "two", "two large", "small at the limit", "two at the limit"],
)
def test_a_file_that_is_not_read_by_rows_is_closed(
    content, channels, most, rows, tmp_path, monkeypatch, request
):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    opened = note_results(monkeypatch, tifffile, "TiffFile")
    monkeypatch.setattr(module, "MAX_PIXELS", most)
    memory = 10**9 if "small" in request.node.name else 300_000
    with nullcontext() if most > 1000 else pytest.raises(UnreadableImageError):
        assert (open_rows(path, channels, EIGHT_BITS, memory) is not None) == rows
    assert [tiff.filehandle.closed for tiff in opened] == [not rows]


def claiming(**tags: int) -> bytes:
    """A file of tiles, packed, with other numbers in its header."""
    path = Path("a.tif")
    path.write_bytes(tiff(RGB, "rgb", tile=(32, 48), compression="zlib"))
    with tifffile.TiffFile(path, mode="r+b") as file:
        for name, value in tags.items():
            file.pages.first.tags[name].overwrite(value)
    return path.read_bytes()


def of_tiles(tile: bytes, compression: str) -> bytes:
    """A file whose tiles are these bytes."""
    path = Path("a.tif")
    tifffile.imwrite(
        path,
        iter([tile] * 6),
        shape=(64, 144, 3),
        dtype=np.uint8,
        tile=(32, 48),
        photometric="rgb",
        compression=compression,
    )
    return path.read_bytes()


HOSTILE = {
    "claims": lambda: claiming(ImageWidth=30_000, ImageLength=30_000),
    "tiles of one pixel": lambda: claiming(TileWidth=1, TileLength=1),
    "tiles of 2^31": lambda: claiming(TileWidth=2**31, TileLength=2**31),
    "truncated": lambda: claiming()[:-9000],
    "without the last byte": lambda: claiming()[:-1],
    "turned": lambda: tiff(RGB, "rgb", tile=(32, 48), extratags=[(274, "H", 1, 6, True)]),
    "two": lambda: tiff(np.stack((RGB, RGB)), "rgb", tile=(32, 48)),
    "wide": lambda: tiff(np.zeros((3, 400, 3), np.uint8), "rgb"),
    "plain and cut off": lambda: tiff(RGB, "rgb")[:-1],
    "16 bits": lambda: tiff(U16, "rgb"),
    "two channels": lambda: tiff(RGB[..., :2], planarconfig="contig", extrasamples=["unspecified"]),
    "volume": lambda: tiff(
        np.zeros((16, 32, 48, 3), np.uint8), "rgb", tile=(16, 32, 48), volumetric=True
    ),
    "webp": lambda: tiff(RGB, "rgb", tile=(32, 48), compression="webp"),
}
REFUSED = {
    "claims": "the file ends before its pixels",
    "tiles of one pixel": "the file ends before its pixels",
    "tiles of 2^31": "a row of them takes 1.29e+10 GiB: allow more memory",
    "truncated": "the file ends before its pixels",
    "without the last byte": "the file ends before its pixels",
    "turned": "save it with orientation 1",
    "two": "it holds 2 images, not one",
    "wide": "400x3 pixels: one side is more than 100 times the other",
    "plain and cut off": "the file ends before its pixels",
    "16 bits": "3 channels of uint16, RGB: save it as grey",
    "two channels": "2 channels of uint8, MINISBLACK: save it as grey",
    "volume": "it is a volume",
    "webp": "its compression is WEBP: save it with none, LZW, JPEG, deflate",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_read_by_rows(name, tmp_path, monkeypatch):
    """The usual reader takes it, unless it is too large for that: then the reason is named."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.tif"
    path.write_bytes(HOSTILE[name]())
    if name != "claims":
        assert open_rows(path, 3, EIGHT_BITS, 300_000) is None
        monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    with pytest.raises(UnreadableImageError) as error:
        open_rows(path, 3, EIGHT_BITS, 10**9)
    assert error.value.name == str(path)
    assert REFUSED[name] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ("zlib", "in its rows 0 to 39"),
        ("zstd", "in its rows 0 to 39"),
        ("jpeg", "a tile's header claims 1500x1500 pixels"),
        ("jpeg, high", "a tile's header claims 40x40 pixels"),
        ("none", "one of its tiles has more bytes"),
    ],
)
def test_a_tile_takes_no_more_memory_than_its_pixels(compression, message, tmp_path, monkeypatch):
    """Each would unpack to 7 MB."""
    monkeypatch.chdir(tmp_path)
    large = np.zeros((1500, 1500, 3), np.uint8)
    tile = {
        "zlib": lambda: zlib.compress(large, 9),
        "zstd": lambda: imagecodecs.zstd_encode(large),
        "jpeg": lambda: imagecodecs.jpeg_encode(large)[:20_000],
        "jpeg, high": lambda: imagecodecs.jpeg_encode(large[:40, :40].copy()),
        "none": lambda: bytes(60_000),
    }[compression]()
    path = tmp_path / "a.tif"
    content = of_tiles(tile, "zlib" if compression == "none" else compression.partition(",")[0])
    path.write_bytes(content)
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    tracemalloc.start()
    with pytest.raises(UnreadableImageError, match=message) as error:
        open_rows(path, 3, EIGHT_BITS, 10**9).read(0, 40)
    assert "\n" not in str(error.value)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(("size", "taken"), [(2 * 32 * 48 * 3 + 2**14, True), (25_601, False)])
def test_a_packed_tile_may_have_twice_its_bytes_and_16_kib(size, taken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.tif"
    path.write_bytes(of_tiles(bytes(size), "zlib"))
    rows = open_rows(path, 3, EIGHT_BITS, 100_000)
    assert (rows is not None) == taken
