import math

import numpy as np
import pytest
import yaml

from olvae.data import value_range as module
from olvae.data.packing import PackOptions, pack
from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.value_range import PERCENTILES, Measured, measure_range
from tests.data.images import noise, write_tar
from tests.data.pixels.files import npy, tiff, tiff_of_pages, values

BANDS = np.moveaxis(values("uint16", 40, (24, 32)), -1, 0)


@pytest.mark.parametrize(
    ("content", "stack"),
    [
        (tiff(BANDS), True),
        (tiff_of_pages(BANDS), True),
        (tiff(BANDS, imagej=True, metadata={"axes": "CYX"}), False),
        (tiff(BANDS, planarconfig="separate"), False),
        (tiff(np.moveaxis(BANDS, 0, -1), planarconfig="contig"), False),
    ],
    ids=["shaped", "pages", "channels", "planes", "interleaved"],
)
def test_pages_that_may_be_a_stack_are_named(content, stack, root):
    (root / "a.tif").write_bytes(content)
    found = measure_range(str(root))
    assert len(found.percentiles) == 40
    assert found.stack == (str(root / "a.tif") if stack else None)


def test_measure_range_has_numpys_percentiles_per_channel(root, tmp_path):
    arrays = [(values("uint16", 2, seed=n) // np.array([1, 8])).astype(np.uint16) for n in range(5)]
    for number, array in enumerate(arrays):
        (root / f"{number}.npy").write_bytes(npy(array))
    found = measure_range(str(root))
    together = np.stack(arrays).reshape(-1, 2)
    np.testing.assert_allclose(
        found.percentiles[:, 1:4], np.percentile(together, [0.1, 1, 50], axis=0).T
    )
    assert (found.images, found.kinds, found.missing) == (5, {"uint16": 5}, 0.0)
    stated = PixelRange.from_node(yaml.safe_load(found.line())["range"])
    assert stated.outside == "clip"
    np.testing.assert_allclose(stated.high, np.percentile(together, 99.9, axis=0), rtol=1e-3)
    pack(str(root), tmp_path / "shards", PackOptions(channels=2))
    np.testing.assert_array_equal(
        measure_range(str(tmp_path / "shards")).percentiles, found.percentiles
    )


def test_measure_range_counts_all_columns_whatever_the_width(root):
    """A step between values that divides the width would see the same columns in every row."""
    array = np.random.default_rng(0).normal(1000, 100, (2048, 2048)).astype(np.float32)
    array[:, 0] = np.nan
    np.save(root / "a.npy", array)
    found = measure_range(str(root))
    assert found.missing == pytest.approx(1 / 2048, rel=0.2)
    assert found.percentiles[0, 3] == pytest.approx(1000, abs=5)


@pytest.mark.usefixtures("one_process")
def test_measure_range_leaves_out_a_files_own_missing_value(root, tmp_path):
    array = np.full((40, 40), 7, dtype=np.float32)
    array[:4], array[4] = -9999, 9
    tags = [(42113, "s", 0, "-9999", True)]
    (root / "a.tif").write_bytes(tiff(array, extratags=tags))
    found = measure_range(str(root))
    assert (found.percentiles[0, [0, -1]].tolist(), found.missing) == ([7, 9], pytest.approx(0.1))
    assert yaml.safe_load(found.line())["range"] == {
        "pairs": [7, 9],
        "outside": "clip",
        "nodata": -9999,
    }
    assert pack(str(root), tmp_path / "whole", PackOptions(channels=1)).index.images == 1
    with pytest.raises(ValueError, match="160 values"):
        pack(str(root), tmp_path / "smaller", PackOptions(channels=1, resize=20))


def measured(*rows: list[float], **more) -> Measured:
    return Measured(1, {"float32": 1}, np.array(rows), 0.0, **more)


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ([0, 1.23456, 5, 50, 99, 1234.56, 2000], [1.234, 1235.0]),
        ([-3, -0.98765, 0, 0, 0, 0.0123456, 1], [-0.9877, 0.01235]),
        ([0, 0, 0, 0, 7, 8, 9], [0.0, 8.0]),
        # Rounding leads beyond the smallest or the largest value.
        ([7.7775, 7.77777, 8, 9, 9, 12.3456, 12.346], [7.7775, 12.346]),
        ([5, 5, 5, 5, 5, 5, 5], [5.0, 6.0]),
    ],
)
def test_the_proposed_range_has_four_digits_and_grows(row, pair):
    assert measured(row).line() == f"range: {{pairs: {pair}, outside: clip}}"
    several = yaml.safe_load(measured(row, [0, 1, 2, 3, 4, 5, 6], nodata=-99.0).line())["range"]
    assert several == {"pairs": [pair, [1.0, 5.0]], "outside": "clip", "nodata": -99.0}


def test_the_table_has_a_row_for_each_channel():
    table = measured([0, 1, 2, 3, 4, 5, 1234567], [10] * 7).table()
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns][:3] == ["channel", "0 %", "0.1 %"]
    assert cells[0] == ["0", "1"]
    assert cells[2] == ["1", "10"]
    assert cells[7] == ["1.2346e+06", "10"]


def test_images_are_evenly_spread_or_the_first_of_shards(root, tmp_path):
    files = {f"{i}.npy": npy(np.full((4, 4, 1), i, np.uint16)) for i in range(5)}
    for name, content in files.items():
        (root / name).write_bytes(content)
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", [*files.items()])
    for src, images, ends in (
        (root, 3, [0, 2, 4]),
        (root, 2, [0, 2, 4]),
        (root, 9, [0, 2, 4]),
        (tmp_path / "shards", 3, [0, 1, 2]),
        (tmp_path / "shards", 9, [0, 2, 4]),
    ):
        found = measure_range(str(src), images)
        assert found.images == min(images, 5)
        assert found.percentiles[0, [0, 3, -1]].tolist() == ends


def test_every_so_many_values_are_measured_never_the_same_columns(root, monkeypatch):
    """Of 16 values a fourth: of a step of 4 each would be of the first column, so it is 5."""
    monkeypatch.setattr(module, "VALUES_PER_IMAGE", 4)
    (root / "a.npy").write_bytes(npy(np.arange(16, dtype=np.uint16).reshape(4, 4, 1)))
    found = measure_range(str(root)).percentiles[0]
    np.testing.assert_allclose(found, np.percentile([0, 5, 10, 15], PERCENTILES))
    monkeypatch.setattr(module, "VALUES_PER_IMAGE", 17)
    found = measure_range(str(root)).percentiles[0]
    np.testing.assert_allclose(found, np.percentile(np.arange(16), PERCENTILES))


def test_what_can_not_be_measured_is_named(root):
    (root / "a.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"no images .*a\.npy"):
        measure_range(str(root))
    noise(0).save(root / "b.png")
    with pytest.raises(ValueError, match="8 bits"):
        measure_range(str(root))
    real = np.array([[[1.0, math.nan], [3.0, math.inf]]], dtype=np.float32)
    (root / "b.png").unlink()
    (root / "c.npy").write_bytes(npy(real))
    with pytest.raises(ValueError, match="channel 1 "):
        measure_range(str(root))
    real[0, 0, 1] = 7
    (root / "c.npy").write_bytes(npy(real))
    found = measure_range(str(root))
    assert found.missing == 0.25
    assert found.percentiles[:, [0, -1]].tolist() == [[1, 3], [7, 7]]
    assert [error.name for error in found.unreadable] == [str(root / "a.npy")]
    (root / "d.npy").write_bytes(npy(real[..., :1]))
    with pytest.raises(ValueError, match=r"d\.npy: 1 channels, .*2"):
        measure_range(str(root))


@pytest.mark.parametrize(("second", "named"), [(-9999, -9999.0), (-1, None), ("nan", -9999.0)])
def test_a_missing_value_is_proposed_if_the_files_name_just_one(root, second, named):
    for name, nodata in (("a.tif", -9999), ("b.tif", second)):
        tags = [(42113, "s", 0, str(nodata), True)]
        image = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
        (root / name).write_bytes(tiff(image, extratags=tags))
    found = measure_range(str(root))
    assert (found.nodata, found.kinds) == (named, {"float32": 2})
    assert found.missing == 0.0
