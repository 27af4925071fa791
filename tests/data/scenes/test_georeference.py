import io
import json

import numpy as np
import pytest
import rasterio
import tifffile
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.scenes.georeference import (
    describe_place,
    read_georeference,
    tags_from,
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
