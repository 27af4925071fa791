"""Each format against its own library: values in real units, geometry, and back."""

import sys
from collections import OrderedDict
from itertools import permutations
from unittest.mock import Mock

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from olvae.config import ConfigError
from olvae.data.read_errors import UnreadableImageError
from olvae.data.volumes import volume as module
from olvae.data.volumes.volume import (
    Unreadable,
    Volume,
    check_bytes,
    check_dtype,
    check_shape,
    first_reason,
    to_stored,
)
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


class InMemory(Volume):
    """Values that are counted as they are read, with a geometry."""

    suffix = ".mem"

    def __init__(self, path, values, affine=None) -> None:
        self.path = path
        self.key = path.name
        self.values = values
        self.shape = values.shape
        self.affine = np.eye(4) if affine is None else affine
        self.reads = 0

    def read(self):
        self.reads += 1
        return self.values

    def write_file(self, values, place):
        if values.shape != self.shape:
            raise KeyError("the header's field")
        return place


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 6.0), (6.0, 0.5, 0.5)])
def test_an_oblique_volumes_planes_go_by_directions_and_not_by_distances(tmp_path, spacing):
    """Of all ways to give each plane an axis, the one with the largest sum of cosines."""
    turned = Rotation.from_euler("xyz", [-60, -30, 30], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turned * spacing
    volume = InMemory(tmp_path / "a", hounsfield(), affine)
    sums = {p: sum(abs(turned[i, p[i]]) for i in range(3)) for p in permutations(range(3))}
    best = max(sums, key=sums.get)
    found = [volume.axis_of(plane) for plane in ("sagittal", "coronal", "axial")]
    assert found == [2 - column for column in best] == [2, 0, 1]
    assert volume.spacing == pytest.approx(spacing[::-1])


def test_neighbours_beyond_the_ends_are_the_first_and_the_last_slice(tmp_path):
    values = np.arange(5 * 2 * 3, dtype=np.float64).reshape(5, 2, 3)
    (tmp_path / "a").touch()
    volume = InMemory(tmp_path / "a", values)
    for index, numbers in ((0, [0, 0, 0, 1, 2]), (3, [1, 2, 3, 4, 4])):
        found = volume.slices(0, index, 2)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.moveaxis(values[numbers], 0, -1))
    np.testing.assert_array_equal(volume.slices(2, 1), values[:, :, 1:2])
    assert volume.reads == 1


def test_volumes_are_kept_to_a_number_of_bytes_but_for_the_last_one(tmp_path, monkeypatch):
    """Room for two of 24 bytes in float32; what was used last stays."""
    monkeypatch.setattr(module, "KEPT_BYTES", 48)
    monkeypatch.setattr(module, "_kept", OrderedDict())
    volumes = []
    for name in "abc":
        (tmp_path / name).touch()
        volumes.append(InMemory(tmp_path / name, np.ones((1, 2, 3))))
    a, b, c = volumes
    for volume in (a, b, a, c, a, b):
        volume.slices(0, 0)
    assert [volume.reads for volume in volumes] == [1, 2, 1]
    monkeypatch.setattr(module, "KEPT_BYTES", 20)
    monkeypatch.setattr(module, "_kept", OrderedDict())
    for volume in (a, b, a):
        volume.slices(0, 0)
    assert [volume.reads for volume in volumes] == [3, 3, 1]
    large = InMemory(tmp_path / "a", np.ones((100, 2, 3)))
    monkeypatch.setattr(module, "_kept", OrderedDict())
    for index in range(3):
        large.slices(0, index)
    assert large.reads == 1


def test_errors_of_a_library_name_the_slice_and_the_volume(tmp_path):
    volume = InMemory(tmp_path / "gone", np.ones((3, 2, 3)))
    volume.read = lambda: 1 / 0
    with pytest.raises(UnreadableImageError, match="by zero") as raised:
        volume.slices(0, 2)
    assert (raised.value.name, raised.value.image) == (str(tmp_path / "gone"), "gone/0002")
    with pytest.raises(ValueError, match=r"written again: .*field"):
        volume.write(np.ones((1, 2, 3)), tmp_path)
    assert volume.write(np.ones((3, 2, 3)), tmp_path) == tmp_path
    # A missing library and a full disk are no fault of the volume.
    for error in (ConfigError("pip install"), OSError("full")):
        volume.write_file = Mock(side_effect=error)
        with pytest.raises(type(error), match=str(error)):
            volume.write(np.ones((3, 2, 3)), tmp_path)
    volume.read_slice = Mock(side_effect=ConfigError("pip install"))
    with pytest.raises(ConfigError, match="pip install"):
        volume.slices(0, 2)
    unreadable = Unreadable(tmp_path / "it", "it", "a broken header")
    with pytest.raises(ValueError, match="a broken header"):
        unreadable.write(np.ones((1, 1, 1)), tmp_path)
    assert len(first_reason(ValueError("a" * 300))) == 300
    assert len(first_reason(ValueError("a" * 301))) == 303


def test_shapes_of_a_header_are_slices_rows_columns():
    assert check_shape((24, 20, 7), "") == (7, 20, 24)
    assert check_shape((24, 20), "") == (1, 20, 24)
    assert check_shape((24, 20, 7, 1, 1), "") == (7, 20, 24)
    assert check_shape((1, 1, 1), "") == (1, 1, 1)
    assert check_shape((2**10, 2**10, 2**10), "")[0] == 2**10
    for shape, message in (
        ((4, 4, 4, 2), "it has 4 dimensions, 4x4x4x2: part it"),
        ((4, 4, 4, 2, 1), "it has 4 dimensions"),
        ((24,), "claims 24 values: no volume"),
        ((), "claims no values"),
        ((4, 0, 4), "4x0x4 values: no volume"),
        ((2**10, 2**10, 2**10 + 1), "more than 1024 Mi"),
        ((101, 1, 4), "101x1 pixels: one side"),
    ):
        with pytest.raises(ValueError, match=message):
            check_shape(shape, "part it")


def test_a_file_holds_its_values_or_by_gzip_a_thousandth(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    dtype = np.dtype(np.int16)
    check_bytes(path, 50, dtype, packed=False)
    check_bytes(path, 50 * 1032, dtype, packed=True)
    for values, packed in ((51, False), (50 * 1032 + 1, True)):
        with pytest.raises(ValueError, match=rf"claims {values} .*100 bytes"):
            check_bytes(path, values, dtype, packed)


def test_values_are_numbers_of_one_channel():
    for dtype in ("int8", "uint64", "float64", "float16"):
        check_dtype(np.dtype(dtype))
    for dtype in ("complex64", "bool", "longdouble", "V3"):
        with pytest.raises(ValueError, match="complex numbers"):
            check_dtype(np.dtype(dtype))


def test_values_beyond_the_dtype_become_its_ends():
    values = np.array([-1e9, 0.26, 1e9], dtype=np.float32)
    assert to_stored(values, 0.5, 0, np.dtype("int16")).tolist() == [-32768, 1, 32767]
    assert to_stored(values, 1, 0, np.dtype("int64")).tolist() == [-(10**9), 0, 10**9]
    assert to_stored(values, 1, 5, np.dtype("uint8")).tolist() == [0, 0, 255]
    assert to_stored(values * 1e12, 1, 0, np.dtype("int64"))[2] == 2**63 - 1024
    # Half of a step is rounded to even; floats are not.
    real = np.array([1.5, 2.5, 10.0], dtype=np.float32)
    assert to_stored(real, 1, 0, np.dtype("int16")).tolist() == [2, 2, 10]
    assert to_stored(real, 2, 1, np.dtype("float32")).tolist() == [0.25, 0.75, 4.5]


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
