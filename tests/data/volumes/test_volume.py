"""Each format against its own library: values in real units, geometry, and back."""

import sys
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from olvae.config import ConfigError
from olvae.data.read_errors import UnreadableImageError
from olvae.data.volumes.volume import to_stored
from olvae.data.volumes.volume_source import find_volumes, open_volume
from tests.data.volumes.scans import AFFINE, dicom, hounsfield, nifti, nrrd_file, series, whole

OF_NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"


def only(place: Path):
    (volume,) = find_volumes(place)
    return volume


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "series"])
def test_slices_of_all_axes_are_in_real_units(tmp_path, name):
    makers = {"series": series, "a.nrrd": nrrd_file}
    made = makers.get(name, nifti)(tmp_path / name)
    volume = only(made) if made.is_dir() else open_volume(made)
    assert volume.shape == (7, 20, 24)
    for axis in range(3):
        np.testing.assert_array_equal(whole(volume, axis), hounsfield())
    wanted = np.linalg.norm(AFFINE[:3, :3], axis=0)[::-1]
    if name == "series":
        wanted = [2.5, 0.9, 0.8]
    np.testing.assert_allclose(volume.spacing, wanted, rtol=1e-6)


def test_a_nifti_is_written_with_its_dtype_slope_and_geometry(tmp_path):
    source = nifti(tmp_path / "a.nii.gz")
    new = hounsfield(1).astype(np.float32)
    result = open_volume(source).write(new + 0.1, tmp_path / "new")
    assert result.name == "new.nii.gz"
    before, after = nibabel.load(source), nibabel.load(result)
    np.testing.assert_array_equal(after.get_fdata().T, new)  # rounded to the slope, .5
    assert after.get_data_dtype() == before.get_data_dtype() == np.int16
    assert (after.dataobj.slope, after.dataobj.inter) == (0.5, -1024)
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.header.get_zooms() == before.header.get_zooms()
    for field in ("qform_code", "sform_code", "xyzt_units", "descrip"):
        assert after.header[field] == before.header[field]


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii"])
def test_nibabels_own_files_come_back_as_nibabel_reads_them(tmp_path, name):
    volume = open_volume(OF_NIBABEL / name)
    before = nibabel.load(OF_NIBABEL / name)
    values = whole(volume)
    np.testing.assert_array_equal(values.T, before.get_fdata(dtype=np.float32))
    after = nibabel.load(volume.write(values, tmp_path / "new"))
    np.testing.assert_array_equal(after.get_fdata(), before.get_fdata())
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.get_data_dtype() == before.get_data_dtype()


def test_a_nrrd_is_written_with_its_header(tmp_path):
    source = nrrd_file(tmp_path / "a.nrrd")
    result = open_volume(source).write(hounsfield(1) + np.float32(0.2), tmp_path / "new")
    values, header = nrrd.read(str(result))
    np.testing.assert_array_equal(values.T, hounsfield(1))
    assert values.dtype == np.int16
    _, before = nrrd.read(str(source))
    assert set(header) == set(before)
    np.testing.assert_array_equal(header["space directions"], before["space directions"])
    np.testing.assert_array_equal(header["space origin"], before["space origin"])
    assert header["modality"] == "CT"

    # A header apart from its values.
    nrrd.write(str(tmp_path / "b.nhdr"), hounsfield().T, detached_header=True)
    volume = open_volume(tmp_path / "b.nhdr")
    np.testing.assert_array_equal(whole(volume), hounsfield())
    result = volume.write(whole(volume), tmp_path / "c")
    np.testing.assert_array_equal(nrrd.read(str(result))[0].T, hounsfield())


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


def test_distances_in_other_units_are_millimetres(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([8, 9, 25, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    assert volume.spacing == pytest.approx((0.025, 0.009, 0.008))
    result = volume.write(whole(volume), tmp_path / "b")
    np.testing.assert_array_equal(nibabel.load(result).affine, image.affine)


def test_frames_are_sorted_by_their_own_places_and_come_back_in_the_files_order(tmp_path):
    """An enhanced file: sagittal frames in any order, geometry and units in groups of frames."""

    def group(**sequences):
        found = pydicom.Dataset()
        for name, tags in sequences.items():
            item = pydicom.Dataset()
            for tag, value in tags.items():
                setattr(item, tag, value)
            setattr(found, name, [item])
        return found

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
    with pytest.raises(UnreadableImageError, match="the file ends before its values"):
        open_volume(path)
    dataset.NumberOfFrames = 7

    # Several echoes in one file.
    for one in dataset.PerFrameFunctionalGroupsSequence[:3]:
        one.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 0]
    dataset.save_as(path)
    with pytest.raises(UnreadableImageError, match="2 of its slices lie where another does"):
        open_volume(path)


def test_spacing_is_kept_without_positions_and_a_slope_of_0_is_refused(tmp_path):
    dose = open_volume(Path(get_testdata_file("rtdose.dcm")))
    assert dose.spacing == (5, 10, 10)
    unplaced = {"ImagePositionPatient": None, "PixelSpacing": [0.9, 0.8]}
    path = dicom(tmp_path / "a.dcm", hounsfield()[3], **unplaced)
    assert open_volume(path).spacing[1:] == (0.9, 0.8)
    with pytest.raises(UnreadableImageError, match="its rescale slope is 0"):
        open_volume(dicom(path, hounsfield()[3], RescaleSlope=0)).slices(0, 0)


def test_axes_have_the_planes_names(tmp_path):
    image = nibabel.load(nifti(tmp_path / "a.nii"))
    turned = nibabel.as_closest_canonical(image)
    turned = turned.as_reoriented([[1, 1], [2, -1], [0, 1]])  # axes: S, R, A
    nibabel.save(turned, tmp_path / "b.nii")
    volume = open_volume(tmp_path / "b.nii")
    world = {"sagittal": 24, "coronal": 20, "axial": 7}
    for plane, count in world.items():
        assert volume.shape[volume.axis_of(plane)] == count
    assert [volume.axis_of(axis) for axis in (0, 1, 2, "acquired")] == [2, 1, 0, 0]
    turned.header.set_dim_info(slice=0)
    nibabel.save(turned, tmp_path / "c.nii")
    assert open_volume(tmp_path / "c.nii").acquired == 2


def test_values_beyond_the_dtype_become_its_ends():
    values = np.array([-1e9, 0.26, 1e9], dtype=np.float32)
    assert to_stored(values, 0.5, 0, np.dtype("int16")).tolist() == [-32768, 1, 32767]
    assert to_stored(values, 1, 0, np.dtype("int64")).tolist() == [-(10**9), 0, 10**9]


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [
        ("nibabel", "a.nii", "nibabel"),
        ("pydicom", "a.dcm", "pydicom"),
        ("nrrd", "a.nrrd", "pynrrd"),
    ],
)
def test_a_missing_library_is_named(tmp_path, monkeypatch, module, name, package):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        find_volumes(tmp_path)


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
