"""The contract of a volume: slices in real units, their geometry, and how it is written back."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import Array, check_size
from olvae.data.read_errors import UnreadableImageError
from olvae.files import file_state, legible, reason

RealArray = NDArray[np.float32]

# Largest number of values in a volume: 4 GiB in float32. A gzip has at most so many bytes a byte.
MOST_VALUES = 2**30
MOST_UNPACKED = 1032

# Axes by name, and by the file's number, which counts columns, rows, slices.
ACQUIRED = "acquired"
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
Axis = int | str

# Bytes of whole volumes that a process keeps at most, besides the last one.
KEPT_BYTES = 2**29
_kept: OrderedDict[tuple[str, str], RealArray] = OrderedDict()


class Volume(ABC):
    """Slices of one image in three dimensions, in the units of its file's slope and intercept.

    Arrays are (slices, rows, columns), the reverse of the axes of NIfTI and NRRD, so that a slice
    along the first axis is stored as a picture is. Subclasses set what is declared here, from the
    header alone, and read and write files.
    """

    path: Path  # of the file; of a DICOM series its folder and UID
    key: str  # its path below the folder of all volumes
    shape: tuple[int, int, int]
    suffix: str  # of the file that :meth:`write` makes; empty for a folder
    patient = ""  # of whom, if the header tells
    acquired = 0  # axis of the array along which slices were acquired
    # From column, row, slice and 1 to millimetres, (4, 4), by the file's own convention.
    affine: NDArray[np.float64]

    @property
    def name(self) -> str:
        """For errors."""
        return legible(str(self.path))

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distances of slices, rows and columns in millimetres."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return tuple(float(length) for length in lengths[::-1])

    def axis_of(self, axis: Axis) -> int:
        """Find the array's axis of a setting: acquired, a plane's name, or the file's number."""
        if axis == ACQUIRED:
            return self.acquired
        if axis in (0, 1, 2):
            return 2 - int(axis)
        # The axis that is nearest to the plane's normal, each of the three taken once.
        steps = np.abs(self.affine[:3, :3]) / np.linalg.norm(self.affine[:3, :3], axis=0)
        found: dict[int, int] = {}
        for _ in range(3):
            world, column = np.unravel_index(np.argmax(steps), (3, 3))
            found[int(world)] = int(column)
            steps[world, :] = -np.inf
            steps[:, column] = -np.inf
        return 2 - found[PLANES[str(axis)]]

    def state(self) -> str:
        """Its files' sizes and times; a copy has the same sizes."""
        return file_state(self.path)

    @abstractmethod
    def read(self) -> Array:
        """Read all values, in real units; raises whatever a library does for a broken file."""

    def read_slice(self, axis: int, index: int) -> Array:
        """Read a slice, (rows, columns); as :meth:`read`. By default of the whole, which is kept.

        So a compressed file is not unpacked for each slice of it.
        """
        place = (str(self.path), self.state())
        if place not in _kept:
            _kept[place] = np.asarray(self.read(), dtype=np.float32)
            while len(_kept) > 1 and sum(array.nbytes for array in _kept.values()) > KEPT_BYTES:
                _kept.popitem(last=False)
        _kept.move_to_end(place)
        plane: Array = np.take(_kept[place], index, axis)
        return plane

    def slices(self, axis: int, index: int, neighbours: int = 0) -> RealArray:
        """Read a slice as channels between its neighbours, (rows, columns, 1 + 2 neighbours).

        Beyond the ends, the first and the last slice are repeated. Raises UnreadableImageError.
        """
        numbers = np.arange(index - neighbours, index + neighbours + 1)
        numbers = numbers.clip(0, self.shape[axis] - 1)
        try:
            found = [self.read_slice(axis, number) for number in numbers.tolist()]
            return np.stack(found, axis=-1).astype(np.float32)
        except ConfigError:
            raise
        except Exception as error:  # libraries raise all kinds for a broken file
            image = f"{self.key}/{index:04d}"
            raise UnreadableImageError(self.name, first_reason(error), image) from error

    def write(self, values: RealArray, place: Path) -> Path:
        """Write a volume with other values, in real units, beside the geometry of this one.

        ``place`` lacks the suffix. Returns the path of the file, or the folder. Raises ValueError
        for what can't be written, OSError where it can't.
        """
        try:
            return self.write_file(values, place)
        except (ConfigError, OSError):
            raise
        except Exception as error:  # libraries raise all kinds for a header that was broken
            raise ValueError(f"it can't be written again: {first_reason(error)}") from error

    @abstractmethod
    def write_file(self, values: RealArray, place: Path) -> Path:
        """As :meth:`write`; raises whatever a library does."""


class Unreadable(Volume):
    """A file that is no volume: one slice, which can't be read, for the reason."""

    suffix = ""
    shape = (1, 1, 1)
    affine = np.eye(4)

    def __init__(self, path: Path, key: str, why: str) -> None:
        self.path = path
        self.key = key
        self.why = why

    def read(self) -> Array:
        raise ValueError(self.why)

    def write_file(self, values: RealArray, place: Path) -> Path:  # noqa: ARG002
        raise ValueError(self.why)


def first_reason(error: BaseException) -> str:
    """Describe a library's error on one line of a bounded length."""
    text = " ".join(reason(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def check_shape(shape: Sequence[int], remedy: str) -> tuple[int, int, int]:
    """Return the file's shape in the array's order; a picture has one slice.

    Raises ValueError for no or more than three dimensions, ``remedy`` tells what to do about
    those, and for a volume that would take too much memory.
    """
    sizes = [int(size) for size in shape]
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    found = "x".join(map(str, sizes))
    if len(sizes) > 3:
        raise ValueError(f"it has {len(sizes)} dimensions, {found}: {remedy}")
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"its header claims {found or 'no'} values: no volume")
    columns, rows, slices = (*sizes, 1)[:3]
    values = columns * rows * slices
    if values > MOST_VALUES:
        raise ValueError(f"its header claims {found} values, more than {MOST_VALUES // 2**20} Mi")
    check_size(columns, rows)
    return slices, rows, columns


def check_bytes(path: Path, values: int, dtype: np.dtype[Any], packed: bool) -> None:
    """Raise ValueError if a file is too small for the values that its header claims."""
    size = path.stat().st_size
    if values * dtype.itemsize > size * (MOST_UNPACKED if packed else 1):
        raise ValueError(
            f"the file ends before its values: its header claims {values} of {dtype}, "
            f"and it has {size} bytes: copy it again"
        )


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Raise ValueError for values that are no numbers of one channel."""
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ValueError(f"its values are {dtype}: colours and complex numbers are not read")


def to_stored(values: RealArray, slope: float, intercept: float, dtype: np.dtype[Any]) -> Array:
    """Turn real values into a file's, the inverse of slope and intercept; round for integers."""
    stored = (values.astype(np.float64) - intercept) / slope
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        # The largest integers of 64 bits are no float: the nearest below is.
        high = np.nextafter(2.0**63, 0.0) if dtype.itemsize == 8 else float(ends.max)
        stored = np.clip(np.rint(stored), float(ends.min), high)
    return stored.astype(dtype)
