"""What DICOM headers say, value by value, and files whose headers say too little or wrong."""

import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import MPEG2MPML, ExplicitVRBigEndian, ExplicitVRLittleEndian

from olvae.config import ConfigError
from olvae.data.read_errors import UnreadableImageError
from olvae.data.volumes import dicom as dicom_module
from olvae.data.volumes.dicom import (
    Series,
    find_series,
    import_pydicom,
    of_frame,
    pixels_of,
    position_of,
    read_dataset,
    set_pixels,
)
from olvae.data.volumes.volume_source import open_volume
from tests.data.volumes.scans import dicom, group, hounsfield, only, series, whole


def header(**tags: object) -> pydicom.Dataset:
    """One of 2 rows and 3 columns."""
    found = pydicom.Dataset()
    for name, value in {"Rows": 2, "Columns": 3, **tags}.items():
        setattr(found, name, value)
    return found


def test_files_of_a_folder_are_series_or_alone(tmp_path):
    plane = hounsfield()[3]
    stack = hounsfield()[3:5]
    for name in ("1", "2"):
        place = [0, 0, float(name)]
        dicom(tmp_path / "a" / name, plane, SeriesInstanceUID="1.2.9", ImagePositionPatient=place)
    dicom(tmp_path / "b" / "frames", stack, SeriesInstanceUID="1.2.9")
    dicom(tmp_path / "b" / "without", plane, SeriesInstanceUID="")
    dicom(tmp_path / "b" / "colour", plane, SamplesPerPixel=3)
    dicom(tmp_path / "b" / "thin", plane[:1, :1].repeat(101, 1), SeriesInstanceUID="1.3")
    paths = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    found = {volume.key: volume for volume in find_series(paths, tmp_path)}
    assert [
        (key, str(one.path.relative_to(tmp_path)), one.shape) for key, one in found.items()
    ] == [
        ("b/colour", "b/colour", (1, 1, 1)),
        ("b/frames", "b/frames", (2, 20, 24)),
        ("b/without", "b/without", (1, 20, 24)),
        ("a/1.2.9", "a/1.2.9", (2, 20, 24)),
        ("b/1.3", "b/1.3", (1, 1, 1)),
    ]
    assert found["a/1.2.9"].patient == "1CT1"
    for key, why in (("b/colour", "colour"), ("b/1.3", "^101x1 pixels")):
        with pytest.raises(ValueError, match=why):
            found[key].read()


def test_a_missing_library_is_a_mistake_of_the_settings(monkeypatch, tmp_path):
    path = dicom(tmp_path / "a.dcm", hounsfield()[3])
    volume = open_volume(path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert list(find_series([], tmp_path)) == []
    for reading in (lambda: list(find_series([path], tmp_path)), lambda: volume.slices(0, 0)):
        with pytest.raises(ConfigError, match="pydicom: pip install"):
            reading()


def test_the_library_is_silent_and_whole(monkeypatch):
    asked = []
    known = dicom_module.import_extra
    monkeypatch.setattr(
        dicom_module, "import_extra", lambda *args: [asked.append(args), known(*args)][1]
    )
    logging.getLogger("pydicom").setLevel(logging.INFO)
    assert import_pydicom() is pydicom
    assert logging.getLogger("pydicom").level == logging.CRITICAL
    assert asked == [("pydicom", "pydicom", "DICOM"), ("pydicom.pixels", "pydicom", "DICOM")]


def test_values_against_the_standard_are_read_in_silence_and_broken_ones_refused(
    tmp_path, monkeypatch
):
    path = dicom(tmp_path / "a.dcm", hounsfield()[3], SeriesInstanceUID="1.2.826.7")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1.2.826.7", b"1.2.826.a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        volume = open_volume(path)
        volume.write(whole(volume), tmp_path / "new")
    (tmp_path / "b.dcm").write_bytes(b"no DICOM")
    with pytest.raises(ValueError, match=r"^no readable DICOM: "):
        read_dataset(tmp_path / "b.dcm")
    with pytest.raises(FileNotFoundError):
        read_dataset(tmp_path / "c.dcm")

    class Broken(dict):
        """Tags that are read when they are asked for."""

        def get(self, *_: object) -> object:
            raise OverflowError("a long number")

    monkeypatch.setattr(pydicom, "dcmread", lambda *_, **__: Broken())
    with pytest.raises(ValueError, match=r"^no readable DICOM: a long number"):
        read_dataset(path)


def test_a_frames_value_is_its_own_or_all_frames_or_the_headers():
    groups = [{}, {"S": [{"N": 5}]}]
    tags = {"PerFrameFunctionalGroupsSequence": groups, "N": 7}
    assert [of_frame(tags, frame, "S", "N") for frame in (0, 1)] == [7, 5]
    tags["SharedFunctionalGroupsSequence"] = [{"S": [{"M": 1}, {"N": 6}]}]
    assert [of_frame(tags, frame, "S", "N") for frame in (0, 1)] == [6, 5]


def test_frames_of_a_dose_lie_at_their_offsets_from_the_first():
    tags = {"ImagePositionPatient": [1, 2, 3], "NumberOfFrames": 3}
    assert position_of(tags, 1, np.array([0.0, 0.0, 2.0])) is None
    tags["GridFrameOffsetVector"] = [10, 15, 25]
    found = [position_of(tags, frame, np.array([0.0, 0.0, 2.0])).tolist() for frame in range(3)]
    assert found == [[1, 2, 3], [1, 2, 13], [1, 2, 33]]


class Stored(dict):
    """Tags of a file, and pixels whose decoder warns."""

    @property
    def pixel_array(self) -> str:
        warnings.warn("strange", stacklevel=1)
        return "pixels"


def test_pixels_are_stored_as_such_or_compressed_with_a_decoder(monkeypatch):
    def read(syntax: object, **tags: object) -> str:
        stored = Stored(tags)
        stored.file_meta = {} if syntax is None else {"TransferSyntaxUID": syntax}
        return pixels_of(stored)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(None, PixelData=b"") == read(ExplicitVRLittleEndian, PixelData=b"") == "pixels"
    for tags, why in (
        ({"Modality": "CT"}, r"no pixel data \(CT\)"),
        ({}, r"no pixel data \(no modality\)"),
        ({"PixelData": b"", "ModalityLUTSequence": 1}, r"units are a table \(Modality LUT\)"),
    ):
        with pytest.raises(ValueError, match=why):
            read(ExplicitVRLittleEndian, **tags)
    with pytest.raises(ValueError, match=r"compressed \(MPEG2.*without a decoder"):
        read(MPEG2MPML, PixelData=b"")
    for available in (True, False):
        decoder = SimpleNamespace(is_available=available)
        monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda _, decoder=decoder: decoder)
        if available:
            assert read(MPEG2MPML, PixelData=b"") == "pixels"
        else:
            with pytest.raises(ValueError, match="without a decoder"):
                read(MPEG2MPML, PixelData=b"")


@pytest.mark.parametrize(
    ("bits", "values", "stored"),
    [
        ((8, 8, 0), [-5, 3.4, 300], [0, 3, 255]),
        ((16, 12, 0), [-5, 7, 5000], [0, 7, 4095]),
        ((16, 12, 1), [-3000, -7, 3000], [-2048, -7, 2047]),
        ((32, 20, 1), [-(2.0**25), -7, 2.0**25], [-(2**19), -7, 2**19 - 1]),
    ],
)
def test_pixels_are_stored_in_the_files_bits(bits, values, stored):
    allocated, used, signed = bits
    tags = {"BitsAllocated": allocated, "BitsStored": used, "PixelRepresentation": signed}
    dataset = header(**tags)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PixelData = b"other"
    dataset["PixelData"].is_undefined_length = True
    dataset.add_new("SmallestImagePixelValue", "US", 3)
    set_pixels(dataset, np.array(values, dtype=np.float32).reshape(1, 1, 3))
    kind = np.dtype(f"<{'i' if signed else 'u'}{allocated // 8}")
    content = np.array(stored, dtype=kind).tobytes()
    assert dataset.PixelData == content + b"\0" * (len(content) % 2)
    element = dataset["PixelData"]
    assert (element.VR, element.is_undefined_length) == ("OB" if allocated == 8 else "OW", False)
    assert "SmallestImagePixelValue" not in dataset
    for other, syntax in ((64, ExplicitVRLittleEndian), (allocated, ExplicitVRBigEndian)):
        dataset.BitsAllocated = other
        dataset.file_meta.TransferSyntaxUID = syntax
        with pytest.raises(ValueError, match="can't be written"):
            set_pixels(dataset, np.zeros((1, 1, 3), dtype=np.float32))


def geometry(tmp_path: Path, *headers: pydicom.Dataset, names: str = "ab") -> Series:
    files = []
    for name, one in zip(names, headers, strict=False):
        (tmp_path / name).write_bytes(bytes(100))
        files.append((tmp_path / name, one))
    return Series(tmp_path, "it", files)


def test_the_geometry_is_the_headers(tmp_path):
    assert geometry(tmp_path, header()).affine.tolist() == np.eye(4).tolist()
    # Sagittal, in the group of the one frame.
    own = group(
        PlaneOrientationSequence={"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        PixelMeasuresSequence={"PixelSpacing": [0.9, 0.8], "SliceThickness": 4},
        PlanePositionSequence={"ImagePositionPatient": [1, 2, 3]},
    )
    found = geometry(tmp_path, header(PerFrameFunctionalGroupsSequence=[own]))
    expected = [[0, 0, -4, 1], [0.8, 0, 0, 2], [0, -0.9, 0, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(found.affine, expected)
    np.testing.assert_allclose(
        only(series(tmp_path / "ct")).affine,
        [[0.8, 0, 0, -9], [0, 0.9, 0, 4], [0, 0, 2.5, 7], [0, 0, 0, 1]],
    )


def test_slices_without_places_are_sorted_by_number_and_those_without_one_are_first(tmp_path):
    found = geometry(tmp_path, header(), header(InstanceNumber=1), names="za")
    assert [path.name for path in found.files] == ["z", "a"]


def test_slices_may_be_a_micrometre_apart_and_turned_by_a_thousandth(tmp_path):
    def slices(distance: float, turned: float) -> Series:
        first = header(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
        second = header(
            ImagePositionPatient=[0, 0, distance], ImageOrientationPatient=[1, turned, 0, 0, 1, 0]
        )
        return geometry(tmp_path, first, second)

    assert slices(0.001, 0.001).spacing[0] == 0.001
    for distance, turned, why in ((0.0009, 0, "^1 of its slices"), (1, 0.0011, "not parallel")):
        with pytest.raises(ValueError, match=why):
            slices(distance, turned)


@pytest.mark.parametrize("spacing", [[0, 1], [1, float("nan")]])
def test_a_spacing_of_none_is_refused(tmp_path, spacing):
    measures = {"PixelMeasuresSequence": [{"PixelSpacing": spacing}]}
    one = header()
    with pytest.MonkeyPatch.context() as patch:
        known = dicom_module.of_frame
        patch.setattr(
            dicom_module,
            "of_frame",
            lambda tags, frame, sequence, name: known(
                {"SharedFunctionalGroupsSequence": [measures]}, frame, sequence, name
            ),
        )
        with pytest.raises(ValueError, match="spacing or orientation is 0"):
            geometry(tmp_path, one)


def test_a_slice_is_read_from_its_file_alone(tmp_path, monkeypatch):
    volume = only(series(tmp_path / "ct"))
    read = []
    known = Series.frames_of
    monkeypatch.setattr(
        Series, "frames_of", lambda self, path: [read.append(path), known(self, path)][1]
    )
    np.testing.assert_array_equal(volume.slices(0, 3)[..., 0], hounsfield()[3])
    assert read == [volume.files[3]]


def test_a_file_that_has_changed_since_is_checked_again(tmp_path):
    volume = open_volume(dicom(tmp_path / "a.dcm", hounsfield()[3]))
    values = whole(volume)
    dicom(tmp_path / "a.dcm", hounsfield()[3], PhotometricInterpretation="MONOCHROME1")
    with pytest.raises(UnreadableImageError, match=r"a.dcm: its 0 is white \(MONOCHROME1\)"):
        volume.slices(0, 0)
    with pytest.raises(ValueError, match=r"its 0 is white \(MONOCHROME1\)"):
        volume.write(values, tmp_path / "new")


def test_what_is_written_is_described_as_derived(tmp_path):
    path = Path(get_testdata_file("CT_small.dcm"))
    before = pydicom.dcmread(path)
    before.SeriesDescription = "Chest"
    del before.file_meta.MediaStorageSOPClassUID
    before.save_as(tmp_path / "a.dcm", enforce_file_format=False)
    volume = open_volume(tmp_path / "a.dcm")
    (result,) = volume.write(whole(volume), tmp_path / "new").iterdir()
    after = pydicom.dcmread(result)
    assert list(after.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    assert after.SeriesDescription == "Chest reconstructed"
    assert after.file_meta.MediaStorageSOPClassUID == before.SOPClassUID
