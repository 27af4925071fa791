"""Read a TIFF that is too large for memory, some rows at a time: plain pixels, strips or tiles."""

import importlib.util
import io
import logging
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from olvae.data.image import MODES, Photo, image_to_tensor, stated_picture
from olvae.data.pixels.arrays import ARRAY_DTYPES, NODATA, array_suffix
from olvae.data.pixels.size_and_range import MAX_PIXELS, Array, PixelRange, check_size
from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes.georeference import Gaps, Georeference, byte_gaps, filled_picture
from olvae.files import legible, reason

# tifffile logs a line for each tag that it can't read.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# Bytes for each value of an image that is reconstructed in memory, counted for three channels.
BYTES_A_VALUE = 24
# Rows of plain pixels that are read at a time.
PLAIN_ROWS = 64
# Kinds of compression whose tiles can't take more memory than their header says.
COMPRESSIONS = {
    1: "none",
    5: "LZW",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    50000: "ZSTD",
}
JPEG_TILES = 7
# Most bytes of a packed tile, for each of its bytes unpacked; noise grows a little.
MOST_PACKED = 2


class ImageRows:
    """One image in a file, with two of its bands in memory at a time: rows of tiles.

    Subclasses read a band, check the pixels, and call :meth:`take_tiles`.

    Args:
        name: for errors.
        size: height and width.
        channels, pixel_range: as :func:`~olvae.data.image.read_picture`'s.

    Raises ValueError: a side is too long for the other.
    """

    # The file's own value for a missing one, where it is on the earth, and its ICC profile.
    nodata: float | None = None
    georeference: Georeference | None = None
    profile: bytes | None = None

    def __init__(
        self, name: str, size: tuple[int, int], channels: int, pixel_range: PixelRange
    ) -> None:
        self.name = name
        self.height, self.width = size
        self.shape = (channels, self.height, self.width)
        self.pixel_range = pixel_range
        check_size(self.width, self.height, most=math.inf)
        # Pixels are a picture's, by Pillow's modes, or an array's.
        self.photo: Photo | None = None
        if pixel_range.eight_bits and channels in MODES:
            self.photo = Photo(Image.new("L", (1, 1)), name, channels)
        # The last bands that were read: strips overlap a little.
        self.band = lru_cache(maxsize=2)(self.read_band)

    def take_tiles(self, tile: tuple[int, int], pixel_bytes: int, memory: float) -> None:
        """Set the tiles' height and width; ValueError if a row of them takes too much memory."""
        self.tile = tile
        self.across = -(-self.width // tile[1])
        self.tile_bytes = math.prod(tile) * pixel_bytes
        gib = self.tile_bytes * self.across / 2**30
        if gib * 2**30 > memory:
            raise ValueError(
                f"its tiles are {tile[1]}x{tile[0]} pixels, and a row of them takes "
                f"{gib:.3g} GiB: allow more memory, or save it in smaller tiles"
            )

    def read_band(self, number: int) -> Array:
        """Read a row of tiles, (rows, W, samples)."""
        raise NotImplementedError

    def read(self, start: int, stop: int) -> Tensor:
        """Read rows, (C, rows, W), as :func:`~olvae.data.image.read_picture` would.

        Raises UnreadableImageError.
        """
        return self.read_with_gaps(start, stop)[0]

    def read_with_gaps(self, start: int, stop: int) -> tuple[Tensor, Gaps | None]:
        """As :meth:`read`, with the missing values of a scene; without a georeference None."""
        try:
            parts = []
            for number in range(start // self.tile[0], -(-stop // self.tile[0])):
                top = number * self.tile[0]
                parts.append(self.band(number)[max(0, start - top) : stop - top])
            array = np.concatenate(parts)
            if self.photo is None and self.georeference is not None:
                return filled_picture(array, self.georeference, self.pixel_range)
            if self.photo is None:
                image = image_to_tensor(stated_picture(array, self.pixel_range, self.nodata))
                return image, None
            picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
            image = image_to_tensor(self.photo.converted(picture, self.profile))
            if self.georeference is None:
                return image, None
            return image, byte_gaps(image, self.georeference.nodata)
        except Exception as error:  # decoders raise all kinds for a broken file
            where = f"in its rows {start} to {stop - 1}: {reason(error)}"
            raise UnreadableImageError(self.name, where) from error

    def close(self) -> None:
        """Close the file."""
        raise NotImplementedError


class TiffRows(ImageRows):
    """One image in a TIFF, with some of its rows in memory at a time.

    Args:
        tiff: a ``tifffile.TiffFile``.
        name: for errors.
        channels, pixel_range: as :func:`~olvae.data.image.read_picture`'s.
        memory: bytes that a row of tiles may take.

    Raises ValueError: it can't be read so.
    """

    def __init__(
        self, tiff: Any, name: str, channels: int, pixel_range: PixelRange, memory: int
    ) -> None:
        self.tiff = tiff
        self.page = page = tiff.pages.first

        # One image, beside its masks and smaller copies.
        whole = sum(not (one.is_reduced or one.is_mask) for one in tiff.pages)
        if whole != 1:
            raise ValueError(f"it holds {whole} images, not one: save each in a file of its own")
        super().__init__(name, (page.imagelength, page.imagewidth), channels, pixel_range)
        self.check_pixels(channels)
        self.profile = page.iccprofile
        nodata = page.tags.valueof(NODATA)
        if self.photo is None and nodata is not None:
            self.nodata = float(nodata)

        # The tiles, or strips as wide as the image; plain pixels need neither.
        self.planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self.plain = page.is_final
        tile = page.tile or (min(page.rowsperstrip, self.height), self.width)
        if self.plain:
            tile = (PLAIN_ROWS, self.width)
        self.take_tiles(tile, page.samplesperpixel * page.dtype.itemsize, memory)
        self.down = -(-self.height // self.tile[0])
        self.check_bytes()

    def check_pixels(self, channels: int) -> None:
        """Raise ValueError for pixels of another kind than are read here."""
        page = self.page
        samples = page.samplesperpixel
        known = page.dtype is not None and page.dtype.name in ARRAY_DTYPES
        if self.photo is None:
            if not known or samples != channels or page.photometric.name == "MINISWHITE":
                raise ValueError(f"{samples} channels of {page.dtype}, {page.photometric.name}")
        else:
            kinds = {"MINISBLACK": ((1, ()),), "RGB": ((3, ()), (4, (2,)))}
            if page.compression == JPEG_TILES:
                kinds["YCBCR"] = ((3, ()),)
            found = samples, tuple(int(kind) for kind in page.extrasamples)
            if page.dtype != np.uint8 or found not in kinds.get(page.photometric.name, ()):
                raise ValueError(
                    f"{samples} channels of {page.dtype}, {page.photometric.name}: "
                    "save it as grey, RGB or RGBA of 8 bits"
                )
            if page.tags.valueof(274, 1) != 1:
                raise ValueError("it is not upright: save it with orientation 1")
        if page.imagedepth != 1:
            raise ValueError("it is a volume, not an image")
        if page.compression not in COMPRESSIONS:
            names = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
            raise ValueError(f"its compression is {page.compression.name}: save it with {names}")
        if page.compression != 1 and importlib.util.find_spec("imagecodecs") is None:
            raise ValueError("its compression needs imagecodecs: pip install imagecodecs")

    def check_bytes(self) -> None:
        """Raise ValueError if the file is too short, or a tile's bytes are too many."""
        page = self.page
        end = self.tiff.filehandle.size
        if self.plain:
            whole = page.dataoffsets[0] + page.nbytes <= end
        else:
            tiles = self.across * self.down * self.planes
            whole = len(page.dataoffsets) == len(page.databytecounts) == tiles and not any(
                start + count > end
                for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)
            )
        if not whole:
            raise ValueError("the file ends before its pixels")
        if not self.plain and max(page.databytecounts) > MOST_PACKED * self.tile_bytes + 2**14:
            raise ValueError("one of its tiles has more bytes than its pixels take")

    def read_band(self, number: int) -> Array:
        """Read a row of tiles, (rows, W, samples)."""
        page = self.page
        top = number * self.tile[0]
        rows = min(self.tile[0], self.height - top)
        samples = page.samplesperpixel // self.planes
        band = np.full((self.planes, rows, self.width, samples), page.nodata, page.dtype)
        file = self.tiff.filehandle
        for plane in range(self.planes):
            # Plain pixels are one piece.
            if self.plain:
                row = self.width * samples * page.dtype.itemsize
                file.seek(page.dataoffsets[0] + (plane * self.height + top) * row)
                stored = np.dtype(page.dtype).newbyteorder(self.tiff.byteorder)
                pixels = np.frombuffer(file.read(rows * row), stored)
                band[plane] = pixels.reshape(band.shape[1:])
                continue
            for column in range(self.across):
                index = (plane * self.down + number) * self.across + column
                tile = self.read_tile(index)
                # None stands for a tile that is not stored.
                if tile is not None:
                    left = column * self.tile[1]
                    inside = tile[:rows, : self.width - left]
                    band[plane, : len(inside), left : left + inside.shape[1]] = inside
        return np.concatenate(band, axis=-1)

    def read_tile(self, index: int) -> Array | None:
        """Read and unpack a tile or a strip, (rows, columns, samples)."""
        page = self.page
        count = page.databytecounts[index]
        if not count:
            return None
        self.tiff.filehandle.seek(page.dataoffsets[index])
        data = self.tiff.filehandle.read(count)
        tables = {}
        if page.compression == JPEG_TILES:
            # A decoder would believe the size in the tile's own header.
            width, height = Image.open(io.BytesIO(data), formats=["JPEG"]).size
            if width > self.tile[1] or height > self.tile[0]:
                raise ValueError(f"a tile's header claims {width}x{height} pixels")
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        decoded: Array | None = page.decode(data, index, **tables)[0]
        return None if decoded is None else decoded[0]

    def close(self) -> None:
        self.tiff.close()


def too_large(pixels: int, channels: int, memory: float) -> bool:
    """Whether an image has too many pixels, or takes too many bytes, for memory."""
    return pixels > MAX_PIXELS or pixels * channels * BYTES_A_VALUE > memory


def open_rows(path: Path, channels: int, pixel_range: PixelRange, memory: int) -> TiffRows | None:
    """Open a TIFF whose image would take more than ``memory`` bytes in a reconstruction.

    None for smaller ones, and other files, for :func:`~olvae.data.image.read_picture` to read.
    UnreadableImageError if that would not read it either: it has too many pixels, and can't be
    read by rows.
    """
    import tifffile

    pixels = 0
    try:
        if array_suffix(path) != ".tif":
            return None
        tiff = tifffile.TiffFile(path)
    except Exception:  # read_picture says what is wrong
        return None
    try:
        page = tiff.pages.first
        pixels = page.imagelength * page.imagewidth
        if too_large(pixels, channels, memory):
            return TiffRows(tiff, legible(str(path)), channels, pixel_range, memory)
    except Exception as error:
        if pixels > MAX_PIXELS:
            tiff.close()
            raise UnreadableImageError(legible(str(path)), reason(error)) from error
    tiff.close()
    return None
