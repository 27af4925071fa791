"""Small volumes in Hounsfield units, as files of each format."""

from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.data import get_testdata_file

from olvae.data.volumes.volume import Volume
from olvae.data.volumes.volume_source import find_volumes

SHAPE = (7, 20, 24)
"""Slices, rows, columns."""

WINDOW = [-160, 240]
AFFINE = np.array([[0.8, 0, 0, -9], [0, -0.9, 0.1, 4], [0, 0.2, 2.5, 7], [0, 0, 0, 1]])


def hounsfield(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> NDArray[np.int16]:
    """Air, -1000, round a body; the first and the last slice are air alone."""
    rng = np.random.default_rng(seed)
    values = np.full(shape, -1000, dtype=np.int16)
    values[1:-1, 4:-4, 5:-5] = rng.integers(-150, 900, values[1:-1, 4:-4, 5:-5].shape)
    return values


def nifti(path: Path, values: NDArray[Any] | None = None, dtype: str = "int16") -> Path:
    """A file whose values have a slope of .5 and an intercept of -1024."""
    path.parent.mkdir(parents=True, exist_ok=True)
    real = hounsfield() if values is None else values
    stored = ((real.astype(float) + 1024) * 2).T.astype(dtype)
    image = nibabel.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(0.5, -1024)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"phantom"
    nibabel.save(image, path)
    return path


def nrrd_file(path: Path, values: NDArray[Any] | None = None, **header: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    real = hounsfield() if values is None else values
    geometry = {
        "space": "left-posterior-superior",
        "space directions": AFFINE[:3, :3].T,
        "space origin": AFFINE[:3, 3],
        "kinds": ["domain", "domain", "domain"],
        "modality": "CT",
    }
    nrrd.write(str(path), real.T, {**geometry, **header})
    return path


def dicom(path: Path, values: NDArray[Any], **tags: Any) -> Path:
    """pydicom's CT_small.dcm with other pixels, (rows, columns) in Hounsfield units, and tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.Rows, dataset.Columns = values.shape[-2:]
    if values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.PixelData = (values + 1024).astype("<i2").tobytes()
    dataset.SOPInstanceUID = tags.pop("uid", "1.2.3.4.5")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    return path


def series(folder: Path, values: NDArray[Any] | None = None, uid: str = "1.2.826.7") -> Path:
    """A file a slice, whose names are in another order than their places; without extension."""
    real = hounsfield() if values is None else values
    names = np.random.default_rng(3).permutation(len(real))
    for number, plane in enumerate(real):
        dicom(
            folder / f"IM{names[number]:04d}",
            plane,
            uid=f"{uid}.{number + 1}",
            SeriesInstanceUID=uid,
            InstanceNumber=int(names[number]) + 1,
            ImagePositionPatient=[-9, 4, 7 + 2.5 * number],
            PixelSpacing=[0.9, 0.8],
        )
    return folder


def whole(volume: Any, axis: int = 0) -> NDArray[np.float32]:
    """All slices of a volume along an axis, (slices, rows, columns) again."""
    planes = [volume.slices(axis, number)[..., 0] for number in range(volume.shape[axis])]
    return np.moveaxis(np.stack(planes), 0, axis)


def only(place: Path) -> Volume:
    """The one volume of a folder."""
    (volume,) = find_volumes(place)
    return volume


def group(**sequences: dict[str, object]) -> pydicom.Dataset:
    """A data set with sequences of one item."""
    found = pydicom.Dataset()
    for name, tags in sequences.items():
        item = pydicom.Dataset()
        for tag, value in tags.items():
            setattr(item, tag, value)
        setattr(found, name, [item])
    return found
