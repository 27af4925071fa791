"""The slices of volumes as a source of training and evaluation images."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np

from olvae.config import ConfigError
from olvae.data.dataset import ImageDataset, MappedSource, hold_out
from olvae.data.image import ALL_FILTERS, Augment, Photo, RandomScaleCrop, stated_picture
from olvae.data.order.groups import FILE, Grouping
from olvae.data.picture_folder import find_images, name_below, say_parts, split_folders
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, RangeNode, Size
from olvae.data.places import VOLUME_SUFFIXES, is_volume_file
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.volumes.dicom import find_series
from olvae.data.volumes.nifti import Nifti
from olvae.data.volumes.nrrd_file import Nrrd
from olvae.data.volumes.volume import ACQUIRED, PLANES, Axis, Unreadable, Volume, first_reason
from olvae.files import counted, legible, lines_sha256

SliceAxis = Literal["acquired", "axial", "coronal", "sagittal", 0, 1, 2]

# Formats of one volume a file; other files of volumes are DICOM.
READ_BY: Mapping[str, Callable[[Path, str], Volume]] = {
    ".nii": Nifti,
    ".nii.gz": Nifti,
    ".nrrd": Nrrd,
    ".nhdr": Nrrd,
}
WITHOUT_WINDOW = (
    "volumes have real units: state data.params.range, the window that becomes the images, which "
    "`olvae data range SRC` measures"
)


def find_volumes(src: str | Path, closed: list[ReadError] | None = None) -> list[Volume]:
    """Find volumes: of a folder at any depth, a pattern, a list or a file, as ``find_images`` does.

    Their headers are read. Broken files are among them, as :class:`Unreadable`. A DICOM series is
    named by its folder and its UID: that path finds it, too.

    Raises FileNotFoundError: there are none.
    """
    # The files, and the folder below which they have names.
    path = Path(src).expanduser()
    series = None
    if not path.exists() and path.parent.is_dir() and path.name.replace(".", "").isdigit():
        series = path
        files = find_images(path.parent, closed, is_volume_file, VOLUME_SUFFIXES)
        files = [file for file in files if file.parent == path.parent]
    elif path.is_file() and is_volume_file(str(path)):
        files = [path]
    else:
        files = find_images(path, closed, is_volume_file, VOLUME_SUFFIXES)
    root = path
    if not path.is_dir():
        root = Path(os.path.commonpath([file.parent for file in files]))

    # A volume a file, but for DICOM.
    found: list[Volume] = []
    others = []
    for file in files:
        kinds = [kind for suffix, kind in READ_BY.items() if file.name.lower().endswith(suffix)]
        if not kinds:
            others.append(file)
            continue
        key = legible(name_below(file, root))
        try:
            found.append(kinds[0](file, key))
        except ConfigError:
            raise
        except Exception as error:  # libraries raise all kinds for a broken file
            found.append(Unreadable(file, key, first_reason(error)))
    found += find_series(others, root)
    if series is not None:
        found = [volume for volume in found if volume.path == series]
        if not found:
            raise FileNotFoundError(f"{src}: no such series in {series.parent}")
    return sorted(found, key=lambda volume: volume.key)


def open_volume(path: Path) -> Volume:
    """Open a file of a volume, or a DICOM series by its folder and UID.

    Raises UnreadableImageError.
    """
    volume = find_volumes(path)[0]
    if isinstance(volume, Unreadable):
        raise UnreadableImageError(volume.name, volume.why)
    return volume


class VolumeSlices(ImageDataset):
    """Slices of volumes by number, volume after volume, as pictures of a stated range.

    Values outside the range become its nearest end: it is a window.

    Args:
        volumes: in their order.
        pixel_range: the window; 8 bits are refused.
        axis: along which volumes are cut; see :meth:`Volume.axis_of`.
        neighbours: slices on each side that are further channels.
        skip_empty: slices are left out if a smaller share of their pixels lies above the window's
            lower end; all volumes are read for it.

    Raises ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        pixel_range: PixelRange,
        axis: Axis = ACQUIRED,
        neighbours: int = 0,
        skip_empty: float | None = None,
    ) -> None:
        if pixel_range == EIGHT_BITS:
            raise ConfigError(WITHOUT_WINDOW)
        if axis not in (ACQUIRED, *PLANES, 0, 1, 2):
            raise ConfigError(
                f"data.params.axis: expected {ACQUIRED}, {', '.join(PLANES)}, 0, 1 or 2, got {axis}"
            )
        if neighbours < 0:
            raise ConfigError(f"data.params.neighbours: expected 0 or more, got {neighbours}")
        if skip_empty is not None and not 0.0 <= skip_empty <= 1.0:
            raise ConfigError(f"data.params.skip_empty: expected 0 to 1, got {skip_empty}")
        self.volumes = list(volumes)
        self.pixel_range = replace(pixel_range, outside="clip")
        self.axis = axis
        self.neighbours = neighbours
        self.axes = [volume.axis_of(axis) for volume in volumes]

        # Each volume's slices, and how many there are up to its end.
        self.numbers: list[Sequence[int]] = []
        for volume, along in zip(volumes, self.axes, strict=True):
            numbers: Sequence[int] = range(volume.shape[along])
            if skip_empty and not isinstance(volume, Unreadable):
                numbers = self._kept(volume, along, skip_empty)
            self.numbers.append(numbers)
        self.ends = np.cumsum([len(numbers) for numbers in self.numbers])
        self._last = ("", "", "")  # a volume's key, and digests of its files

    def _kept(self, volume: Volume, along: int, least: float) -> list[int]:
        """Numbers of the slices that are not empty; all of a volume that can't be read."""
        kept = []
        low = np.float32(min(self.pixel_range.low))
        for number in range(volume.shape[along]):
            try:
                share = float((volume.slices(along, number) > low).mean())
            except UnreadableImageError:
                share = 1.0
            if share >= least:
                kept.append(number)
        return kept

    def __len__(self) -> int:
        return int(self.ends[-1])

    def describe(self) -> str:
        """Count the volumes and their slices, and name the distances of their values."""
        good = [volume for volume in self.volumes if not isinstance(volume, Unreadable)]
        if not good:
            return "no volume can be read"
        parts = zip(self.volumes, self.numbers, strict=True)
        counts = sorted(len(numbers) for volume, numbers in parts if volume in good)
        spacings = np.array([volume.spacing for volume in good])
        low, high = spacings.min(0), spacings.max(0)
        each = []
        for name, least, most in zip(("slices", "rows", "columns"), low, high, strict=True):
            each.append(f"{name} {least:.4g}" + (f" to {most:.4g}" if most > least else ""))
        return (
            f"{counted(len(good), 'volume')} of {counts[0]} to {counts[-1]} slices; "
            f"distances in mm: {', '.join(each)}"
        )

    def place(self, index: int) -> tuple[Volume, int, int]:
        """The volume of a slice, the axis along which it is cut, and the slice's number."""
        which = int(np.searchsorted(self.ends, index, side="right"))
        numbers = self.numbers[which]
        return self.volumes[which], self.axes[which], numbers[index - int(self.ends[which])]

    def key(self, index: int) -> str:
        volume, _, number = self.place(index)
        return f"{volume.key}/{number:04d}"

    def file(self, index: int) -> str:
        return self.place(index)[0].key

    def state(self, index: int) -> str:
        states, _ = self._files_of(index)
        return f"{self.key(index)}\0{self.axis} {self.neighbours} {states}"

    def identity(self, index: int) -> str:
        _, sizes = self._files_of(index)
        return f"{self.key(index)} {sizes}"

    def _files_of(self, index: int) -> tuple[str, str]:
        """Digests of the states and of the sizes of a volume's files; kept for its next slice."""
        volume, *_ = self.place(index)
        if self._last[0] != volume.key:
            states = volume.state().splitlines()
            sizes = [state.partition(" ")[0] for state in states]  # the time is another in a copy
            self._last = (volume.key, lines_sha256(states)[:16], lines_sha256(sizes)[:16])
        return self._last[1:]

    def __getitem__(self, index: int) -> Photo:
        return slice_photo(*self.place(index), self.neighbours, self.pixel_range)


def slice_photo(
    volume: Volume, axis: int, number: int, neighbours: int, window: PixelRange
) -> Photo:
    """A slice as a picture of this range. Raises UnreadableImageError."""
    values = volume.slices(axis, number, neighbours)
    channels = values.shape[2]
    try:
        picture = stated_picture(values, window)
    except ValueError as error:
        image = f"{volume.key}/{number:04d}"
        raise UnreadableImageError(
            volume.name, f"slice {number}: {first_reason(error)}", image
        ) from error
    return Photo(picture, volume.name, channels, window)


def neighbours_of(channels: int) -> int:
    """The neighbours on each side that make so many channels; 0 are any, and make one.

    Raises ConfigError for an even number.
    """
    if channels and channels % 2 == 0:
        raise ConfigError(
            f"`channels` {channels}: a slice and its neighbours on both sides are an odd number"
        )
    return channels // 2


class VolumeSource(MappedSource):
    """Slices of volumes, as of CT and MRI: NIfTI, DICOM and NRRD files of a folder.

    Values are in real units, with the files' slope and intercept, for example Hounsfield units.

    Args:
        root: a folder, searched at any depth, a pattern, for example ``scans/**/*.nii.gz``, or a
            .txt file with one path per line. DICOM files are grouped by folder and series, and
            sorted by position.
        size, batch_size, num_workers, max_unreadable: see :class:`~olvae.data.source.Source`.
        range: the window of values that becomes the images; values outside become its nearest end.
            It has to be stated.
        val_root: the validation and test volumes. Without it, if root has the folders ``train`` and
            ``val``, those are the two parts, as of
            :class:`~olvae.data.picture_folder.FolderSource`.
        val_fraction: without either, the share of the slices that is held out, in whole groups,
            evenly spread; see :func:`~olvae.data.dataset.hold_out`.
        hold_out_by: what is never parted: ``file``, a volume; ``folder``; or a pattern, see
            :class:`~olvae.data.order.groups.Grouping`.
        axis: along which volumes are cut: ``acquired``; ``axial``, ``coronal`` or ``sagittal``, the
            nearest by the file's geometry; or 0, 1 or 2, the file's columns, rows or slices.
        neighbours: slices on each side that are further channels, 1 + 2 ``neighbours`` in all.
        skip_empty: leave out slices of which a smaller share of the pixels lies above the window's
            lower end. All volumes are read at the start for it.
        min_fraction, filters, flip, augment: see :class:`RandomScaleCrop`.

    Raises FileNotFoundError: there are no volumes. ValueError: a batch is larger than the data.
    """

    def __init__(
        self,
        root: str | Path,
        size: Size,
        batch_size: int,
        num_workers: int = 0,
        val_root: str | Path | None = None,
        val_fraction: float | None = None,
        hold_out_by: str = FILE,
        axis: SliceAxis = "acquired",
        neighbours: int = 0,
        skip_empty: float | None = None,
        min_fraction: float = 0.5,
        filters: Sequence[str] = ALL_FILTERS,
        flip: bool = True,
        max_unreadable: float = 0.01,
        range: RangeNode | None = None,  # noqa: A002
        augment: Augment | None = None,
    ) -> None:
        if isinstance(range, Mapping) and range.get("outside") == "error":
            raise ConfigError("data.params.range: values of volumes clip: leave `outside` out")
        if val_root is None:
            say_parts(root, "trains on {train}, and {val} is held out")
            root, val_root = split_folders(root)
        window = PixelRange.from_node(range)

        def cut(place: str | Path) -> VolumeSlices:
            return VolumeSlices(find_volumes(place), window, axis, neighbours, skip_empty)

        # The two parts, and their volumes.
        slices = cut(root)
        train: ImageDataset = slices
        if val_root is None:
            train, val = hold_out(train, val_fraction, Grouping(hold_out_by))
            others = slices
        else:
            val = others = cut(val_root)
        self.parts: list[list[Volume]] = []
        for part, whole in ((train, slices), (val, others)):
            files = {part.file(index) for index in np.arange(len(part)).tolist()}
            self.parts.append([volume for volume in whole.volumes if volume.key in files])
        clipped = cast(RangeNode, replace(window, outside="clip").as_node())
        super().__init__(
            train,
            val,
            RandomScaleCrop(size, min_fraction, filters, flip, augment=augment),
            batch_size,
            num_workers,
            1 + 2 * neighbours,
            max_unreadable,
            range=clipped,
            hold_out_by=hold_out_by,
        )
        self.warn_of_shared_groups()

    def shared_groups(self) -> str | None:
        """As of any source, and of patients by DICOM's headers, whom a path names in the log."""
        shared = super().shared_groups()
        trained, held_out = ({volume.patient: volume.key for volume in p} for p in self.parts)
        both = sorted((trained.keys() & held_out.keys()) - {""})
        if shared is not None or not both or len(trained.keys() | held_out.keys()) == 1:
            return shared
        patients = counted(len(both), "patient")
        return (
            f"{patients} by DICOM's PatientID with series of training and of validation, such as "
            f"{trained[both[0]]} and {held_out[both[0]]}: set `hold_out_by` to a pattern that "
            "finds the patient in their paths"
        )

    def describe(self) -> str:
        volumes = [counted(len(part), "volume") for part in self.parts]
        return (
            f"{len(self.train)} training slices of {volumes[0]}, "
            f"{len(self.val)} validation and test slices of {volumes[1]}"
        )
