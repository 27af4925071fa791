"""Each format against its own library: values in real units, geometry, and back."""

import sys

import nibabel
import numpy as np
import pytest

from olvae.config import ConfigError
from olvae.data.volumes.volume import to_stored
from olvae.data.volumes.volume_source import find_volumes, open_volume
from tests.data.volumes.scans import AFFINE, hounsfield, nifti, nrrd_file, only, series, whole


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
