"""NRRD files against pynrrd: values, header, and back."""

import nrrd
import numpy as np
import pytest

from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.read_errors import UnreadableImageError
from olvae.data.volumes.volume_source import VolumeSlices, open_volume
from olvae.files import file_state
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
    # A pattern, of numbers from 1 to 2.
    (tmp_path / "b.nhdr").write_text(f"{header}data file: b%d.raw 1 2 1\n")
    with pytest.raises(UnreadableImageError, match=r"in b%d\.raw 1 2 1, which is no file: save"):
        open_volume(tmp_path / "b.nhdr")


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
    # Longer, or cut off, after the header or before as many bytes as values.
    (tmp_path / "a.raw").write_bytes(values.tobytes() + b"more")
    (tmp_path / "b.nhdr").write_text(f"{HEADER}data file: a.raw\n")
    wanted = "a.raw has 292 bytes: it was changed or cut off perhaps: copy it again$"
    with pytest.raises(UnreadableImageError, match=wanted):
        open_volume(tmp_path / "b.nhdr").slices(0, 0)
    (tmp_path / "a.raw").write_bytes(values.tobytes()[:200])
    (tmp_path / "c.nhdr").write_text(f"{HEADER}data file: a.raw\n")
    wanted = "claims 144 values of type short, and a.raw has 200 bytes: .*: copy it again$"
    with pytest.raises(UnreadableImageError, match=wanted):
        open_volume(tmp_path / "c.nhdr").slices(0, 0)
    (tmp_path / "a.raw").write_bytes(values.tobytes()[:143])
    wanted = "ends before its values: its header claims 144 .* it has 143 bytes: copy it again$"
    with pytest.raises(UnreadableImageError, match=wanted):
        open_volume(tmp_path / "a.nhdr")
    zeros = str(tmp_path / "b.nrrd")
    nrrd.write(zeros, np.zeros((64, 64, 16), np.int16), {"encoding": "gzip"})
    assert open_volume(tmp_path / "b.nrrd").shape == (16, 64, 64)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
def test_a_file_that_was_cut_off_gets_one_line_wherever_it_ends(tmp_path, encoding):
    noise = np.random.default_rng(0).integers(0, 1000, (9, 8, 2)).astype(np.int16)
    whole_file = tmp_path / "whole.nrrd"
    nrrd.write(str(whole_file), noise, {"encoding": encoding})
    content = whole_file.read_bytes()
    for number, end in enumerate((-40, -41, -42)):
        # Each with its own name, as volumes that were read are kept.
        path = tmp_path / f"{number}.nrrd"
        path.write_bytes(content[:end])
        size = len(content) + end
        wanted = f"claims 144 values of type int16, and {path.name} has {size} bytes: .* again$"
        with pytest.raises(UnreadableImageError, match=wanted):
            open_volume(path).slices(0, 0)


def test_other_errors_of_pynrrd_keep_their_words(tmp_path):
    (tmp_path / "a.nrrd").write_text(f"{HEADER}line skip: -1\n\n" + "x" * 400)
    with pytest.raises(UnreadableImageError, match="Invalid lineskip"):
        open_volume(tmp_path / "a.nrrd").slices(0, 0)


def test_the_state_is_also_of_the_file_beside_a_header(tmp_path):
    values = np.arange(9 * 8 * 2, dtype="<i2")
    path = tmp_path / "a.nhdr"
    beside = tmp_path / "a.raw"
    path.write_text(f"{HEADER}data file: a.raw\n")
    beside.write_bytes(values.tobytes())
    volume = open_volume(path)
    assert volume.state() == f"{file_state(path)}\n{file_state(beside)}"
    np.testing.assert_array_equal(whole(volume), values.reshape(2, 8, 9))

    # It is written anew: its values are read again, and a pass over them is another one.
    known = VolumeSlices([volume], PixelRange.from_node([0, 200]))
    states = (known.state(0), known.identity(0))
    beside.write_bytes((values + 1).tobytes() + b"x")
    other = VolumeSlices([volume], PixelRange.from_node([0, 200]))
    assert other.state(0) != states[0]
    assert other.identity(0) != states[1]
    np.testing.assert_array_equal(whole(volume), values.reshape(2, 8, 9) + 1)

    # A file with its header is one.
    single = nrrd_file(tmp_path / "b.nrrd")
    assert open_volume(single).state() == file_state(single)


def test_more_axes_than_three_in_space_are_refused(tmp_path):
    values = np.zeros((4, 5, 6, 2), np.int16)
    nrrd.write(str(tmp_path / "a.nrrd"), values)
    with pytest.raises(UnreadableImageError, match="4 dimensions, 4x5x6x2: save each volume in a"):
        open_volume(tmp_path / "a.nrrd")
    nrrd.write(str(tmp_path / "a.nrrd"), values[..., 0], {"kinds": ["space", "domain", "space"]})
    assert open_volume(tmp_path / "a.nrrd").shape == (6, 5, 4)
