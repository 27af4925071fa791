import os
import pickle

import numpy as np
import pytest
import rasterio

from olvae.data.audit import audit_lines, audit_source
from olvae.data.image import read_picture
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes.rasters import Scene, find_scenes
from tests.data.scenes.geotiffs import geotiff, ground
from tests.export.rasters import jpeg_2000, zarr

GROUND = ground(0)
WRITE = {
    "tiles.tif": lambda path: geotiff(path, GROUND, compress="deflate"),
    "strips.tif": lambda path: geotiff(path, GROUND, tiled=False, blockysize=None, blockxsize=None),
    "planes.tif": lambda path: geotiff(path, GROUND, interleave="band", compress="lzw"),
    "big.tif": lambda path: geotiff(path, GROUND, BIGTIFF="YES"),
    "cog.tif": lambda path: geotiff(path, GROUND, driver="COG", blocksize=128),
    "a.jp2": lambda path: jpeg_2000(path, GROUND),
    "a.zarr": lambda path: zarr(
        path, np.ascontiguousarray(np.moveaxis(GROUND, -1, 0)), (4, 32, 48)
    ),
}


@pytest.mark.parametrize("name", WRITE)
def test_windows_are_those_of_the_whole(name, tmp_path):
    WRITE[name](tmp_path / name)
    (scene,) = find_scenes(tmp_path / name, 2, [3, 0])
    assert (scene.broken, scene.name, scene.height, scene.width) == (None, name, 96, 130)
    for top, left, height, width in ((0, 0, 96, 130), (5, 31, 40, 64), (95, 129, 1, 1)):
        values, missing = scene.read((top, left, height, width))
        assert np.array_equal(values, GROUND[top : top + height, left : left + width][..., [3, 0]])
        assert not missing.any()


def test_the_fill_value_of_a_zarr_is_no_missing_one(tmp_path):
    zarr(tmp_path / "a.zarr", np.zeros((3, 40, 40), np.uint16), (3, 32, 32))
    (scene,) = find_scenes(tmp_path)
    assert (scene.nodata, scene.has_gaps) == (None, False)
    assert not scene.read((0, 0, 40, 40))[1].any()


def test_missing_values_are_those_of_rasterio(tmp_path):
    """By the value that the file names, as NaN, by a mask, or by the range's own value."""
    holes = GROUND.copy()
    holes[10:20, 30:50, 1] = 0
    scene = Scene(geotiff(tmp_path / "a.tif", holes, nodata=0), "a.tif", 4)
    assert scene.has_gaps
    assert np.array_equal(scene.read((0, 0, 96, 130))[1], holes == 0)
    assert np.array_equal(
        scene.read((0, 0, 96, 130), float(holes[0, 0, 0]))[1], holes == holes[0, 0, 0]
    )

    real = np.where(holes == 0, np.nan, holes).astype(np.float32)
    real[0, 0, 0] = np.inf
    scene = Scene(geotiff(tmp_path / "b.tif", real), "b.tif", 4)
    assert np.array_equal(scene.read((0, 0, 96, 130))[1], ~np.isfinite(real))

    # A mask counts beside a value, be it the file's or the range's.
    value = int(GROUND[0, 0, 0])
    for named in (None, value):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            geotiff(tmp_path / "c.tif", GROUND, nodata=named)
            with rasterio.open(tmp_path / "c.tif", "r+") as file:
                file.write_mask(holes[..., 1] != 0)
        scene = Scene(tmp_path / "c.tif", "c.tif", 4)
        masked = np.repeat(holes[..., 1:2] == 0, 4, 2)
        either = masked | (value == GROUND)
        expected = masked if named is None else either
        assert np.array_equal(scene.read((0, 0, 96, 130))[1], expected)
        assert np.array_equal(scene.read((0, 0, 96, 130), value)[1], either)
    assert not Scene(geotiff(tmp_path / "d.tif", GROUND), "d.tif", 4).has_gaps


def test_a_pixel_of_8_bits_is_missing_if_all_of_its_bands_are(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 3, (40, 40, 3)).astype(np.uint8)
    scene = Scene(geotiff(tmp_path / "a.tif", rgb, nodata=0), "a.tif")
    black = (rgb == 0).all(-1)
    assert 0 < black.sum() < (rgb == 0).any(-1).sum()
    assert np.array_equal(scene.read((0, 0, 40, 40))[1], np.repeat(black[..., None], 3, 2))


def test_a_folder_is_searched_at_any_depth(tmp_path):
    for name in ("b/two.TIF", "a.tif", "c/one.tiff", ".hidden.tif", ".cache/x.tif"):
        geotiff(tmp_path / name, GROUND)
    WRITE["a.zarr"](tmp_path / "c" / "a.zarr")
    (tmp_path / "c" / "readme.txt").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "b")
    names = ["a.tif", "b/two.TIF", "c/a.zarr", "c/one.tiff"]
    assert [scene.name for scene in find_scenes(tmp_path, 4)] == names
    assert [scene.name for scene in find_scenes(f"{tmp_path}/*/*.tif*", 4)] == ["one.tiff"]
    with pytest.raises(FileNotFoundError, match=r"no scenes .*\.tif, \.tiff, \.jp2"):
        find_scenes(f"{tmp_path}/*.none", 4)
    with pytest.raises(FileNotFoundError, match="scenes; did you mean"):
        find_scenes(tmp_path / "bb", 4)


@pytest.mark.parametrize("kind", ["uint16", "uint8"])
def test_an_image_that_is_too_large_names_the_prefix(kind, tmp_path):
    options = {"width": 20_000, "height": 20_000, "dtype": kind, "SPARSE_OK": True}
    path = geotiff(tmp_path / "a.tif", GROUND[:16, :16, :3].astype(kind), tile=512, **options)
    with pytest.raises(UnreadableImageError, match="scenes:FOLDER"):
        read_picture(path, 3, EIGHT_BITS if kind == "uint8" else PixelRange.from_node([0, 10_000]))
    assert Scene(path, "a.tif").broken is None


@pytest.mark.posix
def test_a_scene_is_opened_again_in_another_process(tmp_path):
    scene = Scene(geotiff(tmp_path / "a.tif", GROUND), "a.tif", 4)
    before = scene.read((0, 0, 8, 8))[0]
    copy = pickle.loads(pickle.dumps(scene))
    assert np.array_equal(copy.read((0, 0, 8, 8))[0], before)
    child = os.fork()
    if child == 0:
        same = np.array_equal(scene.read((0, 0, 8, 8))[0], before)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("one_process")
def test_ten_broken_files_have_a_line_each(tmp_path):
    """And the good one beside them is read."""
    good = geotiff(tmp_path / "good.tif", GROUND, compress="deflate").read_bytes()
    (tmp_path / "empty.tif").touch()
    (tmp_path / "text.tif").write_text("no image")
    (tmp_path / "cut.tif").write_bytes(good[: len(good) // 2])
    (tmp_path / "header.tif").write_bytes(good[:60])
    content = bytearray(good)
    content[len(good) // 3 : len(good) // 3 + 500] = bytes(500)
    (tmp_path / "damaged.tif").write_bytes(content)
    geotiff(tmp_path / "three.tif", GROUND[..., :3])
    geotiff(tmp_path / "double.tif", GROUND.astype(np.float64))
    geotiff(tmp_path / "bytes.tif", GROUND.astype(np.uint8))
    (tmp_path / "a.jp2").write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100))
    geotiff(tmp_path / "bright.tif", GROUND * 6)
    stated = PixelRange.from_node([0, 10_000])

    result = audit_source(f"scenes:{tmp_path}", 64, 4, pixel_range=stated)
    lines = [line for line in audit_lines(result) if line.startswith("unreadable")]
    names = {os.path.relpath(error.name.split(" ")[0], tmp_path) for error in result.unreadable}
    broken = {error.name.partition("/")[0] for error in result.unreadable}
    assert broken == {path.name for path in tmp_path.iterdir()} - {"good.tif"}, names
    assert all("\n" not in line for line in lines)
    reasons = {error.name.partition("/")[0]: error.reason for error in result.unreadable}
    assert "`channels`, or choose `bands`" in reasons["three.tif"]
    assert "uint8, uint16" in reasons["double.tif"]
    assert "leave `range` out" in reasons["bytes.tif"]
    assert "range, 0 to 10000" in reasons["bright.tif"]


def test_a_window_that_can_not_be_decoded_names_its_place(tmp_path):
    content = geotiff(tmp_path / "a.tif", GROUND, compress="deflate").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: len(content) // 2])
    scene = Scene(tmp_path / "a.tif", "a.tif", 4)
    if scene.broken is None:
        with pytest.raises(UnreadableImageError, match="row 64, column 96"):
            scene.read((64, 96, 32, 32))
