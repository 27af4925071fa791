"""Read and write DICOM by pydicom: series of slices, and files of several frames."""

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olvae.config import ConfigError, import_extra
from olvae.data.picture_folder import name_below
from olvae.data.pixels.size_and_range import Array
from olvae.data.volumes.volume import (
    RealArray,
    Unreadable,
    Volume,
    check_bytes,
    check_shape,
    first_reason,
    to_stored,
)
from olvae.files import file_state, folder_beside, legible, replace_folder

# What a series is put together by.
TAGS = (
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "InstanceNumber",
    "PatientID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "PixelSpacing",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "SliceThickness",
    "SpacingBetweenSlices",
    "GridFrameOffsetVector",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
LEVEL = (1, 0, 0, 0, 1, 0)  # where a header has no orientation
PARALLEL = 1e-3  # largest difference of direction cosines
SAME_PLACE = 1e-3  # largest distance in millimetres
HOW_TO_DECODE = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg decodes most of them"
MADE_BY = "encoded and decoded by an autoencoder (olvae reconstruct)"


class Series(Volume):
    """Slices of one DICOM series in files of a folder, by position; or one file with frames.

    Args:
        path: the folder and the series' UID, or the file.
        key: its path below the folder of all volumes.
        files: path and header of each.

    Raises ValueError: the files are no volume.
    """

    suffix = ""

    def __init__(self, path: Path, key: str, files: Sequence[tuple[Path, Any]]) -> None:
        self.path = path
        self.key = key
        sizes = {(int(header.Columns), int(header.Rows)) for _, header in files}
        if len(sizes) > 1:
            found = " and ".join(f"{columns}x{rows}" for columns, rows in sorted(sizes)[:3])
            raise ValueError(f"its slices have several sizes, {found}: part the series")
        (columns, rows) = sizes.pop()
        first = files[0][1]
        self.patient = str(first.get("PatientID") or "")
        self.frames = int(first.get("NumberOfFrames") or 1) if len(files) == 1 else 1
        check_shape((columns, rows, max(len(files), self.frames)), "")
        self.shape = (max(len(files), self.frames), rows, columns)
        check_bytes(files[0][0], self.frames, np.dtype(np.uint8), packed=False)
        self.affine = np.eye(4)

        # Steps of columns, rows and slices as of the first slice.
        turned = of_frame(first, 0, "PlaneOrientationSequence", "ImageOrientationPatient")
        cosines = np.asarray(turned or LEVEL, dtype=np.float64).reshape(2, 3)
        normal = np.cross(*cosines)
        measure = partial(of_frame, first, 0, "PixelMeasuresSequence")
        high, wide = measure("PixelSpacing") or (1.0, 1.0)
        step = abs(float(measure("SpacingBetweenSlices") or measure("SliceThickness") or 1.0))

        # Sort by position along the normal, or by number where there are no positions.
        slices = [(path, header, frame) for path, header in files for frame in range(self.frames)]
        places = [position_of(header, frame, normal) for _, header, frame in slices]
        numbers: list[float] = [int(header.get("InstanceNumber") or 0) for _, header, _ in slices]
        placed = bool(turned) and all(place is not None for place in places)
        if placed:
            for _, header, frame in slices:
                own = of_frame(header, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
                other = np.asarray(own or turned, dtype=np.float64)
                if np.abs(other.reshape(2, 3) - cosines).max() > PARALLEL:
                    raise ValueError("its slices are not parallel: part the series")
            numbers = [float(place @ normal) for place in places]
        order = sorted(range(len(slices)), key=lambda i: (numbers[i], slices[i][0].name, i))
        self.files = list(dict.fromkeys(slices[i][0] for i in order))
        self.order = [slices[i][2] for i in order][: self.frames]
        if placed:
            self.affine[:3, 3] = places[order[0]]
            steps = np.diff([numbers[i] for i in order])
            if len(steps) and steps.min() < SAME_PLACE:
                raise ValueError(
                    f"{int((steps < SAME_PLACE).sum())} of its slices lie where another does, as "
                    "of several times or echoes: part the series"
                )
            step = float(steps.mean()) if len(steps) else step
        columns_of = (cosines[0] * float(wide), cosines[1] * float(high), normal * step)
        self.affine[:3, :3] = np.stack(columns_of, axis=1)
        if not np.isfinite(self.affine).all() or not np.linalg.det(self.affine):
            raise ValueError("its spacing or orientation is 0: the header is broken")

    def state(self) -> str:
        return "\n".join(file_state(path) for path in self.files)

    def read(self) -> Array:
        return np.concatenate([self.frames_of(path) for path in self.files])

    def read_slice(self, axis: int, index: int) -> Array:
        if axis or self.frames > 1:
            return super().read_slice(axis, index)
        values: Array = self.frames_of(self.files[index])[0]
        return values

    def frames_of(self, path: Path) -> Array:
        """Read a file's frames in real units, (frames, rows, columns), sorted as the slices."""
        try:
            dataset = read_dataset(path)
            check_header(dataset)
            pixels = pixels_of(dataset).reshape(self.frames, *self.shape[1:])
            slopes = slopes_of(dataset, self.frames)[..., None, None]
        except ConfigError:
            raise
        except Exception as error:  # pydicom raises all kinds for a broken file
            raise ValueError(f"{legible(path.name)}: {first_reason(error)}") from error
        real: Array = (pixels.astype(np.float64) * slopes[:, 0] + slopes[:, 1]).astype(np.float32)
        return real[self.order]

    def write_file(self, values: RealArray, place: Path) -> Path:
        """Write ``place``, a folder of as many files, with new UIDs; see :class:`Volume`."""
        uid = import_pydicom().uid
        series = uid.generate_uid()
        parts = values.reshape(len(self.files), self.frames, *self.shape[1:])
        with folder_beside(place) as folder:
            new = folder / place.name
            new.mkdir()
            for number, (path, part) in enumerate(zip(self.files, parts, strict=True)):
                dataset = read_dataset(path)
                check_header(dataset)
                stored = np.empty_like(part)
                stored[self.order] = part
                set_pixels(dataset, stored)

                # A new object of a new series, which was derived from the other.
                dataset.SOPInstanceUID = uid.generate_uid()
                dataset.SeriesInstanceUID = series
                kinds = [*dataset.get("ImageType", ())][2:]
                dataset.ImageType = ["DERIVED", "SECONDARY", *kinds]
                dataset.DerivationDescription = MADE_BY
                dataset.LossyImageCompression = "01"
                name = str(dataset.get("SeriesDescription", "")).strip()
                dataset.SeriesDescription = f"{name[:48]} reconstructed".strip()
                dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
                dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    dataset.save_as(new / f"{number:04d}.dcm", enforce_file_format=True)
            replace_folder(new, place)
        return place


def find_series(paths: Sequence[Path], root: Path) -> Iterator[Volume]:
    """Group DICOM files by folder and series; files and series that are no volume can't be read."""
    series: dict[tuple[Path, str], list[tuple[Path, Any]]] = defaultdict(list)
    for path in paths:
        key = legible(name_below(path, root))
        try:
            header = read_dataset(path, TAGS)
            check_header(header)
            uid = str(header.get("SeriesInstanceUID") or "")
            if int(header.get("NumberOfFrames") or 1) > 1 or not uid:
                yield Series(path, key, [(path, header)])
            else:
                series[path.parent, uid].append((path, header))
        except ConfigError:
            raise
        except Exception as error:  # tags of a broken file have values of all kinds
            yield Unreadable(path, key, first_reason(error))
    for (folder, uid), files in series.items():
        key = legible(name_below(folder / uid, root))
        try:
            yield Series(folder / uid, key, files)
        except Exception as error:
            yield Unreadable(folder / uid, key, first_reason(error))


def import_pydicom() -> Any:
    """Import pydicom, silent about values that break the standard; ConfigError if it is missing."""
    pydicom = import_extra("pydicom", "pydicom", "DICOM")
    import_extra("pydicom.pixels", "pydicom", "DICOM")
    # Its import sets the level.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom


def read_dataset(path: Path, tags: Sequence[str] | None = None) -> Any:
    """Read a file, or these tags of its header. Raises ValueError if it is broken."""
    pydicom = import_pydicom()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = None if tags is None else list(tags)
            dataset = pydicom.dcmread(path, stop_before_pixels=bool(tags), specific_tags=wanted)
            # Values are read when they are asked for: ask now.
            for tag in TAGS:
                dataset.get(tag)
    except OSError:
        raise
    except Exception as error:  # pydicom raises all kinds for a broken file
        raise ValueError(f"no readable DICOM: {first_reason(error)}") from error
    return dataset


def of_frame(header: Any, frame: int, sequence: str, name: str) -> Any:
    """A frame's value in its own group, the group of all frames, or the header; None if nowhere."""
    groups = (header.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in (*groups, *(header.get("SharedFunctionalGroupsSequence") or ())):
        for item in group.get(sequence) or ():
            if item.get(name) is not None:
                return item.get(name)
    return header.get(name)


def position_of(header: Any, frame: int, normal: NDArray[np.float64]) -> Any:
    """A frame's first pixel in millimetres; None if it is unknown, as a film's or a loop's."""
    place = of_frame(header, frame, "PlanePositionSequence", "ImagePositionPatient")
    offsets = header.get("GridFrameOffsetVector")  # of a dose
    alone = int(header.get("NumberOfFrames") or 1) == 1
    of_file = place is header.get("ImagePositionPatient")  # not of each frame
    if not place or (of_file and not alone and not offsets):
        return None
    offset = 0.0 if alone or not offsets else float(offsets[frame]) - float(offsets[0])
    return np.asarray(place, dtype=np.float64) + offset * normal


def check_header(header: Any) -> None:
    """Raise ValueError for a file without pixels of one channel."""
    if not header.get("Rows") or not header.get("Columns"):
        raise ValueError(f"no pixel data ({header.get('Modality') or 'no modality'})")
    kind = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    if kind == "MONOCHROME1":
        raise ValueError("its 0 is white (MONOCHROME1): save it as MONOCHROME2")
    if kind != "MONOCHROME2" or int(header.get("SamplesPerPixel") or 1) != 1:
        raise ValueError(f"colour ({kind}): its frames are pictures, save them as PNG")


def pixels_of(dataset: Any) -> Array:
    """Decode the stored values, (rows, columns) or (frames, rows, columns).

    Raises ValueError if there are none, or no decoder is installed.
    """
    if "PixelData" not in dataset:
        raise ValueError(f"no pixel data ({dataset.get('Modality') or 'no modality'})")
    if "ModalityLUTSequence" in dataset:
        raise ValueError("its units are a table (Modality LUT): save it with slope and intercept")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_compressed:
        try:
            available = import_pydicom().pixels.get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise ValueError(f"compressed ({syntax.name}), without a decoder: {HOW_TO_DECODE}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels: Array = dataset.pixel_array
    return pixels


def slopes_of(dataset: Any, frames: int) -> NDArray[np.float64]:
    """Slope and intercept of each frame, (frames, 2): in the header, or in groups of each frame."""
    both = []
    for frame in range(frames):
        slope, intercept = (
            of_frame(dataset, frame, "PixelValueTransformationSequence", name)
            for name in ("RescaleSlope", "RescaleIntercept")
        )
        if slope is None:
            slope = dataset.get("DoseGridScaling")
        both.append((1.0 if slope is None else float(slope), float(intercept or 0.0)))
    slopes = np.array(both)
    if not np.isfinite(slopes).all() or not slopes[:, 0].all():
        raise ValueError("its rescale slope is 0 or not finite: the header is broken")
    return slopes


def set_pixels(dataset: Any, values: RealArray) -> None:
    """Store frames, (frames, rows, columns) in real units, in the file's bits, uncompressed."""
    allocated = int(dataset.BitsAllocated)
    if allocated not in (8, 16, 32) or not dataset.file_meta.TransferSyntaxUID.is_little_endian:
        raise ValueError(f"{allocated} bits, big-endian or not whole bytes: can't be written")
    signed = int(dataset.PixelRepresentation)
    dtype = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    bits = int(dataset.BitsStored) - signed
    slopes = slopes_of(dataset, len(values))
    stored = np.stack(
        [
            np.clip(to_stored(frame, slope, intercept, dtype), -signed * 2**bits, 2**bits - 1)
            for frame, (slope, intercept) in zip(values, slopes, strict=True)
        ]
    )

    # The element is another one: compressed pixels have a length of their own.
    content = stored.astype(dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OB" if allocated == 8 else "OW"
    dataset["PixelData"].is_undefined_length = False
    for name in ("SmallestImagePixelValue", "LargestImagePixelValue"):
        if name in dataset:
            del dataset[name]
