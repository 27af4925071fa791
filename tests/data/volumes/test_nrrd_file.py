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


HEADER = "NRRD0004\ntype: short\ndimension: 3\nsizes: 9 8 2\nencoding: raw\nendian: little\n"


@pytest.mark.parametrize("field", ["type", "dimension", "encoding", "sizes"])
def test_a_header_without_a_field_is_refused_by_its_name(tmp_path, field):
    lines = [line for line in HEADER.splitlines() if not line.startswith(field)]
    (tmp_path / "a.nrrd").write_text("\n".join(lines) + "\n\n" + "x" * 400)
    with pytest.raises(UnreadableImageError, match=f"its header has no {field}"):
        open_volume(tmp_path / "a.nrrd")


def test_values_are_beside_a_header_or_missing(tmp_path):
    values = np.arange(9 * 8 * 2, dtype="<i2")
    (tmp_path / "a.nhdr").write_text(f"{HEADER}data file: a.raw\n")
    (tmp_path / "a.raw").write_bytes(values.tobytes())
    volume = open_volume(tmp_path / "a.nhdr")
    np.testing.assert_array_equal(whole(volume), values.reshape(2, 8, 9))
    # Cut off, after the header or before as many bytes as values.
    (tmp_path / "a.raw").write_bytes(values.tobytes()[:200])
    (tmp_path / "c.nhdr").write_text(f"{HEADER}data file: a.raw\n")
    with pytest.raises(UnreadableImageError, match="Size of the data does not equal"):
        open_volume(tmp_path / "c.nhdr").slices(0, 0)
    (tmp_path / "a.raw").write_bytes(values.tobytes()[:143])
    with pytest.raises(UnreadableImageError, match="the file ends before its values: its header"):
        open_volume(tmp_path / "a.nhdr")
    zeros = str(tmp_path / "b.nrrd")
    nrrd.write(zeros, np.zeros((64, 64, 16), np.int16), {"encoding": "gzip"})
    assert open_volume(tmp_path / "b.nrrd").shape == (16, 64, 64)


def test_more_axes_than_three_in_space_are_refused(tmp_path):
    values = np.zeros((4, 5, 6, 2), np.int16)
    nrrd.write(str(tmp_path / "a.nrrd"), values)
    with pytest.raises(UnreadableImageError, match="4 dimensions, 4x5x6x2: save each volume in a"):
        open_volume(tmp_path / "a.nrrd")
    nrrd.write(str(tmp_path / "a.nrrd"), values[..., 0], {"kinds": ["space", "domain", "space"]})
    assert open_volume(tmp_path / "a.nrrd").shape == (6, 5, 4)
