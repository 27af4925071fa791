import os
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydicom.data import get_testdata_file

from olvae.config import ConfigError, instantiate
from olvae.data import audit
from olvae.data.opening import open_source, trains_on
from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.places import FOLDER, VOLUMES, load
from olvae.data.value_range import measure_range
from olvae.data.volumes.volume_source import VolumeSlices, VolumeSource, find_volumes
from olvae.files import warn_once
from tests.data.images import picture
from tests.data.volumes.scans import SHAPE, WINDOW, dicom, hounsfield, nifti, nrrd_file, series


@pytest.fixture
def patients(tmp_path) -> Path:
    """Two scans each of five patients, in all formats."""
    root = tmp_path / "scans"
    for number in range(5):
        folder = root / f"patient{number}"
        nifti(folder / "a.nii.gz", hounsfield(2 * number))
        if number % 2:
            series(folder / "b", hounsfield(2 * number + 1), f"1.2.826.{number}")
        else:
            nrrd_file(folder / "b.nrrd", hounsfield(2 * number + 1))
    return root


def source(root: Path, **arguments) -> VolumeSource:
    return VolumeSource(str(root), **{"size": 16, "batch_size": 4, "range": WINDOW, **arguments})


def test_no_volume_is_on_both_sides_nor_a_patient_by_a_pattern(patients):
    s = source(patients)
    train, val = ({part.file(i) for i in range(len(part))} for part in (s.train, s.val))
    assert not train & val
    assert len(train) + len(val) == 10
    assert (
        s.describe()
        == "56 training slices of 8 volumes, 14 validation and test slices of 2 volumes"
    )
    s = source(patients, hold_out_by=r"(?P<group>patient\d+)")
    train, val = (
        {part.file(i).split("/")[0] for i in range(len(part))} for part in (s.train, s.val)
    )
    assert not train & val
    assert train | val == {f"patient{number}" for number in range(5)}


def test_series_of_a_patient_on_both_sides_are_a_warning_by_their_headers(tmp_path, caplog):
    """A folder is a series here, which keeps no patient together; a pattern does."""
    for patient in range(3):
        for place in ("1", "2"):
            tags = {"SeriesInstanceUID": f"1.2.{patient}.{place}", "PatientID": f"Doe{patient}"}
            folder = tmp_path / f"case{patient}" / place
            dicom(folder / "0", hounsfield()[3], **tags, ImagePositionPatient=[0, 0, 0])
            dicom(folder / "1.IMA", hounsfield()[4], **tags, ImagePositionPatient=[0, 0, 1])

    assert [volume.shape[0] for volume in find_volumes(tmp_path)] == [2] * 6

    def warnings(how: str) -> list[str]:
        caplog.clear()
        warn_once.cache_clear()
        found = source(tmp_path, batch_size=2, hold_out_by=how)
        assert [found.shared_groups()] == (caplog.messages or [None])
        return caplog.messages

    assert warnings(r"(?P<group>case\d)") == []
    for how in ("file", "folder"):
        (line,) = warnings(how)
        assert "PatientID with series of training and of validation" in line
        assert "case0/2/1.2.0.2 and case0/1/1.2.0.1: set `hold_out_by`" in line
        assert "Doe" not in line


def test_a_list_or_a_file_of_volumes_is_known_as_trained_on_but_for_held_out_ones(
    patients, tmp_path
):
    params = {"root": str(patients), "size": 16, "batch_size": 4, "range": WINDOW}
    params |= {"val_fraction": 0.3, "hold_out_by": r"(?P<group>patient\d)"}
    trained, held_out = ([volume.path for volume in part] for part in source(**params).parts)
    (tmp_path / "held_out.txt").write_text("\n".join(map(str, held_out[:1])))
    (tmp_path / "both.txt").write_text(f"{held_out[0]}\n{trained[0]}")
    for root in (str(patients), f"{patients}/**/*"):
        config = {"data": {"target": VOLUMES, "params": {**params, "root": root}}}
        for src in (tmp_path / "both.txt", trained[0]):
            assert trains_on(config, str(src))
        for src in (tmp_path / "held_out.txt", held_out[0]):
            assert not trains_on(config, str(src))


def test_slices_are_clipped_to_the_window_with_their_neighbours(patients):
    s = source(patients, neighbours=1, min_fraction=1.0, flip=False, size=(20, 24))
    number = next(i for i in range(len(s.train)) if s.train.key(i) == "patient1/a.nii.gz/0006")
    image = torch.from_numpy(np.stack([np.asarray(band) for band in s.train[number].read().bands]))
    real = hounsfield(2).clip(*WINDOW)
    np.testing.assert_array_equal(image, real[[5, 6, 6]])  # the last one is repeated
    assert s.channels == 3


def test_empty_slices_are_skipped_by_the_stated_share(patients):
    share = (12 * 14) / (20 * 24)  # of the body, in all slices but the first and the last
    s = source(patients, skip_empty=0.9 * share)
    assert len(s.train) + len(s.val) == 10 * (SHAPE[0] - 2)
    assert {s.val.key(i)[-4:] for i in range(len(s.val))} == {f"{i:04d}" for i in range(1, 6)}
    assert len(source(patients, skip_empty=0.0).val) == len(source(patients).val)


@pytest.mark.parametrize(
    ("wrong", "mistake"),
    [
        ({"axis": "oblique"}, "axis"),
        ({"neighbours": -1}, "neighbours"),
        ({"skip_empty": 2.0}, "skip_empty"),
        ({"range": None}, "state data.params.range"),
        ({"range": {"pairs": [0, 1], "outside": "error"}}, "clip"),
        ({"hold_out_by": "(?P<group>hospital)"}, "finds no group"),
    ],
)
def test_mistakes_name_the_setting(patients, wrong, mistake):
    with pytest.raises(ValueError, match=mistake):
        source(patients, **wrong)


def test_a_folder_of_volumes_is_found_and_one_with_pictures_is_not(patients, tmp_path):
    data = load(["not_rgb/xray"], [f"data.params.root={patients}", "data.params.size=16"])["data"]
    assert data["target"] == VOLUMES
    assert instantiate(data).channels == 1
    assert load(["not_rgb/ct"])["data"]["target"] == VOLUMES  # whose folder is not there yet

    picture(0).save(patients / "preview.png")
    plain = load(["not_rgb/xray"], [f"data.params.root={patients}"])["data"]
    assert plain["target"] == FOLDER
    stated = load(["not_rgb/ct"], [f"data.params.root={patients}"])["data"]
    assert stated["target"] == VOLUMES

    one = str(patients / "patient0" / "a.nii.gz")
    window = PixelRange.from_node(WINDOW)
    assert open_source(one, 16, 1, channels=1, pixel_range=window).val_images == SHAPE[0]
    assert len(find_volumes(patients / "*" / "*.nrrd")) == 3
    listing = tmp_path / "list.txt"
    listing.write_text("# of one\nscans/patient0/a.nii.gz\n")
    assert [volume.key for volume in find_volumes(listing)] == ["a.nii.gz"]
    with pytest.raises(ConfigError, match="odd number"):
        open_source(one, 16, 1, channels=2, pixel_range=window)


def test_the_range_is_measured_in_real_units(patients):
    found = measure_range(str(patients))
    assert found.images == 70
    assert found.percentiles[0, 0] == -1000
    assert 800 < found.percentiles[0, -1] < 900


def test_a_slices_state_follows_the_files_of_its_volume(tmp_path):
    scans = tmp_path / "scans"
    nifti(scans / "a.nii")
    series(scans / "b")
    window = PixelRange.from_node(WINDOW)

    def states() -> tuple[list[str], list[str]]:
        images = VolumeSlices(find_volumes(scans), window)
        return [images.state(i) for i in range(14)], [images.identity(i) for i in range(14)]

    before, names = states()
    assert len(set(before)) == len(set(names)) == 14
    os.utime(scans / "b" / "IM0000", (1, 1))
    after, same = states()
    assert same == names
    assert [a == b for a, b in zip(after, before, strict=True)] == [True] * 7 + [False] * 7


def break_files(root: Path) -> dict[str, str]:
    """Write a good volume and twelve broken files; return each one's reason by the file's name."""
    plane = hounsfield()[3]
    nifti(root / "good.nii.gz")
    whole = (root / "good.nii.gz").read_bytes()
    (root / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (root / "empty.nii").touch()
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 4, 3)), np.eye(4)), root / "times.nii")
    colour = np.zeros((8, 8, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), root / "colour.nii")
    nrrd_file(root / "nan.nrrd", np.full((2, 8, 8), np.nan, dtype=np.float32))
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 90 90 9\nencoding: raw\n\n"
    (root / "header.nrrd").write_text(header)
    (root / "text.dcm").write_text("no DICOM")
    (root / "plan.dcm").write_bytes(Path(get_testdata_file("rtplan.dcm")).read_bytes())
    (root / "colour.dcm").write_bytes(Path(get_testdata_file("SC_rgb_small_odd.dcm")).read_bytes())
    dicom(root / "white.dcm", plane, PhotometricInterpretation="MONOCHROME1")
    packed = pydicom.dcmread(get_testdata_file("MR_small_jpeg_ls_lossless.dcm"))
    packed.SeriesInstanceUID = "1.2.5"
    packed.save_as(root / "packed.dcm")
    dicom(root / "1.dcm", plane, SeriesInstanceUID="1.2.4", ImagePositionPatient=[0, 0, 1])
    dicom(root / "2.dcm", plane[:9], SeriesInstanceUID="1.2.4", ImagePositionPatient=[0, 0, 2])
    return {
        "cut.nii.gz": "ended before",
        "empty.nii": "Empty file",
        "times.nii": "4 dimensions, 8x8x4x3: save each volume",
        "colour.nii": "colours",
        "nan.nrrd": "not a number",
        "header.nrrd": "the file ends before its values",
        "text.dcm": "no readable DICOM",
        "plan.dcm": "no pixel data (RTPLAN)",
        "colour.dcm": "colour (RGB)",
        "white.dcm": "MONOCHROME1",
        "1.2.5": "without a decoder: pip install",
        "1.2.4": "several sizes",
    }


@pytest.mark.usefixtures("one_process")
def test_a_check_of_broken_files_has_a_line_for_each(tmp_path, monkeypatch):
    reasons = break_files(tmp_path)
    monkeypatch.setattr(audit, "PRINTED_NAMES", 20)
    window = PixelRange.from_node({"pairs": WINDOW, "outside": "clip"})
    result = audit.audit_source(str(tmp_path), 8, 1, pixel_range=window)
    assert result is not None
    lines = [line for line in audit.audit_lines(result) if line.startswith("unreadable: ")]
    assert len(lines) == len(reasons)
    for name, why in reasons.items():
        (line,) = (line for line in lines if line.startswith(f"unreadable: {tmp_path}/{name}: "))
        assert why in line
    assert any("volumes of 1 to 7 slices; " in line for line in result.notes)
    assert "more than `max_unreadable`" in result.problems[-1]


@pytest.mark.usefixtures("one_process")
def test_a_check_finds_a_volume_in_both_folders_and_takes_no_empty_slice_for_a_copy(tmp_path):
    for number, name in enumerate(("train/a", "train/b", "val/c", "val/d")):
        nifti(tmp_path / f"{name}.nii.gz", hounsfield(number))
    nrrd_file(tmp_path / "val" / "e.nrrd", hounsfield(1))
    window = PixelRange.from_node({"pairs": WINDOW, "outside": "clip"})
    result = audit.audit_source(str(tmp_path), 8, 1, pixel_range=window)
    assert result is not None
    (problem,) = result.problems
    assert problem.startswith("1 of the validation images are training images as well: ")
    assert "val/e.nrrd (the pixels of train/b.nii.gz)" in problem
