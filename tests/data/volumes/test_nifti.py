"""NIfTI files against nibabel: values in real units, geometry, and back."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from olvae.data.read_errors import UnreadableImageError
from olvae.data.volumes.nifti import Nifti
from olvae.data.volumes.volume_source import open_volume
from tests.data.volumes.scans import AFFINE, hounsfield, nifti, only, whole

OF_NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"


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


def test_distances_in_other_units_are_millimetres(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([8, 9, 25, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    assert volume.spacing == pytest.approx((0.025, 0.009, 0.008))
    result = volume.write(whole(volume), tmp_path / "b")
    np.testing.assert_array_equal(nibabel.load(result).affine, image.affine)


def test_a_gzip_cut_at_its_end_is_no_shorter_volume(tmp_path):
    whole = gzip.decompress(nifti(tmp_path / "a.nii.gz").read_bytes())
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(whole[:-100]))
    volume = only(tmp_path)
    with pytest.raises(ValueError, match=r"a\.nii\.gz: .*Expected \d+ bytes"):
        volume.slices(0, 0)


def test_a_slice_of_an_unpacked_file_is_read_alone(tmp_path, monkeypatch):
    """Of a packed one the whole is read, once."""
    reads = []
    read = Nifti.read
    monkeypatch.setattr(Nifti, "read", lambda self: reads.append(self.path.name) or read(self))
    for name in ("a.nii", "a.nii.gz"):
        volume = open_volume(nifti(tmp_path / name))
        for axis, index in ((0, 3), (1, 9), (2, 11)):
            plane = volume.slices(axis, index)[..., 0]
            np.testing.assert_array_equal(plane, np.take(hounsfield(), index, axis))
    assert reads == ["a.nii.gz"]


@pytest.mark.parametrize(
    ("shape", "affine", "why"),
    [
        ((8, 8, 4, 3), np.eye(4), "4 dimensions, 8x8x4x3"),
        ((8, 8, 4), np.diag([1, 0, 1, 1]), "affine has no inverse"),
        ((8, 8, 4), np.diag([1, np.nan, 1, 1]), "affine has no inverse"),
    ],
)
def test_a_header_of_no_volume_is_refused(tmp_path, shape, affine, why):
    """Of times, or with an affine that nothing can be placed by."""
    header = nibabel.Nifti1Header()
    header.set_sform(affine, code=1)
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.int16), None, header), tmp_path / "a.nii")
    with pytest.raises(UnreadableImageError, match=why):
        open_volume(tmp_path / "a.nii")


def test_a_fourth_axis_of_one_time_is_kept(tmp_path):
    stored = hounsfield().T[..., None]
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(whole(volume), hounsfield())
    after = nibabel.load(volume.write(whole(volume) + 1, tmp_path / "new"))
    assert after.shape == (24, 20, 7, 1)
    np.testing.assert_array_equal(after.get_fdata(), stored + 1)


def test_a_nifti_says_its_unit_and_the_axis_of_its_slices(tmp_path):
    assert open_volume(nifti(tmp_path / "a.nii")).spacing == pytest.approx(
        np.linalg.norm(AFFINE[:3, :3], axis=0)[::-1]
    )
    for slices, acquired in ((None, 0), (0, 2), (1, 1), (2, 0)):
        image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([8, 9, 25, 1]))
        image.header.set_dim_info(slice=slices)
        image.header.set_xyzt_units("meter" if slices == 1 else "unknown")
        nibabel.save(image, tmp_path / "b.nii")
        found = open_volume(tmp_path / "b.nii")
        assert found.acquired == acquired
        assert found.spacing[2] == (8000 if slices == 1 else 8)


def test_a_picture_of_nifti_is_one_slice(tmp_path):
    stored = np.arange(30, dtype=np.int16).reshape(5, 6)
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / "a.NII")
    found = open_volume(tmp_path / "a.NII")
    assert (found.shape, found.suffix) == ((1, 6, 5), ".nii")
    for axis, index in ((0, 0), (1, 3), (2, 4)):
        np.testing.assert_array_equal(
            found.slices(axis, index)[..., 0], np.take(stored.T[None], index, axis)
        )


def test_what_is_no_volume_of_numbers_is_refused(tmp_path, monkeypatch):
    path = nifti(tmp_path / "a.nii")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UnreadableImageError, match="file ends before its values"):
        open_volume(path)
    colour = np.zeros((8, 8, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), path)
    with pytest.raises(UnreadableImageError, match="colours and complex numbers are not read"):
        open_volume(path)
    # Packed, a file may be smaller than its values.
    zeros = nibabel.Nifti1Image(np.zeros((64, 64, 16), np.int16), np.eye(4))
    nibabel.save(zeros, tmp_path / "b.nii.gz")
    assert (tmp_path / "b.nii.gz").stat().st_size < 2000
    assert open_volume(tmp_path / "b.nii.gz").shape == (16, 64, 64)
    monkeypatch.setattr(nibabel, "load", lambda _: object())
    with pytest.raises(UnreadableImageError, match="object: no NIfTI of one file"):
        open_volume(path)
