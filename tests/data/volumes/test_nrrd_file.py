"""NRRD files against pynrrd: values, header, and back."""

import nrrd
import numpy as np
import pytest

from olvae.data.read_errors import UnreadableImageError
from olvae.data.volumes.volume_source import open_volume
from tests.data.volumes.scans import AFFINE, hounsfield, nrrd_file, whole


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


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
def test_values_of_each_encoding_come_back(tmp_path, encoding):
    place = str(tmp_path / "a.nrrd")
    nrrd.write(place, hounsfield().T, {"encoding": encoding, "spacings": [0.8, 0.9, 2.5]})
    volume = open_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(whole(volume), hounsfield())
    assert volume.spacing == pytest.approx((2.5, 0.9, 0.8))
    result = volume.write(whole(volume), tmp_path / "new")
    values, header = nrrd.read(str(result))
    np.testing.assert_array_equal(values.T, hounsfield())
    np.testing.assert_array_equal(header["spacings"], [0.8, 0.9, 2.5])


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"encoding": "ascii"}, "its encoding is ascii: save it as raw or gzip"),
        ({"kinds": ["domain", "domain", "time"]}, "its axes are domain, domain, time"),
        ({"space directions": np.diag([1.0, 0.0, 1.0])}, "space directions have no inverse"),
    ],
)
def test_a_header_of_no_volume_is_refused(tmp_path, header, why):
    with pytest.raises(UnreadableImageError, match=why):
        open_volume(nrrd_file(tmp_path / "a.nrrd", **header))


@pytest.mark.parametrize(
    ("header", "steps", "origin"),
    [
        ({}, AFFINE[:3, :3], AFFINE[:3, 3]),
        ({"space origin": None}, AFFINE[:3, :3], [0, 0, 0]),
        ({"space directions": None, "space origin": None}, np.eye(3), [0, 0, 0]),
        (
            {"space directions": None, "space origin": None, "spacings": [0.8, 0.9, 2.5]},
            np.diag([0.8, 0.9, 2.5]),
            [0, 0, 0],
        ),
    ],
)
def test_the_affine_is_of_directions_and_origin_or_of_spacings(tmp_path, header, steps, origin):
    path = nrrd_file(tmp_path / "a.nrrd")
    values, known = nrrd.read(str(path))
    merged = {name: value for name, value in {**known, **header}.items() if value is not None}
    if "space directions" not in merged:
        merged.pop("space", None)
    nrrd.write(str(path), values, merged)
    affine = open_volume(path).affine
    np.testing.assert_allclose(affine[:3, :3], steps)
    np.testing.assert_allclose(affine[:3, 3], origin)
    assert affine[3].tolist() == [0, 0, 0, 1]


def test_values_in_several_files_are_refused(tmp_path):
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 2\nencoding: raw\n"
    (tmp_path / "a.nhdr").write_text(f"{header}data file: LIST\na.raw\nb.raw\n")
    with pytest.raises(UnreadableImageError, match="several files"):
        open_volume(tmp_path / "a.nhdr")
