"""Slices of volumes in memory: numbers, names, states, and what is left out."""

import math
from pathlib import Path

import numpy as np
import pytest

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.read_errors import UnreadableImageError
from olvae.data.volumes import volume_source as module
from olvae.data.volumes.volume import Unreadable
from olvae.data.volumes.volume_source import (
    VolumeSlices,
    VolumeSource,
    find_volumes,
    neighbours_of,
    open_volume,
    slice_photo,
)
from olvae.files import lines_sha256
from tests.data.volumes.scans import WINDOW, hounsfield, nifti, series
from tests.data.volumes.test_volume import InMemory

RANGE = PixelRange.from_node([0, 100])


def volume(tmp_path: Path, name: str, *shape: int, spacing: float = 1.0) -> InMemory:
    (tmp_path / name).write_bytes(bytes(7))
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    return InMemory(tmp_path / name, values, np.diag([1.0, 1.0, spacing, 1.0]))


def test_slices_are_numbered_volume_after_volume(tmp_path):
    volumes = [volume(tmp_path, "a", 3, 4, 5), volume(tmp_path, "b", 2, 6, 7, spacing=2.5)]
    found = VolumeSlices(volumes, RANGE)
    assert len(found) == 5
    assert [found.key(index) for index in (0, 2, 3, 4)] == [
        "a/0000",
        "a/0002",
        "b/0000",
        "b/0001",
    ]
    assert [found.file(index) for index in range(5)] == ["a"] * 3 + ["b"] * 2
    assert found.place(4) == (volumes[1], 0, 1)
    assert found.describe() == (
        "2 volumes of 2 to 3 slices; distances in mm: slices 1 to 2.5, rows 1, columns 1"
    )
    # Along the file's columns.
    across = VolumeSlices(volumes, RANGE, axis=0, neighbours=1)
    assert (len(across), across.place(5)) == (12, (volumes[1], 2, 0))
    photo = across[6]
    assert (photo.name, photo.channels, photo.pixel_range.outside) == (
        str(tmp_path / "b"),
        3,
        "clip",
    )
    bands = np.stack([np.asarray(band) for band in photo.read().bands])
    np.testing.assert_array_equal(bands, np.moveaxis(volumes[1].values, 2, 0)[:3].clip(0, 100))


def test_volumes_that_can_not_be_read_are_one_slice(tmp_path):
    broken = Unreadable(tmp_path / "x", "x", "bad")
    good = volume(tmp_path, "a", 3, 4, 5)
    found = VolumeSlices([broken, good], RANGE, skip_empty=0.5)
    assert (len(found), found.key(0)) == (4, "x/0000")
    assert found.describe().startswith("1 volume of 3 to 3 slices; ")
    assert VolumeSlices([broken], RANGE).describe() == "no volume can be read"


def test_a_slice_is_kept_if_so_many_values_are_above_the_windows_end(tmp_path):
    values = np.zeros((4, 2, 2), dtype=np.float32)
    values[1, 0, 0] = 1
    values[2, 0] = 1
    one = InMemory(tmp_path / "a", values)
    (tmp_path / "a").touch()

    def kept(least: float | None, low: float = 0.0) -> list[int]:
        window = PixelRange.from_node([[low, 100]])
        return list(VolumeSlices([one], window, skip_empty=least).numbers[0])

    assert kept(None) == kept(0.0) == [0, 1, 2, 3]
    assert kept(0.25) == [1, 2]
    assert kept(0.5) == [2]
    assert kept(0.5, low=-1.0) == [0, 1, 2, 3]
    # What can't be read is counted when it is read.
    one.read_slice = lambda axis, number: 1 / 0 if number == 3 else values[number]
    assert kept(1.0) == [3]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"axis": 2}, {"axis": 3}),
        ({"axis": "coronal"}, {"axis": "oblique"}),
        ({"neighbours": 0}, {"neighbours": -1}),
        ({"skip_empty": 1.0}, {"skip_empty": 1.1}),
        ({"skip_empty": 0.0}, {"skip_empty": -0.1}),
    ],
)
def test_settings_have_ends(tmp_path, right, wrong):
    volumes = [volume(tmp_path, "a", 3, 4, 5)]
    VolumeSlices(volumes, RANGE, **right)
    with pytest.raises(ConfigError, match=rf"data\.params\.{next(iter(wrong))}: "):
        VolumeSlices(volumes, RANGE, **wrong)
    with pytest.raises(ConfigError, match=r"state data\.params\.range"):
        VolumeSlices(volumes, EIGHT_BITS)


def test_a_slices_state_is_of_the_files_of_its_volume(tmp_path):
    volumes = [volume(tmp_path, "a", 2, 4, 5), volume(tmp_path, "b", 2, 4, 5)]
    asked = []
    for one in volumes:
        one.state = lambda name=one.key: [asked.append(name), f"7 {name}\n8 x"][1]
    found = VolumeSlices(volumes, RANGE, axis="axial", neighbours=2)
    states, sizes = (lines_sha256(lines)[:16] for lines in (["7 a", "8 x"], ["7", "8"]))
    assert found.state(1) == f"a/0001\0axial 2 {states}"
    assert found.identity(0) == f"a/0000 {sizes}"
    assert found.identity(2) == f"b/0000 {sizes}"
    assert asked == ["a", "b"]


def test_a_slice_that_does_not_fit_is_named(tmp_path):
    one = volume(tmp_path, "a", 3, 4, 5)
    one.values[1, 2, 3] = np.nan
    with pytest.raises(UnreadableImageError, match="slice 1: nan at row 2, column 3") as error:
        slice_photo(one, 0, 1, 0, RANGE)
    assert (error.value.name, error.value.image) == (str(tmp_path / "a"), "a/0001")


def test_so_many_channels_are_a_slice_and_its_neighbours():
    assert [neighbours_of(channels) for channels in (0, 1, 3, 5)] == [0, 0, 1, 2]
    for channels in (2, 4):
        with pytest.raises(ConfigError, match=f"`channels` {channels}: a slice and its neighb"):
            neighbours_of(channels)


def test_patients_on_both_sides_are_named_by_their_series(tmp_path, monkeypatch):
    monkeypatch.setattr(module.MappedSource, "shared_groups", lambda _: None)

    def shared(train: str, held_out: str) -> str | None:
        source = VolumeSource.__new__(VolumeSource)
        source.parts = []
        for side, patients in (("t", train), ("v", held_out)):
            part = []
            for number, patient in enumerate(patients):
                part.append(volume(tmp_path, f"{side}{number}", 1, 1, 1))
                part[-1].patient = patient.strip("-")
            source.parts.append(part)
        return source.shared_groups()

    assert shared("ab", "cd") is None
    assert shared("a-", "b-") is None
    assert shared("aa", "aa") is None  # one patient alone
    line = shared("ba", "acb")
    assert line.startswith("2 patients by DICOM's PatientID with series of training and of valid")
    assert "such as t1 and v0: set" in line
    monkeypatch.setattr(module.MappedSource, "shared_groups", lambda _: "by groups")
    assert shared("ab", "ab") == "by groups"


def test_a_series_is_found_by_its_uid(tmp_path):
    series(tmp_path / "ct")
    nifti(tmp_path / "a.nii")
    keys = [one.key for one in find_volumes(tmp_path)]
    assert keys == ["a.nii", "ct/1.2.826.7"]
    assert [one.key for one in find_volumes(tmp_path / "ct" / "1.2.826.7")] == ["1.2.826.7"]
    with pytest.raises(FileNotFoundError, match=r"1\.2\.3: no such series in .*ct"):
        find_volumes(tmp_path / "ct" / "1.2.3")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_volumes(tmp_path / "ct" / "no.uid")
    (tmp_path / "b.nii").write_bytes(b"no volume")
    broken = find_volumes(tmp_path)[1]
    assert (broken.key, broken.path, type(broken)) == ("b.nii", tmp_path / "b.nii", Unreadable)


def test_a_sources_settings_are_those_of_its_slices_and_crops(tmp_path):
    for name in ("train/a", "train/b", "val/c"):
        nifti(tmp_path / f"{name}.nii", hounsfield())
    root = tmp_path / "train"
    s = VolumeSource(
        root,
        [8, 9],
        2,
        3,
        tmp_path / "val",
        None,
        "file",
        "acquired",
        1,
        None,
        0.9,
        ["box"],
        False,
        0.2,
        WINDOW,
        {"turns": False},
    )
    assert (s.size, s.batch_size, s.num_workers, s.channels) == ((8, 9), 2, 3, 3)
    assert (s.transform.min_fraction, s.transform.filters, s.transform.flip) == (
        0.9,
        ["box"],
        False,
    )
    assert (s.transform.augment, s.max_unreadable) == ({"turns": False}, 0.2)
    assert (s.samples_per_epoch, s.val_images, s.pixel_range.outside) == (14, 7, "clip")
    assert [[one.key for one in part] for part in s.parts] == [["a.nii", "b.nii"], ["c.nii"]]
    # As the folder's two parts, and as a part of one.
    both = VolumeSource(tmp_path, 8, 2, range=WINDOW)
    assert [[one.key for one in part] for part in both.parts] == [["a.nii", "b.nii"], ["c.nii"]]
    split = VolumeSource(root, 8, 2, range=WINDOW)
    assert [[one.key for one in part] for part in split.parts] == [["b.nii"], ["a.nii"]]
    assert split.describe() == (
        "7 training slices of 1 volume, 7 validation and test slices of 1 volume"
    )


def test_one_volume_is_opened_or_refused(tmp_path, monkeypatch):
    path = nifti(tmp_path / "b.nii")
    nifti(tmp_path / "a.nii")
    assert open_volume(path).path == path
    assert open_volume(tmp_path).key == "a.nii"
    path.write_bytes(b"no volume")
    with pytest.raises(UnreadableImageError) as error:
        open_volume(path)
    assert error.value.name == str(path)

    def missing(*_: object) -> None:
        raise ConfigError("pip install nibabel")

    monkeypatch.setattr(module, "READ_BY", {".nii": missing})
    with pytest.raises(ConfigError, match="pip install nibabel"):
        find_volumes(tmp_path)
