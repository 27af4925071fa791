"""Files of arrays come back bit for bit, and what is broken or too large is refused in one line."""

import io
import re
import struct
import sys
import tarfile
import warnings
import zipfile
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import imagecodecs
import numpy as np
import OpenEXR
import pytest
import tifffile
import torch
from PIL import Image

from olvae.config import ConfigError
from olvae.data.hub import Items
from olvae.data.image import Photo, image_to_tensor
from olvae.data.packing import PackOptions, pack
from olvae.data.picture_folder import FolderSource
from olvae.data.pixels import arrays
from olvae.data.pixels.arrays import read_array
from olvae.data.pixels.size_and_range import AS_STORED, UNSTATED, PixelRange
from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import LoaderProcess
from tests.data.images import picture
from tests.data.pixels.files import exr, npy, npz, png, tiff, tiff_of_pages, values

U16, F32 = values("uint16"), values("float32")
BANDS = values("uint16", 13)
PLANES = np.moveaxis(BANDS, -1, 0)

EXACT: dict[str, tuple[bytes, np.ndarray]] = {
    **{
        f"{kind}.npy": (npy(values(kind)), values(kind))
        for kind in ("uint16", "int16", "float16", "float32")
    },
    **{
        f"{kind}.npz": (npz(values(kind)), values(kind))
        for kind in ("uint16", "int16", "float16", "float32")
    },
    "big-endian.npy": (npy(U16.astype(">u2")), U16),
    "one band.tif": (tiff(U16[..., :1]), U16[..., :1]),
    "flat.npy": (npy(U16[..., 0]), U16[..., :1]),
    "grey.png": (png(U16[..., :1]), U16[..., :1]),
    "colour.png": (png(U16), U16),
    "alpha.png": (png(values("uint16", 4)), values("uint16", 4)),
    "grey alpha.png": (png(values("uint16", 2)), values("uint16", 2)),
    "two pages.tif": (tiff_of_pages(PLANES[:2]), BANDS[..., :2]),
    "signed.tif": (tiff(values("int16", 1)[..., 0]), values("int16", 1)),
    "colour.tif": (tiff(U16, "rgb"), U16),
    "planes3.tif": (tiff(np.moveaxis(U16, -1, 0), "rgb"), U16),
    "lzw.tif": (tiff(U16, "rgb", compression="lzw", tile=(16, 16)), U16),
    "float.tif": (tiff(F32, "rgb", compression="deflate", predictor=3), F32),
    "half.tif": (tiff(values("float16"), "rgb"), values("float16")),
    "big.tiff": (tiff(U16[..., 0], bigtiff=True), U16[..., :1]),
    "big-endian.tif": (tiff(U16, "rgb", byteorder=">"), U16),
    "pixels13.tif": (tiff(BANDS, planarconfig="contig"), BANDS),
    "planes13.tif": (tiff(PLANES, planarconfig="separate"), BANDS),
    "pages13.tif": (tiff(PLANES), BANDS),
    "imagej13.tif": (tiff(PLANES, imagej=True), BANDS),
    "written one by one.tif": (tiff_of_pages(PLANES), BANDS),
}

NARROW = {
    # tifffile names an axis of length 1 as it likes: YQX, YXQ, QYXQ.
    "one column.tif": (tiff(U16[:, :1, :1]), U16[:, :1, :1]),
    "one row.tif": (tiff(U16[:1, :, :1]), U16[:1, :, :1]),
    "four axes.tif": (tiff(U16[None, ..., :1]), U16[..., :1]),
    "named axes.tif": (tiff(BANDS, planarconfig="contig", metadata={"axes": "YXC"}), BANDS),
    "column of pages.tif": (tiff(PLANES[..., :1], metadata=None), BANDS[:, :1]),
    "row of pages.tif": (tiff(PLANES[:, :1]), BANDS[:1]),
}

PAGES = {
    "pages13.tif": 13,
    "written one by one.tif": 13,
    "two pages.tif": 2,
    "column of pages.tif": 13,
    "row of pages.tif": 13,
}

WIDE = PixelRange.from_node([-40_000, 70_000])


@pytest.mark.parametrize("name", [*EXACT, *NARROW])
def test_read_array_gives_files_back_bit_for_bit(name, tmp_path):
    content, expected = {**EXACT, **NARROW}[name]
    (tmp_path / name).write_bytes(content)
    for source in (content, tmp_path / name):
        array, nodata, pages = read_array(source, expected.shape[2])
        assert (nodata, pages) == (None, PAGES.get(name, 0))
        assert array.dtype.newbyteorder("=") == expected.dtype
        np.testing.assert_array_equal(array, expected)
    tensor = image_to_tensor(Photo(tmp_path / name, name, expected.shape[2], WIDE).read())
    assert str(tensor.dtype) == f"torch.{'uint16' if expected.dtype == np.uint16 else 'float32'}"
    # float32 holds all of these exactly
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize(
    "names",
    [
        "RGB",
        "RGBA",
        "Z",
        ("B01", "B02"),
        "RGBZ",
        ("G", "B", "GB", "Z"),
        ("a.R", "a.G", "a.A", "b.B", "b.N"),
    ],
)
def test_read_array_takes_exr_layers_in_order(kind, names, tmp_path):
    planes = {name: values(kind, 1, seed=i)[..., 0] for i, name in enumerate(names)}
    array = read_array(exr(dict(planes), tmp_path / "a.exr"), len(names)).array
    assert array.dtype == kind
    np.testing.assert_array_equal(array, np.stack([*planes.values()], axis=-1))


def test_a_tiff_whose_zero_is_white_is_refused():
    """Pillow inverts those of 8 bits.

    Stored values, as X-rays', would be the negative of what is written later.
    """
    with pytest.raises(ValueError, match="MINISWHITE"):
        read_array(tiff(U16[..., :1], "miniswhite"), 1)


def claims(entries: dict[int, int]) -> bytes:
    """A grey 16-bit TIFF of one strip whose header says what these tags say."""
    tags = {
        256: 100,
        257: 100,
        258: 16,
        259: 1,
        262: 1,
        273: 8,
        277: 1,
        278: 100,
        279: 20_000,
    } | entries
    directory = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + directory + bytes(4)


def two_sizes() -> bytes:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(U16[..., 0])
        writer.write(U16[:10, :, 0])
    return stream.getvalue()


def long_header() -> bytes:
    """An .npz whose array's header claims 4 GiB, and has 256 KiB of them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x02\0\xff\xff\xff\xff" + b" " * 2**18)
    return stream.getvalue()


REFUSED = {
    "long header.npz": (long_header(), "its header claims to have 4294967295 bytes"),
    "a terabyte.tif": (
        claims({256: 10**6, 257: 10**6, 277: 3, 278: 10**6}),
        "1000000x1000000 pixels",
    ),
    "many bands.tif": (
        claims({256: 12_000, 257: 12_000, 277: 13, 278: 12_000}),
        "values, more than 256 Mi",
    ),
    "truncated.tif": (tiff(U16, "rgb")[:2000], "ends before its pixels"),
    "truncated by a byte.tif": (tiff(U16, "rgb")[:-1], "ends before its pixels"),
    "truncated lzw.tif": (tiff(U16, "rgb", compression="lzw")[:1500], "ends before its pixels"),
    "two sizes.tif": (two_sizes(), "holds 2 images"),
    "smaller ones.tif": (  # the tag 65000 becomes 330
        tiff(U16, "rgb", extratags=[(65000, 4, 3000, [8] * 3000, False)]).replace(
            b"\xe8\xfd\4\0", b"\x4a\1\4\0"
        ),
        "it names 3000 smaller images",
    ),
    # Such pages are no planes of one image, though their last axis has the length 1.
    "pages of pages.tif": (
        tiff(U16[None, :2, ..., None]),
        r"its axes are \w+Q: expected one image",
    ),
    "pages of colour.tif": (tiff(np.stack((U16, U16)), "rgb"), r"its axes are \w+YXS"),
    "doubles.npy": (npy(F32.astype(float)), "got float64"),
    "claims.npy": (npy(U16).replace(b"(20, 24, 3)", b"(9999,9999,3)"), "values, more than 256 Mi"),
    "cut.npy": (npy(U16)[:500], "expected 2880 bytes"),
    "two arrays.npz": (npz(U16, more=U16), "expected one array in it, got 2"),
    "cut.npz": (npz(U16)[:500], "not a zip file"),
    "cut.png": (png(U16)[:500], "."),
    "eight bits.png": (png(U16.astype(np.uint8)), "8 bits per channel"),
    "pickle.npy": (npy(np.array([[{}]], dtype=object)), "got object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_arrays_are_refused_before_memory_is_taken(name):
    content, message = REFUSED[name]
    with pytest.raises(UnreadableImageError, match=message) as error:
        Photo(content, name, 3 if "bands" not in name else 13, PixelRange.from_node([0, 65535]))
    assert "\n" not in str(error.value)


def test_a_header_is_checked_before_pixels_are_decoded(monkeypatch, tmp_path):
    """Height before width, and so many channels as the file has."""
    deep = {name: values("float32", 1)[..., 0] for name in "RGB"}
    layers = exr(deep, tmp_path / "a.exr")
    monkeypatch.setattr(imagecodecs, "png_decode", None)
    opened = []

    def header_alone(*args, **options):
        opened.append(options)
        return known(*args, **options)

    known = OpenEXR.File
    monkeypatch.setattr(OpenEXR, "File", header_alone)
    shape = r"\(H, W, 12\), got {} of shape \({}\)"
    for content, found in ((png(U16), "20, 24, 3"), (png(U16[..., :1]), "20, 24, 1")):
        with pytest.raises(ValueError, match=shape.format("uint16", found)):
            read_array(content, 12)
    with pytest.raises(ValueError, match=shape.format("float32", "20, 24, 3")):
        read_array(layers, 12)
    assert opened == [{"separate_channels": True, "header_only": True}]
    # Both sides to their last byte, and colours that have no 16 bits.
    for place, byte, claimed in (
        (16, 1, "16777240x20 pi"),
        (20, 1, "24x16777236 pi"),
        (25, 3, "0\\)"),
    ):
        content = bytearray(png(U16))
        content[place] = byte
        with pytest.raises(ValueError, match=claimed):
            read_array(bytes(content))


def test_the_limits_are_the_last_that_are_read(monkeypatch):
    monkeypatch.setattr(arrays, "MAX_VALUES", U16.size)
    monkeypatch.setattr(arrays, "MAX_HEADER", 118)
    monkeypatch.setattr(arrays, "MAX_SMALLER", 2)
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(U16, photometric="rgb", subifds=2)
        for _ in range(2):
            writer.write(U16[::2, ::2], photometric="rgb", subfiletype=1)
    for content in (npy(U16), stream.getvalue()):
        np.testing.assert_array_equal(read_array(content, 3).array, U16)
    for name in ("MAX_SMALLER", "MAX_HEADER", "MAX_VALUES"):
        monkeypatch.setattr(arrays, name, getattr(arrays, name) - 1)
    with pytest.raises(ValueError, match="it names 2 smaller images of itself, more than 1"):
        read_array(stream.getvalue())
    with pytest.raises(ValueError, match="claims to have 118 bytes, more than 117"):
        read_array(npy(U16))
    monkeypatch.setattr(arrays, "MAX_HEADER", 118)
    with pytest.raises(ValueError, match="its header claims 1440 values"):
        read_array(npy(U16))


@pytest.mark.parametrize(
    ("channels", "wanted"),
    [(0, "(H, W, channels) or (H, W)"), (1, "(H, W, 1) or (H, W)"), (2, "(H, W, 2)")],
)
def test_the_shape_that_is_wanted_is_in_the_line(channels, wanted):
    with pytest.raises(ValueError, match=re.escape(f"of shape {wanted}, got float64 of shape")):
        read_array(npy(F32.astype(float)), channels)
    with pytest.raises(ValueError, match=r"^2001x20 pixels: one side"):
        read_array(npy(np.zeros((20, 2001, max(channels, 1)), np.uint8)), channels)


@pytest.mark.parametrize("kinds", [(1,), (4,), (5, 1)])
def test_a_deep_tiff_with_smaller_copies_or_masks_is_one_image(kinds):
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(U16, photometric="rgb", metadata=None)
        for kind in kinds:
            mask = np.ones((20, 24), dtype=bool)
            other = (mask, "mask") if kind & 4 else (U16[::2, ::2], "rgb")
            writer.write(other[0], photometric=other[1], subfiletype=kind, metadata=None)
    np.testing.assert_array_equal(read_array(stream.getvalue()).array, U16)


def test_an_exr_is_one_whole_part_of_channels_of_one_size(tmp_path, monkeypatch):
    plane = values("float32", 1)[..., 0]
    path = tmp_path / "a.exr"
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    window = {"dataWindow": (np.int32([3, 5]), np.int32([26, 24]))}
    OpenEXR.File({**header, **window}, {"Z": plane.copy()}).write(str(path))
    np.testing.assert_array_equal(read_array(path).array[..., 0], plane)
    with pytest.raises(ValueError, match="the file ends before its pixels"):
        read_array(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="got uint32"):
        read_array(exr({"Z": plane.astype(np.uint32)}, path))
    parts = [OpenEXR.Part({**header}, {"Z": plane.copy()}, name=name) for name in "ab"]
    OpenEXR.File(parts).write(str(path))
    with pytest.raises(ValueError, match="it has 2 parts"):
        read_array(path)

    # The library writes no channels at a fraction of the size.
    content = exr({"Y": plane, "Z": plane}, path)
    monkeypatch.setattr(
        OpenEXR.File, "channels", lambda _: {"Y": Plane(plane), "Z": Plane(plane[1:])}
    )
    with pytest.raises(ValueError, match="its channels have several sizes"):
        read_array(content)


class Plane(NamedTuple):
    """A channel, as OpenEXR gives it."""

    pixels: np.ndarray


def test_wrong_channels_and_missing_ranges_are_refused():
    with pytest.raises(
        UnreadableImageError,
        match=r"\(H, W, 12\).* \(20, 24, 13\).*`channels`",
    ):
        Photo(EXACT["pixels13.tif"][0], "a.tif", 12, PixelRange.from_node([0, 65535]))
    for name in ("pixels13.tif", "uint16.npy"):
        content, array = EXACT[name]
        with pytest.raises(UnreadableImageError, match=UNSTATED):
            Photo(content, name, array.shape[2])


def test_a_missing_value_beyond_float32_is_the_largest_that_it_has():
    """As GDAL writes a double's in a raster of float32; no warning of an overflow."""
    array = values("float32", 1)
    array[0, 0] = np.finfo(np.float32).min
    content = tiff(array[..., 0], extratags=[(42113, "s", 0, "-1.7976931348623157e+308", True)])
    assert read_array(content).nodata == -1.7976931348623157e308
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImageError, match="no data"):
            Photo(content, "a.tif", 1, WIDE)
        with pytest.raises(UnreadableImageError, match="no data"):
            Photo(
                npy(array),
                "a.npy",
                1,
                replace(WIDE, outside="clip", nodata=-1.7976931348623157e308),
            )
        Photo(content, "a.tif", 1, AS_STORED).missing(array)


Z_STACK = tiff(PLANES, imagej=True, metadata={"axes": "ZYX"})


@pytest.mark.parametrize(
    ("content", "refused", "message"),
    [
        (Z_STACK, (0, 1, 3), r"a stack of 13 slices \(Z in its axes\): write each slice to a file"),
        (
            tiff(PLANES, ome=True, metadata={"axes": "TYX"}),
            (0, 1, 3),
            r"13 slices \(T in its axes\): .* if they are channels, set `channels` to 13",
        ),
        (tiff(PLANES), (1, 3), "^13 pages, perhaps slices of a stack: write each slice to a file"),
        (tiff(PLANES, imagej=True, metadata={"axes": "CYX"}), (1,), "is `channels` right"),
        (
            tiff(np.stack((PLANES, PLANES)), imagej=True, metadata={"axes": "ZCYX"}),
            (0, 1, 13),
            "its axes are ZCYX: .*write each slice of a stack to a file of its own",
        ),
    ],
)
def test_a_stack_of_slices_is_refused_unless_channels_are_stated(content, refused, message):
    """As many channels as pages say that they are bands; as any of a file without such words."""
    for channels in (0, 1, 3, 13):
        if channels in refused:
            with pytest.raises(ValueError, match=message):
                read_array(content, channels)
        elif channels in (0, 13):
            np.testing.assert_array_equal(read_array(content, channels).array, BANDS)


@pytest.mark.parametrize(
    "name", ["colour.png", "grey.png", "colour.tif", "planes3.tif", "float.tif", "uint16.npy"]
)
def test_more_than_eight_bits_need_a_range(name, tmp_path):
    """Of any kind of file, from a path or bytes."""
    (tmp_path / name).write_bytes(EXACT[name][0])
    for content in (EXACT[name][0], tmp_path / name):
        for channels in (1, 3) if name not in ("uint16.npy", "float.tif") else (3,):
            with pytest.raises(
                UnreadableImageError, match=r"data\.params\.range.*`olvae data range"
            ):
                Photo(content, name, channels)


def test_a_picture_of_sixteen_bits_among_photographs_is_left_out(tmp_path):
    (tmp_path / "deep.png").write_bytes(EXACT["colour.png"][0])
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    source = FolderSource(tmp_path, 16, 1, val_root=tmp_path, max_unreadable=0.3)
    samples = list(source.once(LoaderProcess()))
    assert [sample.image is None for sample in samples] == [False, False, False, True]
    assert UNSTATED in samples[3].errors[0].reason
    assert all(
        sample.image is not None for sample in islice(source.stream(0, 0, LoaderProcess()), 8)
    )


def test_pictures_in_memory_of_sixteen_bits_need_a_range():
    for item in (Image.fromarray(U16[..., 0]), U16[..., 0]):
        with pytest.raises(UnreadableImageError, match=UNSTATED):
            Items([item], 1)[0]


def test_no_array_is_no_known_format():
    for content in (b"", b"no array", png(U16.astype(np.uint8))):
        with pytest.raises(ValueError, match="8 bits per channel, or no known format of arrays"):
            read_array(content)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ConfigError, match="imagecodecs: pip install"):
        read_array(EXACT["colour.png"][0])


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", [*EXACT, "half.exr"])
def test_a_pack_keeps_the_bytes_of_deep_arrays(name, root, tmp_path):
    """And shards are trained on with the values of the file."""
    content = (
        exr({"RGB": values("float16")}, tmp_path / "half.exr")
        if name == "half.exr"
        else EXACT[name][0]
    )
    for number in range(2):
        (root / f"{number}{name}").write_bytes(content)
    channels = 3 if name == "half.exr" else EXACT[name][1].shape[2]
    pack(str(root), tmp_path / "shards", PackOptions(shard_size=1, channels=channels))
    with tarfile.open(tmp_path / "shards" / "000000.tar") as shard:
        assert content in [shard.extractfile(member).read() for member in shard]
    source = WebDatasetSource(
        str(tmp_path / "shards"), 20, 1, channels=channels, range=[-40_000, 70_000]
    )
    (sample,) = source.once(LoaderProcess())
    expected = read_array(content).array[:, 2:22].astype(np.float32)  # the centre
    np.testing.assert_array_equal(sample.image.float().permute(1, 2, 0).numpy(), expected)
    assert next(source.stream(0, 0, LoaderProcess())).image.dtype == sample.image.dtype


def test_batches_of_arrays_keep_their_kind_and_do_not_mix(tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", U16)
    common = {"batch_size": 2, "channels": 3, "range": [-40_000, 70_000]}
    batch = next(
        iter(FolderSource(tmp_path, 20, num_workers=1, val_root=tmp_path, **common).val_loader())
    )
    assert batch["image"].dtype == torch.uint16
    np.testing.assert_array_equal(batch["image"][1].permute(1, 2, 0), U16[:, 2:22])
    np.save(tmp_path / "1.npy", F32)
    with pytest.raises(ValueError, match=r"0\.npy is uint16, 1\.npy is float32"):
        next(iter(FolderSource(tmp_path, 20, val_root=tmp_path, **common).val_loader()))
