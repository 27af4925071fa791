"""Open GeoTIFF, COG, JPEG 2000 and Zarr by rasterio, and read windows of a scene of any size."""

import glob
import logging
import math
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olvae.config import import_extra
from olvae.data.pixels.arrays import ARRAY_DTYPES
from olvae.data.pixels.size_and_range import Array, nearest_float32
from olvae.data.read_errors import UnreadableImageError
from olvae.files import file_state, legible, nearest_path, reason

# rasterio logs the errors of GDAL that it raises.
logging.getLogger("rasterio").setLevel(logging.CRITICAL)

# The drivers of GDAL that are used, of some 155.
GEOTIFF = "GTiff"
JPEG_2000 = "JP2OpenJPEG"
ZARR = "Zarr"
# Neither files beside the image are read, nor URLs that it names; threads would print errors.
LOCAL = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": "none",
    "GDAL_NUM_THREADS": "1",
}

# First bytes of JPEG 2000, in boxes or without.
BOXES = b"\0\0\0\x0cjP  \r\n\x87\n"
CODES = b"\xff\x4f\xff\x51"

# Files of Zarr: each of its folders has one of them, and an array of format 2 the first.
ZARR_FILES = (".zarray", ".zgroup", "zarr.json")

# Files that may be scenes, by their names; a Zarr of format 2 is a folder.
SCENES = (".tif", ".tiff", ".jp2")

# Bytes of unpacked blocks that GDAL keeps in a process; most bytes of one block, and of a window.
CACHE = 2**27
MOST_BYTES = 2**28
# Most pixels of a scene: 131,072 x 131,072.
MOST_PIXELS = 2**34
# Scenes that a process has open at once.
MOST_OPEN = 16


def import_rasterio(purpose: str = "reading JPEG 2000 and Zarr") -> Any:
    """Import rasterio, which brings GDAL; ConfigError if it is missing."""
    return import_extra("rasterio", packages="rasterio", purpose=purpose)


def raster_driver(path: Path) -> str | None:
    """Find GDAL's driver for a JPEG 2000, by its first bytes, or a Zarr; None for others."""
    if path.is_dir():
        return ZARR if any((path / name).is_file() for name in ZARR_FILES) else None
    try:
        with path.open("rb") as file:
            start = file.read(len(BOXES))
    except OSError:  # read_picture says what is wrong
        return None
    return JPEG_2000 if start == BOXES or start.startswith(CODES) else None


def open_dataset(path: Path, driver: str) -> Any:
    """Open a file by one driver of GDAL alone. Raises what rasterio and GDAL raise."""
    rasterio = import_rasterio()
    with rasterio.Env(**LOCAL), warnings.catch_warnings():
        # A picture has no place on the earth.
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path.resolve(), driver=driver)


@lru_cache(maxsize=MOST_OPEN)
def _opened(path: Path, state: str, process: int) -> Any:  # noqa: ARG001
    """A scene's open file, in this state and process: GDAL's are not shared with a fork."""
    return open_dataset(path, raster_driver(path) or GEOTIFF)


def find_missing(array: Array, nodata: float | None) -> NDArray[np.bool_]:
    """Find values that stand for missing ones, and those that are not finite."""
    missing = np.zeros(array.shape, bool)
    if nodata is not None:
        missing = array.astype(np.float32) == nearest_float32(nodata)
    if array.dtype.kind == "f":
        missing |= ~np.isfinite(array)
    return missing


def whole_pixels(array: Array, missing: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A pixel of 8 bits, (..., C), is missing if all of its bands are: 0 is black as well."""
    if array.dtype == np.uint8:
        return np.broadcast_to(missing.all(-1, keepdims=True), missing.shape)
    return missing


class Scene:
    """A raster of any size, read by windows.

    Args:
        path: its file, or the folder of a Zarr.
        name: its path below the folder of the scenes, with ``/``.
        channels: the number of bands that are read; 0 for any number.
        bands: those that are read, counted from 0; None for all.

    ``broken`` is the reason if it can't be read; then its height and width are 0.
    """

    def __init__(
        self, path: Path, name: str, channels: int = 3, bands: Sequence[int] | None = None
    ) -> None:
        self.path = path
        self.name = name
        self.file_state = file_state(path / ".zarray" if path.is_dir() else path)
        self.broken: str | None = None
        self.height = 0
        self.width = 0
        self.bands: list[int] = []
        self.nodata: float | None = None
        # Whether the file has a mask or alpha, and whether values may be missing: by these, by a
        # value that stands for them, or as NaN.
        self.has_mask = False
        self.has_gaps = False
        import_rasterio("reading scenes")
        try:
            self.read_header(channels, bands)
        except Exception as error:  # GDAL raises all kinds for a broken file
            self.broken = reason(error.__cause__ or error)

    def opened(self) -> Any:
        """The open file, which the process keeps. Raises what rasterio and GDAL raise."""
        return _opened(self.path, self.file_state, os.getpid())

    def read_header(self, channels: int, bands: Sequence[int] | None) -> None:
        """Take size, bands and kind of missing values. Raises what GDAL raises, ValueError."""
        dataset = self.opened()
        self.bands = list(range(dataset.count) if bands is None else bands)
        if not set(self.bands) <= set(range(dataset.count)):
            raise ValueError(
                f"it has {dataset.count} bands, counted from 0: `bands` {self.bands} are not all "
                "there"
            )
        if channels not in (0, len(self.bands)):
            raise ValueError(
                f"it has {len(self.bands)} bands, not {channels}: set `channels`, or choose `bands`"
            )
        kinds = {dataset.dtypes[band] for band in self.bands}
        if len(kinds) > 1 or not kinds <= set(ARRAY_DTYPES):
            raise ValueError(
                f"its bands are {', '.join(sorted(kinds))}: convert them to one of "
                f"{', '.join(ARRAY_DTYPES)}, as by gdal_translate -ot Float32"
            )
        kind = np.dtype(kinds.pop())
        block = math.prod(dataset.block_shapes[0]) * dataset.count * kind.itemsize
        if block > MOST_BYTES:
            raise ValueError(
                f"one of its blocks takes {block / 2**30:.3g} GiB: save it in tiles, as by "
                "gdal_translate -of COG"
            )
        if math.prod(dataset.shape) > MOST_PIXELS:
            raise ValueError(
                f"its header claims {dataset.width}x{dataset.height} pixels, more than "
                f"{MOST_PIXELS:,}: cut it into several files"
            )

        # A Zarr's fill value is the value of chunks that are not stored.
        if dataset.driver != ZARR:
            self.nodata = dataset.nodata
            flags = {flag.name for band in self.bands for flag in dataset.mask_flag_enums[band]}
            self.has_mask = "per_dataset" in flags
        self.has_gaps = self.has_mask or self.nodata is not None or kind.kind == "f"
        self.height, self.width = dataset.shape

    def read(
        self, window: tuple[int, int, int, int], nodata: float | None = None
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Read a window of (top, left, height, width): its values (H, W, C), and which are missing.

        ``nodata`` stands for a missing value in place of the file's own.

        Raises UnreadableImageError.
        """
        if self.broken is not None:
            raise UnreadableImageError(self.name, self.broken)
        rasterio = import_rasterio()
        top, left, height, width = window
        where: dict[str, Any] = {
            "indexes": [band + 1 for band in self.bands],
            "window": ((top, top + height), (left, left + width)),
        }
        try:
            with rasterio.Env(**LOCAL, GDAL_CACHEMAX=CACHE):
                dataset = self.opened()
                values = dataset.read(**where)
                missing = find_missing(values, self.nodata if nodata is None else nodata)
                if self.has_mask:
                    missing |= dataset.read_masks(**where) == 0
        except Exception as error:  # GDAL raises all kinds for a broken file
            raise UnreadableImageError(
                self.name, f"at row {top}, column {left}: {reason(error.__cause__ or error)}"
            ) from error
        values = np.ascontiguousarray(np.moveaxis(values, 0, -1))
        return values, whole_pixels(values, np.moveaxis(missing, 0, -1))


def find_scenes(
    root: str | Path, channels: int = 3, bands: Sequence[int] | None = None
) -> list[Scene]:
    """Find the scenes of a folder at any depth, of a pattern, or one file; sorted by name.

    Raises FileNotFoundError: there are none. ConfigError: rasterio is missing.
    """
    path = Path(root).expanduser()
    if path.is_dir() and raster_driver(path) is None:
        folder = path
        found = walk_scenes(path)
    elif path.exists():
        folder = path.parent
        found = [path]
    elif glob.has_magic(str(root)):
        # Path.glob would need the pattern's folder apart.
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        folder = Path(os.path.commonpath([one.parent for one in found])) if found else path
    else:
        raise FileNotFoundError(f"{root}: no such file or folder of scenes{nearest_path(path)}")
    if not found:
        raise FileNotFoundError(
            f"{root}: no scenes there (looked for {', '.join(SCENES)} and Zarr of format 2)"
        )
    return [
        Scene(one, legible(one.relative_to(folder).as_posix()), channels, bands)
        for one in sorted(found)
    ]


def walk_scenes(top: Path) -> list[Path]:
    """Find files of scenes, and Zarr arrays, at any depth; each folder once, through links too."""
    found = []
    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True):
        real = Path(folder).resolve()
        if real in seen or (set(files) & set(ZARR_FILES)):
            folders.clear()
        if ".zarray" in files and real not in seen:
            found.append(Path(folder))
        elif real not in seen:
            folders[:] = [name for name in folders if not name.startswith(".")]
            named = [name for name in files if name.lower().endswith(SCENES) and name[0] != "."]
            found += [Path(folder, name) for name in named]
        seen.add(real)
    return found
