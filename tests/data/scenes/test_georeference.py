import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import tifffile
import torch
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes import georeference
from olvae.data.scenes.georeference import (
    ASCII,
    GEO_KEYS,
    METADATA,
    NODATA,
    Gaps,
    Georeference,
    byte_gaps,
    describe_place,
    fill,
    kept_tags,
    read_georeference,
    read_scene,
    tags_from,
    with_nodata,
)
from olvae.data.scenes.rasters import Scene
from tests.data.scenes.geotiffs import PLACE, UTM, geotiff, ground


def written(tags) -> rasterio.DatasetReader:
    """A TIFF of two pixels with these tags, as rasterio sees it."""
    stream = io.BytesIO()
    image = np.zeros((1, 2, 4), np.float32)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(stream, image, extratags=tags, **options)
    return rasterio.MemoryFile(stream.getvalue()).open()


@pytest.mark.parametrize("options", [{}, {"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"}])
def test_the_tags_of_a_geotiff_are_kept(options, tmp_path):
    path = geotiff(tmp_path / "a.tif", ground(0), nodata=-9999, dtype="int16", **options)
    with rasterio.open(path, "r+") as file:
        file.scales = (0.5, 1.0, 1.0, 2.0)
        file.update_tags(1, STATISTICS_MINIMUM=3)
    found = read_georeference(path, PixelRange.from_node([0, 10_000]))
    assert found.nodata == -9999
    with written(found.tags) as file:
        assert (file.crs, file.transform, file.nodata) == (UTM, PLACE, -9999)
        assert file.descriptions == tuple(f"band {number}" for number in range(4))
        assert file.scales == (0.5, 1.0, 1.0, 2.0)
        assert "STATISTICS_MINIMUM" not in file.tags(1)


def test_control_points_and_a_turned_grid_are_kept(tmp_path):
    turned = PLACE * PLACE.rotation(30)
    path = geotiff(tmp_path / "a.tif", ground(0), transform=turned)
    with written(read_georeference(path, EIGHT_BITS).tags) as file:
        assert file.transform.almost_equals(turned, 1e-6)
    points = [GroundControlPoint(r, c, 10.0 + c, 50.0 - r) for r, c in ((0, 0), (0, 9), (9, 0))]
    path = geotiff(tmp_path / "b.tif", ground(0), crs=None, transform=None)
    with rasterio.open(path, "r+") as file:
        file.gcps = (points, rasterio.crs.CRS.from_epsg(4326))
    with written(read_georeference(path, EIGHT_BITS).tags) as file:
        assert [(p.row, p.col, p.x, p.y) for p in file.gcps[0]] == [
            (p.row, p.col, p.x, p.y) for p in points
        ]


def test_other_files_have_no_georeference(tmp_path):
    tifffile.imwrite(tmp_path / "plain.tif", np.zeros((8, 8), np.uint8))
    (tmp_path / "broken.tif").write_bytes(b"II*\0" + bytes(20))
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    for name in ("plain.tif", "broken.tif", "a.png", "missing.tif", "."):
        assert read_georeference(tmp_path / name, EIGHT_BITS) is None


def test_a_tiles_place_is_described_and_read_back(tmp_path):
    path = geotiff(tmp_path / "a.tif", ground(0), nodata=0)
    content = describe_place(Scene(path, "a.tif", 2, [3, 0]), 32, 64)
    place = json.loads(content)
    assert place["nodata"] == "0.0"
    assert place["bands"] == ["band 3", "band 0"]
    assert place["transform"] == [400_640, 10, 0, 5_099_680, 0, -10]
    with written(tags_from(content)) as file:
        assert (file.crs, file.transform) == (UTM, from_origin(400_640, 5_099_680, 10, 10))
    # Of an image that is twice as large, pixels are half as large.
    with written(tags_from(content, enlarge=2)) as file:
        assert (file.crs, file.transform) == (UTM, from_origin(400_640, 5_099_680, 5, 5))
    plain = geotiff(tmp_path / "b.tif", ground(0), crs=None, transform=None)
    assert describe_place(Scene(plain, "b.tif", 4), 0, 0) == b""
    for broken in (b"", b"{}", b"[1]", content.replace(b"640", b'"x"'), content[:-3]):
        with pytest.raises(ValueError, match="say where"):
            tags_from(broken)


STATED = PixelRange.from_node({"pairs": [[5, 9999]] * 3 + [[0.5, 9999]], "outside": "clip"})


def test_a_scene_is_read_with_its_gaps_and_another_picture_without(tmp_path):
    """Gaps become the low end of each band, and keep what the file has there."""
    array = ground(0, (8, 12)).clip(10)
    array[2:4, :3] = 0
    array[6, 7, 1] = 0
    path = geotiff(tmp_path / "a.tif", array, nodata=0, tile=16)
    place = read_georeference(path, STATED)
    image, gaps = read_scene(path, 4, STATED, place)
    missing = array == 0
    expected = np.where(missing, [5, 5, 5, 1], array)
    np.testing.assert_array_equal(image.permute(1, 2, 0), expected)
    np.testing.assert_array_equal(gaps.missing.permute(1, 2, 0), missing)
    np.testing.assert_array_equal(gaps.values.permute(1, 2, 0), array)
    path = geotiff(tmp_path / "b.tif", array, tile=16)
    plain, none = read_scene(path, 4, replace(STATED, low=(0.0,), high=(9999.0,)), None)
    assert none is None
    np.testing.assert_array_equal(plain.permute(1, 2, 0), array)
    with pytest.raises(UnreadableImageError, match=r"b\.tif") as error:
        read_scene(path, 3, STATED, place)
    assert error.value.name == str(path)


def test_a_pixel_of_8_bits_is_missing_if_all_its_bands_are(tmp_path):
    array = ground(0, (8, 12), 3).clip(1, 255).astype(np.uint8)
    array[2:4, :3] = 0
    array[6, 7, 1] = 0
    path = geotiff(tmp_path / "a.tif", array, nodata=0, tile=16, photometric="rgb")
    image, gaps = read_scene(path, 3, EIGHT_BITS, read_georeference(path, EIGHT_BITS))
    np.testing.assert_array_equal(image.permute(1, 2, 0), array)
    whole = np.broadcast_to((array == 0).all(-1, keepdims=True), array.shape)
    np.testing.assert_array_equal(gaps.missing.permute(1, 2, 0), whole)
    assert whole.sum() == 2 * 3 * 3
    assert not byte_gaps(image, None).missing.any()


def test_restored_gaps_are_the_only_values_that_stand_for_missing_ones():
    """A millionth of each band's range is 0.1 and 0.2."""
    stated = PixelRange.from_node([[0, 100_000], [0, 200_000]])
    image = torch.tensor([[[7.0, 3.0, 7.0]], [[7.0, 3.0, 5.0]]])
    missing = torch.tensor([[[False, False, True]], [[False, True, False]]])
    gaps = Gaps(missing, torch.full((2, 1, 3), 7.0), 7.0)
    found = gaps.restore(image, stated)
    torch.testing.assert_close(found, torch.tensor([[[7.1, 3.0, 7.0]], [[7.2, 7.0, 5.0]]]))
    kept = Gaps(missing, torch.full((2, 1, 3), math.nan), None).restore(image, stated)
    expected = torch.where(missing, math.nan, image)
    torch.testing.assert_close(kept, expected, equal_nan=True)
    eight = Gaps(missing, torch.zeros(2, 1, 3), 7.0).restore(image.to(torch.uint8), EIGHT_BITS)
    assert torch.equal(eight, torch.where(missing, 0, image).to(torch.uint8))


def test_gaps_are_filled_with_what_their_type_can_hold():
    stated = PixelRange.from_node([[-5, 9], [0.5, 9]])
    missing = np.array([[[True, False], [False, True]]])
    for kind, low in (("uint8", [0, 1]), ("int16", [-5, 1]), ("float32", [-5, 0.5])):
        values = np.full((1, 2, 2), 7, kind)
        fill(values, missing, stated)
        assert values.dtype == kind
        assert values.tolist() == [[[low[0], 7], [7, low[1]]]]


def test_a_turned_scenes_tile_begins_at_its_own_corner(tmp_path):
    turned = PLACE * PLACE.rotation(30)
    path = geotiff(tmp_path / "a.tif", ground(0), transform=turned)
    place = json.loads(describe_place(Scene(path, "a.tif", 4), 32, 64))
    x, a, b, y, d, e = place["transform"]
    assert (x, y) == pytest.approx(turned * (64, 32))
    assert (a, b, d, e) == pytest.approx((turned.a, turned.b, turned.d, turned.e))
    assert place["nodata"] is None


def test_rasters_of_other_drivers_are_placed_by_rasterio(tmp_path, monkeypatch):
    path = geotiff(tmp_path / "a.tif", ground(0), nodata=-9999, dtype="int16")
    plain = geotiff(tmp_path / "b.tif", ground(0), crs=None, transform=None)
    monkeypatch.setattr(georeference, "raster_driver", lambda _: "GTiff")
    found = read_georeference(path, EIGHT_BITS)
    assert found.nodata == -9999
    with written(found.tags) as file:
        assert (file.crs, file.transform, file.nodata) == (UTM, PLACE, -9999)
        assert file.descriptions == tuple(f"band {number}" for number in range(4))
    assert read_georeference(plain, EIGHT_BITS) is None
    # A Zarr's fill value is no missing one.
    monkeypatch.setattr(georeference, "ZARR", "GTiff")
    assert read_georeference(path, EIGHT_BITS).nodata is None


def test_tags_are_written_once_with_the_length_of_their_text():
    keys = (GEO_KEYS, 3, 4, (1, 1, 0, 0), True)
    named = (NODATA, ASCII, 6, "-9999", True)
    found = with_nodata([named, keys], EIGHT_BITS)
    assert found == Georeference((keys, named), -9999.0)
    stated = PixelRange.from_node({"pairs": [0, 9], "nodata": -1})
    assert with_nodata([keys, named], stated).tags == (keys, (NODATA, ASCII, 3, "-1", True))
    broken = with_nodata([keys, (NODATA, ASCII, 2, "x", True)], EIGHT_BITS)
    assert broken == Georeference((keys,), None)
    assert with_nodata([(33550, 12, 3, (1.0, 1.0, 0.0), True)], stated) is None

    item = '<Item name="SCALE" sample="0" role="scale">2</Item>'
    text = f"<GDALMetadata><Item name='other'>1</Item>{item}</GDALMetadata>"
    tags = [
        SimpleNamespace(code=code, dtype=np.int64(kind), count=count, value=value)
        for code, kind, count, value in (keys[:4], (METADATA, 2, 9, text), (256, 3, 1, 7))
    ]
    metadata = f"<GDALMetadata>{item}</GDALMetadata>"
    assert kept_tags(tags) == [keys, (METADATA, ASCII, len(metadata) + 1, metadata, True)]


def test_the_range_of_a_raised_value_is_from_its_low_end():
    """A millionth of 100 to 1100 is 0.001."""
    gaps = Gaps(torch.zeros(1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1), 700.0)
    found = gaps.restore(torch.full((1, 1, 1), 700.0), PixelRange.from_node([100, 1100]))
    assert float(found) == pytest.approx(700.001, abs=1e-4)
