import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import rasterio
import tifffile
import torch

from olvae.config import ConfigError
from olvae.data.opening import open_images, open_source, open_test_source, trains_on
from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.scenes import scene_source
from olvae.data.scenes.scene_source import SceneSource
from olvae.data.source import LoaderProcess
from olvae.data.value_range import measure_range
from tests.data.scenes.geotiffs import geotiff, ground

RANGE = {"pairs": [0, 10_000]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Four scenes; a corner of each is missing, and one has a tile that can't be decoded."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(4):
        array = ground(number)
        array[:40, :20] = 0
        geotiff(folder / f"{number}.tif", array, nodata=0, compress="deflate")
    content = bytearray((folder / "1.tif").read_bytes())
    with tifffile.TiffFile(folder / "1.tif") as file:
        start = file.pages.first.dataoffsets[3]
    content[start : start + 20] = b"\xff" * 20
    (folder / "1.tif").write_bytes(content)
    return folder


def source(root, **arguments):
    usual = {"size": 16, "batch_size": 4, "channels": 4, "range": RANGE, "max_unreadable": 1.0}
    return SceneSource(root, **{**usual, **arguments})


def test_validation_images_are_the_held_out_scenes_windows(scenes):
    s = source(scenes)
    held_out = {s.val.file(index) for index in range(len(s.val))}
    assert held_out == {"0.tif"}
    assert {s.train.file(index) for index in range(len(s.train))} == {"1.tif", "2.tif", "3.tif"}
    with rasterio.open(scenes / "0.tif") as file:
        whole = file.read()
    keys = []
    assert {group for batch in s.val_loader() for group in batch["group"]} == {"0.tif"}
    for batch in s.val_loader():
        for key, image in zip(batch["key"], batch["image"], strict=True):
            top, left = map(int, key.partition("/")[2].split("-"))
            assert np.array_equal(image, whole[:, top : top + 16, left : left + 16])
            assert (image.numpy() > 0).all()
            keys.append(key)
    # 6 rows of 9 tiles, without those that meet the corner of 40 x 20 pixels.
    assert len(keys) == s.val_images == 6 * 9 - 3 * 2
    assert s.describe() == (
        f"{len(s.train)} training, 48 validation and test images, of 4 scenes, held out by file"
    )


def test_of_very_many_tiles_some_are_validated_on_evenly_spread(tmp_path, monkeypatch):
    geotiff(tmp_path / "a.tif", ground(0, (16, 16 * 13)))
    geotiff(tmp_path / "b.tif", ground(1, (32, 32)))
    for most, places in ((13, range(13)), (5, (0, 3, 6, 9, 12)), (2, (0, 12))):
        monkeypatch.setattr(scene_source, "MAX_VAL_IMAGES", most)
        val = source(tmp_path / "b.tif", val_scenes=tmp_path / "a.tif", batch_size=1).val
        assert [val.key(i) for i in range(len(val))] == [
            f"a.tif/00000-{16 * i:05d}" for i in places
        ]


def test_training_crops_are_complete_pixels_of_their_tiles(scenes):
    """At the size of the crop: with tiles of that size nothing is resized."""
    s = source(scenes, tile=16, min_fraction=1.0, flip=False)
    files = {}
    for number in (2, 3):
        with rasterio.open(scenes / f"{number}.tif") as file:
            files[f"{number}.tif"] = file.read()
    seen = 0
    for sample in islice(s.stream(0, 0, LoaderProcess()), 200):
        assert (sample.image.numpy() > 0).all()
        name, _, place = sample.key.partition("/")
        if name in files:
            top, left = map(int, place.split("-"))
            window = files[name][:, top : top + 16, left : left + 16]
            assert np.array_equal(sample.image, window)
            seen += 1
    assert seen > 50


def test_tiles_that_are_left_out_do_not_move_later_samples(scenes):
    """Which tiles a process has met before makes no difference, be they missing or broken."""
    whole = list(islice(source(scenes).stream(3, 0, LoaderProcess()), 90))
    assert any(sample.errors for sample in whole)
    s = source(scenes)
    list(islice(s.stream(8, 0, LoaderProcess()), 150))
    assert s._left_out
    for position in (0, 7, 31):
        found = list(islice(s.stream(3, position, LoaderProcess()), 90 - position))
        for one, other in zip(found, whole[position:], strict=True):
            assert (one.key, one.errors) == (other.key, other.errors)
            assert torch.equal(one.image, other.image)


def test_one_scene_is_held_out_by_blocks(tmp_path):
    path = geotiff(tmp_path / "a.tif", ground(0, (200, 300)))
    s = source(path, blocks=64, gap=8)
    assert s.describe().endswith("of 1 scene, held out by blocks of 64 pixels with a gap of 8")
    assert source(path).describe().endswith("blocks of 64 pixels with a gap of 16")
    assert 0 < len(s.val) < len(s.train) * 4
    # Of 12 blocks of 64 pixels and more two are held out, evenly spread: intervals draw them.
    groups = {group for batch in s.val_loader() for group in batch["group"]}
    assert groups == {"a.tif, block 0-0", "a.tif, block 2-3"}
    with pytest.raises(ConfigError, match="whole scenes"):
        source(path, blocks=64, hold_out_by="file")
    with pytest.raises(ValueError, match="to blocks"):
        source(path, hold_out_by="file")


def test_scenes_of_another_folder_are_validated_on(scenes, tmp_path):
    geotiff(tmp_path / "v.tif", ground(9))
    s = source(scenes, val_scenes=tmp_path)
    assert {s.val.file(index) for index in range(len(s.val))} == {"v.tif"}
    assert {s.train.file(index) for index in range(len(s.train))} == {f"{i}.tif" for i in range(4)}


def test_all_missing_is_a_line_that_names_the_setting(tmp_path):
    geotiff(tmp_path / "a.tif", ground(0))
    geotiff(tmp_path / "b.tif", np.zeros((96, 130, 4), np.uint16), nodata=0)
    s = source(tmp_path)
    with pytest.raises(ValueError, match=r"data\.params\.max_nodata"):
        next(s.stream(0, 0, LoaderProcess()))
    with pytest.raises(ValueError, match=r"max_nodata must .*2"):
        source(tmp_path, max_nodata=2.0)


def test_commands_take_scenes_by_their_prefix(scenes, tmp_path, monkeypatch):
    stated = PixelRange.from_node(RANGE)
    images = open_images(f"scenes:{scenes},tile=32,bands=[2,1]", 2, stated)
    # Of each scene's 3 x 5 tiles, 2 miss values.
    assert (images.side, len(images)) == ((32, 32), 4 * (3 * 5 - 2))
    opened = open_source(f"scenes:{scenes},max_nodata=1.0", 16, 4, channels=4, pixel_range=stated)
    assert (opened.val_images, opened.val.side) == (4 * 54, (16, 16))
    found = measure_range(f"scenes:{scenes}")
    assert (found.nodata, len(found.percentiles)) == (0.0, 4)
    assert 1 <= found.percentiles[0, 0] < found.percentiles[0, -1] <= 9999
    # Blocks are of the scenes that were trained on: others' intervals go by scenes.
    trained = {"data": {"params": {"scenes": str(scenes), "hold_out_by": "blocks"}}}
    tested = open_test_source(trained, f"scenes:{scenes}", 32, 4, stated)
    assert next(tested.once(LoaderProcess())).group == tested.val.file(0)
    assert trains_on(trained, f"scenes:{scenes},max_nodata=1.0")
    assert trains_on(trained, f"scenes:{scenes / '2.tif'}")
    assert not trains_on(trained, f"scenes:{tmp_path}")
    with pytest.raises(ConfigError, match=r"argument tiles.* tile"):
        open_images(f"scenes:{scenes},tiles=32", 4, stated)
    # A folder of this name is a folder of images.
    monkeypatch.chdir(scenes.parent)
    named = scenes.rename(scenes.parent / "scenes")
    try:
        assert len(open_images("scenes", 4, stated)) == 4
    finally:
        named.rename(scenes)


PEAK = """
import resource, sys
from itertools import islice
from olvae.data.scenes.scene_source import SceneSource
from olvae.data.source import LoaderProcess
from olvae.data.value_range import measure_range

path = sys.argv[1]
measure_range(f"scenes:{path},tile=512", 50)
source = SceneSource(path, 256, 4, channels=4, range={"pairs": [0, 10_000]})
list(islice(source.stream(0, 0, LoaderProcess()), 40))
list(islice(source.once(LoaderProcess()), 40))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, source.images)
"""


@pytest.mark.slow
def test_a_scene_of_20_000_pixels_takes_no_more_memory_than_a_small_one(tmp_path):
    """3 GB of pixels, of which a few blocks are stored."""
    peaks = []
    for side, images in ((2_000, 16), (20_000, 1_000)):
        path = tmp_path / f"{side}.tif"
        place = {"width": side, "height": side, "count": 4, "dtype": "uint16", "SPARSE_OK": True}
        layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "BIGTIFF": "YES"}
        with rasterio.open(path, "w", driver="GTiff", **place, **layout) as file:
            for top in range(0, side - 512, 4096):
                block = np.moveaxis(ground(top, (512, 512)), -1, 0)
                file.write(block, window=((top, top + 512), (top, top + 512)))
        assert path.stat().st_size < 2**25
        command = [sys.executable, "-c", PEAK, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, found = map(int, done.stdout.split())
        peaks.append(peak)
        assert found > images
    assert peaks[1] < peaks[0] + 200  # MiB: GDAL keeps 128 of unpacked blocks
