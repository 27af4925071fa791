"""DICOM against pydicom: series and frames, their geometry and slopes, and back."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from olvae.data.read_errors import UnreadableImageError
from olvae.data.volumes.dicom import check_header
from olvae.data.volumes.volume_source import find_volumes, open_volume
from tests.data.volumes.scans import dicom, group, hounsfield, only, series, whole


def test_a_dicom_series_is_sorted_by_place_and_written_as_a_new_one(tmp_path):
    volume = only(series(tmp_path / "ct"))
    assert volume.key == "1.2.826.7"
    new = hounsfield(1).astype(np.float32)
    result = volume.write(new + 0.2, tmp_path / "new")
    files = [pydicom.dcmread(path) for path in sorted(result.iterdir())]
    assert len({one.SeriesInstanceUID for one in files} | {volume.key}) == 2
    assert len({one.SOPInstanceUID for one in files}) == 7
    for number, one in enumerate(files):
        real = one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept)
        np.testing.assert_array_equal(real, new[number])
        assert one.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert one.LossyImageCompression == "01"
        assert one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID
        assert one.ImagePositionPatient == [-9, 4, 7 + 2.5 * number]
        assert one.PatientID == "1CT1"
    again = only(result)
    np.testing.assert_array_equal(again.affine, volume.affine)


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small_RLE.dcm", "MR_small_implicit.dcm", "rtdose.dcm"]
)
def test_pydicoms_own_files_come_back_as_pydicom_reads_them(tmp_path, name):
    path = Path(get_testdata_file(name))
    before = pydicom.dcmread(path)
    volume = open_volume(path)
    stored = before.pixel_array.reshape(volume.shape).astype(float)
    slope = float(before.get("RescaleSlope") or before.get("DoseGridScaling") or 1)
    real = stored * slope + float(before.get("RescaleIntercept") or 0)
    np.testing.assert_array_equal(whole(volume), real.astype(np.float32))
    (result,) = volume.write(whole(volume), tmp_path / "new").iterdir()
    after = pydicom.dcmread(result)
    np.testing.assert_array_equal(after.pixel_array, before.pixel_array)


def test_frames_have_their_own_slopes(tmp_path):
    def rescaled(slope):
        item = pydicom.Dataset()
        item.RescaleSlope, item.RescaleIntercept, item.RescaleType = slope, -1, "US"
        group = pydicom.Dataset()
        group.PixelValueTransformationSequence = [item]
        return group

    path = dicom(tmp_path / "a.dcm", np.ones((2, 4, 5)), RescaleSlope=None, RescaleIntercept=None)
    dataset = pydicom.dcmread(path)
    dataset.PerFrameFunctionalGroupsSequence = [rescaled(2), rescaled(4)]
    dataset.save_as(path)
    values = whole(open_volume(path))
    assert values[:, 0, 0].tolist() == [1025 * 2 - 1, 1025 * 4 - 1]
    (result,) = open_volume(path).write(values, tmp_path / "new").iterdir()
    np.testing.assert_array_equal(whole(open_volume(result)), values)


def test_frames_are_sorted_by_their_own_places_and_come_back_in_the_files_order(tmp_path):
    """An enhanced file: sagittal frames in any order, geometry and units in groups of frames."""

    real = hounsfield()
    order = [4, 0, 6, 2, 1, 5, 3]
    absent = ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope")
    absent += ("RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient")
    path = dicom(tmp_path / "a.dcm", real[order], **dict.fromkeys(absent))
    dataset = pydicom.dcmread(path)
    for name in absent:
        delattr(dataset, name)
    shared = group(
        PixelMeasuresSequence={"PixelSpacing": [0.9, 0.8], "SliceThickness": 9},
        PlaneOrientationSequence={"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        PixelValueTransformationSequence={"RescaleSlope": 1, "RescaleIntercept": -1024},
    )
    places = [{"ImagePositionPatient": [3.0 - 2.5 * number, 0, 0]} for number in order]
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = [group(PlanePositionSequence=p) for p in places]
    dataset.save_as(path)
    volume = open_volume(path)
    np.testing.assert_array_equal(whole(volume), real)
    assert volume.spacing == pytest.approx((2.5, 0.9, 0.8))
    assert [volume.axis_of(plane) for plane in ("sagittal", "axial", "coronal")] == [0, 1, 2]
    assert volume.affine[:3, 3].tolist() == [3, 0, 0]
    (result,) = volume.write(whole(volume), tmp_path / "new").iterdir()
    np.testing.assert_array_equal(pydicom.dcmread(result).pixel_array, dataset.pixel_array)

    # More frames than the file has bytes.
    dataset.NumberOfFrames = 2**21
    dataset.save_as(path)
    with pytest.raises(UnreadableImageError, match="file ends"):
        open_volume(path)
    dataset.NumberOfFrames = 7

    # Several echoes in one file.
    for one in dataset.PerFrameFunctionalGroupsSequence[:3]:
        one.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 0]
    dataset.save_as(path)
    with pytest.raises(UnreadableImageError, match="2 of its slices"):
        open_volume(path)


def test_spacing_is_kept_without_positions_and_a_slope_of_0_is_refused(tmp_path):
    dose = open_volume(Path(get_testdata_file("rtdose.dcm")))
    assert dose.spacing == (5, 10, 10)
    unplaced = {"ImagePositionPatient": None, "PixelSpacing": [0.9, 0.8]}
    path = dicom(tmp_path / "a.dcm", hounsfield()[3], **unplaced)
    assert open_volume(path).spacing[1:] == (0.9, 0.8)
    with pytest.raises(UnreadableImageError, match="slope is 0"):
        open_volume(dicom(path, hounsfield()[3], RescaleSlope=0)).slices(0, 0)


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({}, None),
        ({"SamplesPerPixel": None, "PhotometricInterpretation": None}, None),
        ({"Rows": None}, r"no pixel data \(CT\)"),
        ({"Columns": 0}, r"no pixel data \(CT\)"),
        ({"Rows": None, "Columns": None, "Modality": None}, r"no pixel data \(no modality\)"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, r"its 0 is white \(MONOCHROME1\)"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, r"colour \(RGB\)"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"SamplesPerPixel": 3}, "colour"),
    ],
)
def test_headers_of_files_without_pixels_of_one_channel(tags, why):
    header = {"Rows": 2, "Columns": 3, "Modality": "CT"}
    header |= {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", **tags}
    with nullcontext() if why is None else pytest.raises(ValueError, match=why):
        check_header(header)


def test_a_series_that_is_no_volume_is_refused_in_a_line(tmp_path):
    plane = hounsfield()[3]
    place = {"SeriesInstanceUID": "1.2.9", "ImagePositionPatient": [0, 0, 1]}
    dicom(tmp_path / "a" / "1", plane, **place)
    dicom(tmp_path / "a" / "2", plane, **place)
    dicom(tmp_path / "b" / "1", plane, **place)
    dicom(tmp_path / "b" / "2", plane[:10], **place)
    turned = {**place, "ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}
    dicom(tmp_path / "c" / "1", plane, **place)
    dicom(tmp_path / "c" / "2", plane, **turned)
    found = find_volumes(tmp_path)
    for volume, why in zip(found, ["lie where another", "several sizes", "parallel"], strict=True):
        with pytest.raises(UnreadableImageError, match=why):
            volume.slices(0, 0)
        with pytest.raises(UnreadableImageError, match=why):
            open_volume(volume.path)
