"""Read and write NIfTI, .nii and .nii.gz, by nibabel."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from olvae.config import import_extra
from olvae.data.pixels.size_and_range import Array
from olvae.data.volumes.volume import (
    RealArray,
    Volume,
    check_bytes,
    check_dtype,
    check_shape,
    to_stored,
)
from olvae.files import atomic_write

ONE_EACH = "save each volume in a file of its own, as nibabel.four_to_three does"

# In a header's unit; one without is taken as millimetres.
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}

# nibabel logs a line for each header that it mends.
logging.getLogger("nibabel").setLevel(logging.CRITICAL)


class Nifti(Volume):
    """A volume of a NIfTI file. Slices of an unpacked one are read alone."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        image = self.load()
        self.packed = path.name.lower().endswith(".gz")
        self.suffix = ".nii.gz" if self.packed else ".nii"
        self.shape = check_shape(image.shape, ONE_EACH)
        check_dtype(image.get_data_dtype())
        check_bytes(path, int(np.prod(self.shape)), image.get_data_dtype(), self.packed)
        unit = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
        self.affine = np.diag([unit, unit, unit, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
        if not np.isfinite(self.affine).all() or not np.linalg.det(self.affine):
            raise ValueError("its affine has no inverse: the header is broken")

        # The header may name the axis of the slices; else it is the last.
        stated = image.header.get_dim_info()[2]
        self.acquired = 0 if stated is None else 2 - int(stated)

    def load(self) -> Any:
        """Open the file by nibabel, which reads its header alone."""
        nibabel = import_extra("nibabel", "nibabel", "reading NIfTI")
        image = nibabel.load(self.path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise ValueError(f"{type(image).__name__}: no NIfTI of one file")
        return image

    def read(self) -> Array:
        values: Array = np.asanyarray(self.load().dataobj)
        return values.reshape(self.shape[::-1]).T

    def read_slice(self, axis: int, index: int) -> Array:
        image = self.load()
        if self.packed or len(image.shape) < 3:
            return super().read_slice(axis, index)
        place: list[Any] = [slice(None)] * 3 + [0] * (len(image.shape) - 3)
        place[2 - axis] = index
        values: Array = np.asanyarray(image.dataobj[tuple(place)])
        return values.T

    def write_file(self, values: RealArray, place: Path) -> Path:
        image = self.load()
        header = image.header.copy()
        slope = float(image.dataobj.slope)
        intercept = float(image.dataobj.inter)
        stored = to_stored(values.T, slope, intercept, image.get_data_dtype())
        copy = type(image)(stored.reshape(image.shape), image.affine, header)
        # With a stated slope, nibabel writes values as they are; a new image forgets it.
        copy.header.set_slope_inter(slope, intercept)
        result = place.with_name(place.name + self.suffix)
        with atomic_write(result) as partial:
            copy.to_filename(partial)
        return result
