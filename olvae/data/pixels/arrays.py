"""Read pixels that Pillow would cut to 8 bits or refuse: 16-bit PNG, TIFF, EXR, .npy and .npz."""

import io
import math
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from olvae.config import import_extra
from olvae.data.pixels.size_and_range import Array, check_size

ARRAY_DTYPES = ("uint8", "uint16", "int16", "float16", "float32")
# Largest number of values in an array, all channels: 1 GiB in float32.
MAX_VALUES = 2**28
# Largest header of a NumPy array in bytes; version 1 has two bytes for its length.
MAX_HEADER = 2**16
# Largest number of a pyramid's smaller images, of all pages together; each is read.
MAX_SMALLER = 1000

# GDAL's tag of the value that stands for a missing one, a text.
NODATA = 42113

# Axes that the metadata of ImageJ and OME give to slices: in depth, in time.
SLICE_AXES = ("Z", "T")

PNG = b"\x89PNG\r\n\x1a\n"
# Usual extensions by the first bytes; TIFF is little- or big-endian, classic or BigTIFF.
MAGIC = {
    b"\x93NUMPY": ".npy",
    b"PK\x03\x04": ".npz",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"II+\0": ".tif",
    b"MM\0+": ".tif",
    b"v/1\x01": ".exr",
}


class Pixels(NamedTuple):
    """An array (H, W, C) of the file's dtype, with what the file says about it."""

    array: Array
    nodata: float | None = None  # the value that stands for a missing one
    pages: int = 0  # of a TIFF, if they became the channels


def array_suffix(content: Path | bytes) -> str | None:
    """Find the usual extension of a file of an array, by its first bytes; None if Pillow reads it.

    Pillow reads PNG of 8 bits; for a TIFF the caller has to find out. Raises OSError.
    """
    if isinstance(content, Path):
        with content.open("rb") as file:
            start = file.read(26)
    else:
        start = content[:26]
    if start.startswith(PNG):
        # Byte 24 is the header's number of bits.
        return ".png" if start[24:25] == b"\x10" else None
    for magic, suffix in MAGIC.items():
        if start.startswith(magic):
            return suffix
    return None


def read_array(content: Path | bytes, channels: int = 0) -> Pixels:
    """Read a file of an array, known by its first bytes, after a check of its size and type.

    ``channels`` of 0 are any.

    Raises ValueError, OSError, a library's own errors: it is broken, or not such a file.
    ConfigError: a library is missing.
    """
    suffix = array_suffix(content)
    if suffix is None:
        raise ValueError("8 bits per channel, or no known format of arrays")
    stream: Any = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
    with stream as file:
        array, nodata, pages = READERS[suffix](file, partial(_check, channels))
    if array.ndim == 2:
        array = array[..., None]
    _check(channels, array.shape, array.dtype)
    return Pixels(array, nodata, pages)


def _check(channels: int, shape: Sequence[int], dtype: Any, pages: str = "") -> None:
    """Check an array: (H, W) or (H, W, C), a known type, and no larger than memory allows.

    ``pages``: the axis of a TIFF's pages that would become the channels. ``channels`` of their
    number says that they are; slices by the file's own words (Z, T) are none else.

    Raises ValueError otherwise.
    """
    dtype = np.dtype(dtype)
    wanted = f"(H, W, {channels or 'channels'})"
    if channels <= 1:
        wanted += " or (H, W)"
    if dtype.name not in ARRAY_DTYPES:
        raise ValueError(
            f"expected {', '.join(ARRAY_DTYPES)} of shape {wanted}, "
            f"got {dtype} of shape {tuple(shape)}"
        )
    found = shape[2] if len(shape) == 3 else 1
    if pages and channels != found and (channels or pages in SLICE_AXES):
        what = f"a stack of {found} slices ({pages} in its axes)"
        if pages not in SLICE_AXES:
            what = f"{found} pages, perhaps slices of a stack"
        raise ValueError(
            f"{what}: write each slice to a file of its own; if they are channels, set `channels` "
            f"to {found}"
        )
    if len(shape) not in (2, 3) or 0 in shape or (channels and found != channels):
        raise ValueError(
            f"expected shape {wanted}, got {dtype} of shape {tuple(shape)}: is `channels` right?"
        )
    check_size(shape[1], shape[0])
    values = math.prod(shape)
    if values > MAX_VALUES:
        raise ValueError(
            f"its header claims {values} values, more than {MAX_VALUES // 2**20} Mi: "
            "cut it into tiles; a TIFF's are read if the data are scenes:FOLDER"
        )


# Called with shape and dtype as the header states them, before the pixels are read, and of a TIFF
# with the axis of its pages.
Check = Callable[..., None]


def _npy(file: BinaryIO, check: Check) -> Pixels:
    reading: Any = np.lib.format
    version = reading.read_magic(file)
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header claims to have {length} bytes, more than {MAX_HEADER}")
    file.seek(0)
    reading.read_magic(file)
    header = reading.read_array_header_1_0 if version == (1, 0) else reading.read_array_header_2_0
    shape, _, dtype = header(file)
    check(shape, dtype)
    file.seek(0)
    return Pixels(reading.read_array(file, allow_pickle=False))


def _npz(file: BinaryIO, check: Check) -> Pixels:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(names) != 1:
            raise ValueError(f"expected one array in it, got {len(names)}: {', '.join(names[:3])}")
        with archive.open(names[0]) as stored:
            return _npy(stored, check)  # type: ignore[arg-type]


def _png(file: BinaryIO, check: Check) -> Pixels:
    from_bytes = import_extra("imagecodecs", "imagecodecs", "reading this kind of file").png_decode
    # The header: width, height, bits, and the colour type, which has so many samples a pixel.
    header = file.read(26)
    width = int.from_bytes(header[16:20], "big")
    height = int.from_bytes(header[20:24], "big")
    samples = {0: 1, 2: 3, 4: 2, 6: 4}.get(header[25], 0)
    check((height, width, samples), np.uint16)
    file.seek(0)
    return Pixels(from_bytes(file.read()))


def _tiff(file: BinaryIO, check: Check, **flags: Any) -> Pixels:
    """Read one image with bands, interleaved or in planes; or its pages of one size as bands."""
    import tifffile

    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    with tifffile.TiffFile(file, **flags) as tiff:
        # Find the one image, beside its masks and smaller copies.
        smaller = sum(len(page.subifds or ()) for page in tiff.pages)
        if smaller > MAX_SMALLER:
            raise ValueError(
                f"it names {smaller} smaller images of itself, more than {MAX_SMALLER}"
            )
        whole = [
            one for one in tiff.series if not (one.keyframe.is_reduced or one.keyframe.is_mask)
        ]
        # tifffile's own writer describes each page as an image, or a page by axes that it does not
        # have, such as YXQ: read pages.
        one_page = len(whole) == 1 and len(whole[0].pages) == 1
        described = one_page and whole[0].axes not in ("YX", "YXS", "SYX")
        if tiff.is_shaped and (described or len(whole) != 1):
            return _tiff(file, check, is_shaped=False)
        if len(whole) != 1:
            raise ValueError(
                f"it holds {len(whole)} images, not one: save each in a file of its own"
            )

        # Its bands are the last axis or the first one.
        axes = whole[0].axes
        shape = whole[0].shape
        if axes == "YXS":
            bands_last = True
        elif axes[-2:] == "YX" and len(axes) in (2, 3):
            bands_last = len(axes) == 2
        else:
            raise ValueError(
                f"its axes are {axes}: expected one image with bands, or a page for each band; "
                "write each slice of a stack to a file of its own"
            )
        if whole[0].keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            raise ValueError("its 0 is white (MINISWHITE): save it with 0 as black")
        # Planes of one page (S) and what the file calls channels (C) are no pages.
        paged = ""
        if not bands_last:
            shape = (*shape[1:], shape[0])
            paged = axes[0].strip("SC")
        check(shape, whole[0].dtype, paged)

        # The pixels, unless the file was cut off before their end.
        for page in whole[0].pages:
            if page is None:
                continue
            parts = zip(page.dataoffsets, page.databytecounts, strict=True)
            if any(start + count > end for start, count in parts):
                raise ValueError("the file ends before its pixels")
        array = whole[0].asarray(maxworkers=1)
        tag = whole[0].keyframe.tags.get(NODATA)
    nodata = None if tag is None else float(tag.value)
    pages = len(array) if paged else 0
    if not bands_last:
        array = np.moveaxis(array, 0, -1)
    return Pixels(array, nodata, pages)


def _exr(file: BinaryIO, check: Check) -> Pixels:
    """Read one part: its channels by layer, in each layer R, G, B, A, then others by name."""
    exr = import_extra("OpenEXR", "OpenEXR", "reading this kind of file")
    with exr.File(file, separate_channels=True, header_only=True) as header:
        if len(header.parts) != 1:
            raise ValueError(f"it has {len(header.parts)} parts, not one")
        low, high = (np.asarray(corner, dtype=int) for corner in header.header()["dataWindow"])
        width, height = (high - low + 1).tolist()
        check((height, width, len(header.header()["channels"])), np.float32)
    with exr.File(file, separate_channels=True, num_threads=0) as whole:
        if not whole.parts:
            raise ValueError("the file ends before its pixels")
        channels = whole.channels()
        names = sorted(channels, key=_layer_and_colour)
        planes = [np.asarray(channels[name].pixels) for name in names]
    # A channel may be stored at a fraction of the size.
    if any(plane.shape != (height, width) for plane in planes):
        raise ValueError("its channels have several sizes")
    return Pixels(np.stack(planes, axis=-1))


def _layer_and_colour(channel: str) -> tuple[str, int, str]:
    """The key that sorts channels, as LAYER.R or R."""
    layer, _, name = channel.rpartition(".")
    colour = "RGBA".index(name) if name in tuple("RGBA") else 4
    return layer, colour, name


READERS: dict[str, Callable[[BinaryIO, Check], Pixels]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".png": _png,
    ".tif": _tiff,
    ".exr": _exr,
}
