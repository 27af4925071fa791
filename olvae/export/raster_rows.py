"""Read JPEG 2000 and Zarr by rows, or whole: GDAL decodes any window of them alone."""

import io
import json
import math
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from olvae.data.pixels.arrays import ARRAY_DTYPES
from olvae.data.pixels.size_and_range import Array, PixelRange, check_size
from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes.georeference import Gaps, Georeference
from olvae.data.scenes.rasters import (
    CODES,
    JPEG_2000,
    LOCAL,
    ZARR,
    import_rasterio,
    open_dataset,
    raster_driver,
)
from olvae.export.tiff_rows import ImageRows, too_large
from olvae.files import legible, reason

# Most bytes of a box of JPEG 2000; its numbers of sRGB and grey.
MOST_BOX = 2**24
JP2_COLOURS = (16, 17)

ZARR_READ = (
    "of Zarr, arrays of format 2 are read, (bands, rows, columns); lines that convert others: "
    "https://open-litevae.github.io/open-litevae/any_size/#larger-than-memory"
)


class RasterRows(ImageRows):
    """One image in a JPEG 2000 or a Zarr, with some of its rows in memory at a time.

    Args:
        dataset: the image, opened by rasterio.
        path: its file, or the folder of a Zarr.
        channels, pixel_range: as :func:`~olvae.data.image.read_picture`'s.
        memory: bytes that a row of tiles may take, and one tile as GDAL holds it.

    Raises ValueError: it can't be read so.
    """

    def __init__(
        self, dataset: Any, path: Path, channels: int, pixel_range: PixelRange, memory: float
    ) -> None:
        super().__init__(legible(str(path)), dataset.shape, channels, pixel_range)
        self.dataset = dataset
        self.check_pixels(channels)
        if self.photo is not None and dataset.driver == JPEG_2000:
            self.profile = find_profile(path)
        item = np.dtype(dataset.dtypes[0]).itemsize
        self.take_tiles(dataset.block_shapes[0], dataset.count * item, memory)

        # GDAL unpacks a whole chunk; of a JPEG 2000 it has a tile's packed bytes, at most the file.
        if dataset.driver == ZARR:
            held = math.prod(json.loads((path / ".zarray").read_bytes())["chunks"]) * item
        else:
            with path.open("rb") as file:
                start = file.read(MOST_BOX)
            width, height = struct.unpack_from(">II", start, start.index(CODES) + 24)
            tiles = -(-self.width // width) * -(-self.height // height)
            held = path.stat().st_size // tiles
        if held > memory:
            raise ValueError(
                f"a tile takes {held / 2**30:.3g} GiB: allow more memory, or save smaller ones"
            )

    def check_pixels(self, channels: int) -> None:
        """Raise ValueError for pixels of another kind than are read here."""
        samples = self.dataset.count
        dtype = self.dataset.dtypes[0]
        found = f"{samples} channels of {dtype}"
        if self.photo is None:
            if dtype not in ARRAY_DTYPES or samples != channels:
                raise ValueError(f"{found}, not {channels} of {', '.join(ARRAY_DTYPES)}")
            return
        kinds = ("red", "green", "blue", "alpha") if samples > 1 else ("gray",)
        names = [colour.name for colour in self.dataset.colorinterp]
        # Writers may leave out the names of colours; a fourth band could be infrared.
        named = all(
            name in (kind, "undefined") for name, kind in zip(names, kinds, strict=False)
        ) and (samples < 4 or channels == 4 or names[3] == "alpha")
        if dtype != "uint8" or samples not in (1, 3, 4) or not named:
            raise ValueError(f"{found}: save it as grey, RGB or RGBA of 8 bits")

    def read_band(self, number: int) -> Array:
        """Read a row of tiles, (rows, W, samples)."""
        rasterio = import_rasterio()
        top = number * self.tile[0]
        window = ((top, min(top + self.tile[0], self.height)), (0, self.width))
        try:
            # GDAL unpacks a tile's bands at once, and keeps them until they are asked for.
            with rasterio.Env(**LOCAL, GDAL_CACHEMAX=2**20 + self.tile_bytes * self.across):
                pixels = self.dataset.read(window=window)
        except rasterio.errors.RasterioError as error:
            raise ValueError(reason(error.__cause__ or error)) from error
        return np.ascontiguousarray(np.moveaxis(pixels, 0, -1))

    def close(self) -> None:
        self.dataset.close()


def boxes_of(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of each box of a JPEG 2000, until one is broken or large."""
    while True:
        start = file.read(8)
        size = int.from_bytes(start[:4], "big")
        if len(start) < 8 or not 8 <= size <= MOST_BOX:
            return
        yield start[4:], file.read(size - 8)


def find_profile(path: Path) -> bytes | None:
    """Find a JPEG 2000's ICC profile; ValueError for colours other than a profile's, sRGB, grey."""
    with path.open("rb") as file:
        if file.read(4) == CODES:
            return None
        file.seek(0)
        header = next((content for kind, content in boxes_of(file) if kind == b"jp2h"), b"")
    colours = next((c for kind, c in boxes_of(io.BytesIO(header)) if kind == b"colr"), b"")
    # The method is a number of colours, 1, or a profile.
    if colours[:1] in (b"\2", b"\3"):
        return colours[3:]
    if colours[:1] != b"\1" or int.from_bytes(colours[3:7], "big") not in JP2_COLOURS:
        raise ValueError("its colours are neither a profile's nor sRGB: save it as RGB")
    return None


def open_raster(
    path: Path, channels: int, pixel_range: PixelRange, memory: float, small: bool = False
) -> RasterRows | None:
    """Open a JPEG 2000 or a Zarr whose image would take more than ``memory`` in a reconstruction.

    None for other files, and for smaller ones unless they are wanted too, by ``small``. Raises
    UnreadableImageError; ConfigError without rasterio.
    """
    driver = raster_driver(path)
    if driver is None:
        return None
    import_rasterio()
    try:
        if driver == ZARR and not (path / ".zarray").is_file():
            raise ValueError(f"no array of format 2; a group's have names, as {path.name}/0")
        dataset = open_dataset(path, driver)
        rows = RasterRows(dataset, path, channels, pixel_range, memory)
    except Exception as error:  # GDAL raises all kinds for a broken file
        why = reason(error) + (f"; {ZARR_READ}" if driver == ZARR else "")
        raise UnreadableImageError(legible(str(path)), why) from error
    if small or too_large(math.prod(rows.shape[1:]), channels, memory):
        return rows
    rows.close()
    return None


def read_raster(
    path: Path,
    channels: int,
    pixel_range: PixelRange,
    memory: float,
    georeference: Georeference | None = None,
) -> tuple[Tensor, Gaps | None] | None:
    """Read a JPEG 2000 or a Zarr, (C, H, W), as :func:`~olvae.data.image.read_picture` would.

    With a georeference missing values are filled, and returned too. None for other files. Raises
    UnreadableImageError; ConfigError without rasterio.
    """
    rows = open_raster(path, channels, pixel_range, memory, small=True)
    if rows is None:
        return None
    rows.georeference = georeference
    with closing(rows):
        try:
            check_size(rows.width, rows.height)
        except ValueError as error:
            raise UnreadableImageError(rows.name, str(error)) from error
        return rows.read_with_gaps(0, rows.height)
