"""What a scene's header says, the largest that are read, and which files of a folder are scenes."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio

from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes import rasters
from olvae.data.scenes.rasters import (
    BOXES,
    CODES,
    JPEG_2000,
    ZARR,
    Scene,
    find_scenes,
    open_dataset,
    raster_driver,
)
from olvae.files import file_state
from tests.data.scenes.geotiffs import geotiff, ground
from tests.export.rasters import zarr

GROUND = ground(0, (40, 56))


def test_drivers_are_known_by_the_first_bytes_or_a_zarrs_files(tmp_path):
    for content, driver in (
        (BOXES, JPEG_2000),
        (BOXES + b"more", JPEG_2000),
        (CODES + b"more", JPEG_2000),
        (BOXES[:-1], None),
        (b"II*\0", None),
    ):
        (tmp_path / "a").write_bytes(content)
        assert raster_driver(tmp_path / "a") == driver
    assert raster_driver(tmp_path / "missing") is None
    for name in (".zarray", ".zgroup", "zarr.json"):
        (tmp_path / f"folder{name}").mkdir()
        assert raster_driver(tmp_path / f"folder{name}") is None
        (tmp_path / f"folder{name}" / name).touch()
        assert raster_driver(tmp_path / f"folder{name}") == ZARR


def test_a_picture_without_a_place_is_opened_in_silence(tmp_path):
    path = geotiff(tmp_path / "a.tif", GROUND, crs=None, transform=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_dataset(path, "GTiff") as dataset:
            assert dataset.count == 4


def test_a_header_says_size_bands_and_state(tmp_path):
    path = geotiff(tmp_path / "a.tif", GROUND)
    for channels, bands, read in ((0, None, [0, 1, 2, 3]), (2, [3, 1], [3, 1]), (0, [2], [2])):
        scene = Scene(path, "a.tif", channels, bands)
        assert (scene.broken, scene.bands) == (None, read)
        assert (scene.height, scene.width, scene.file_state) == (40, 56, file_state(path))
    folder = tmp_path / "a.zarr"
    zarr(folder, np.ascontiguousarray(np.moveaxis(GROUND, -1, 0)), (4, 32, 32))
    scene = Scene(folder, "a.zarr", 4)
    assert (scene.broken, scene.has_mask) == (None, False)
    assert scene.file_state == file_state(folder / ".zarray")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((3, None), "it has 4 bands, not 3: set `channels`, or choose `bands`"),
        ((1, [4]), "it has 4 bands, counted from 0: `bands` [4] are not all there"),
        ((1, [-1]), "it has 4 bands, counted from 0: `bands` [-1] are not all there"),
        ((1, [0, 1]), "it has 2 bands, not 1: set `channels`, or choose `bands`"),
    ],
)
def test_a_scene_without_the_bands_is_broken(tmp_path, arguments, why):
    scene = Scene(geotiff(tmp_path / "a.tif", GROUND), "it", *arguments)
    assert (scene.broken, scene.height, scene.width) == (why, 0, 0)
    with pytest.raises(UnreadableImageError) as error:
        scene.read((0, 0, 1, 1))
    assert (error.value.name, error.value.reason) == ("it", why)


def test_the_limits_are_the_last_that_are_read(tmp_path, monkeypatch):
    path = geotiff(tmp_path / "a.tif", GROUND, tile=16, width=56)
    # A block of all four bands, interleaved.
    for name, most, why in (
        ("MOST_BYTES", 16 * 16 * 4 * 2, "one of its blocks takes 1.91e-06 GiB"),
        ("MOST_PIXELS", 40 * 56, "its header claims 56x40 pixels, more than 2,239"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(rasters, name, most)
            assert Scene(path, "a.tif", 4).broken is None
            patch.setattr(rasters, name, most - 1)
            assert Scene(path, "a.tif", 4).broken.startswith(why)


def test_values_may_be_missing_by_a_value_a_mask_or_as_nan(tmp_path):
    assert not Scene(geotiff(tmp_path / "a.tif", GROUND), "it", 4).has_gaps
    named = Scene(geotiff(tmp_path / "b.tif", GROUND, nodata=0), "it", 4)
    assert (named.has_gaps, named.has_mask, named.nodata) == (True, False, 0)
    real = Scene(geotiff(tmp_path / "c.tif", GROUND.astype(np.float32)), "it", 4)
    assert (real.has_gaps, real.has_mask, real.nodata) == (True, False, None)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        path = geotiff(tmp_path / "d.tif", GROUND)
        with rasterio.open(path, "r+") as file:
            file.write_mask(GROUND[..., 1] > 9)
    masked = Scene(path, "it", 4)
    assert (masked.has_gaps, masked.has_mask, masked.nodata) == (True, True, None)


def test_why_a_window_can_not_be_read_is_gdals_own_reason(tmp_path, monkeypatch):
    scene = Scene(geotiff(tmp_path / "a.tif", GROUND), "it", 4)

    def fail(cause: Exception | None) -> None:
        raise RuntimeError("rasterio's") from cause

    for cause, why in ((ValueError("GDAL's"), "GDAL's"), (None, "rasterio's")):
        monkeypatch.setattr(scene, "opened", lambda cause=cause: fail(cause))
        with pytest.raises(UnreadableImageError) as error:
            scene.read((3, 5, 1, 1))
        assert (error.value.name, error.value.reason) == ("it", f"at row 3, column 5: {why}")
    with monkeypatch.context() as patch:
        patch.setattr(Scene, "opened", lambda _: fail(ValueError("GDAL's")))
        assert Scene(tmp_path / "a.tif", "it").broken == "GDAL's"


def test_one_scene_is_found_by_itself_and_a_folder_through_links(tmp_path):
    geotiff(tmp_path / "top" / "a.tif", GROUND)
    geotiff(tmp_path / "outside" / "deep" / "b.tif", GROUND)
    (tmp_path / "top" / "link").symlink_to(tmp_path / "outside")
    # Files in the folders of a Zarr are its own.
    folder = tmp_path / "top" / "c.zarr"
    zarr(folder, np.ascontiguousarray(np.moveaxis(GROUND, -1, 0)), (4, 32, 32))
    geotiff(folder / "own" / "d.tif", GROUND)
    geotiff(tmp_path / "top" / "group" / "own" / "e.tif", GROUND)
    (tmp_path / "top" / "group" / ".zgroup").touch()

    def names(root: str | Path) -> list[str]:
        return [scene.name for scene in find_scenes(root, 4)]

    assert names(tmp_path / "top") == ["a.tif", "c.zarr", "link/deep/b.tif"]
    assert names(folder) == ["c.zarr"]
    assert names(tmp_path / "top" / "a.tif") == ["a.tif"]
    assert names(f"{tmp_path}/*/**/*.tif")[0] == "outside/deep/b.tif"
    assert names(f"{tmp_path}/t*/a.tif") == ["a.tif"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no scenes there"):
        find_scenes(tmp_path / "empty")
