from itertools import product
from pathlib import Path

import numpy as np
import pytest

from olvae.config import ConfigError
from olvae.data.image import EvalTransform, image_to_tensor
from olvae.data.order.groups import Grouping
from olvae.data.pixels.size_and_range import AS_STORED, PixelRange, Sides
from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes import scene_tiles
from olvae.data.scenes.rasters import Scene, find_scenes
from olvae.data.scenes.scene_tiles import (
    MissingPixelsError,
    Region,
    SceneTiles,
    cut,
    hold_out_blocks,
    hold_out_scenes,
    whole,
)
from tests.data.scenes.geotiffs import geotiff, ground

STATED = PixelRange.from_node({"pairs": [0, 10_000], "outside": "clip"})


class Blank(Scene):
    """A scene of a size, without a file."""

    def __init__(self, height: int, width: int, name: str = "a.tif") -> None:
        self.height = height
        self.width = width
        self.name = name


def slices(region: Region) -> tuple[slice, slice]:
    return (
        slice(region.top, region.top + region.height),
        slice(region.left, region.left + region.width),
    )


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 40), (64, 33), (100, 16)])
def test_tiles_cover_a_region_to_the_pixel(size):
    region = Region(2, 5, 7, *size)
    seen = np.zeros((200, 200), int)
    for tile in region.tiles(Sides(16, 24)):
        one = Region(*tile.tolist())
        assert (one.scene, one.height, one.width) == (2, min(16, size[0]), min(24, size[1]))
        seen[slices(one)] += 1
    inside = np.zeros((200, 200), bool)
    inside[slices(region)] = True
    assert np.array_equal(seen > 0, inside)


@pytest.mark.parametrize(
    ("size", "blocks", "gap", "tile"),
    [
        (size, blocks, gap, tile)
        for size, blocks, gap, tile in product(
            ((200, 300), (97, 251), (64, 500)), (48, 64, 90), (0, 7, 16), (16, 32)
        )
        if blocks >= tile // 2 + 2 * gap
    ],
)
def test_no_pixel_of_a_training_window_is_within_the_gap(size, blocks, gap, tile):
    """Pixel by pixel: each held-out tile, grown by the gap, beside each training window."""
    train, held_out = hold_out_blocks([Blank(*size)], blocks, gap, Sides(16, 16), 0.2)
    near = np.zeros(size, bool)
    for region in held_out:
        for row in region.tiles(Sides(16, 16)):
            one = Region(*row.tolist())
            near[
                max(0, one.top - gap) : one.top + one.height + gap,
                max(0, one.left - gap) : one.left + one.width + gap,
            ] = True
    trained = np.zeros(size, bool)
    for region in train:
        for row in region.tiles(Sides(tile, tile)):
            trained[slices(Region(*row.tolist()))] = True
    assert near.any()
    assert trained.any()
    assert not (near & trained).any()
    # Margins alone are lost: the blocks beside them are trained on whole.
    assert trained.mean() > 0.5


def test_held_out_blocks_lack_the_margins_to_their_neighbours_alone():
    """Three by two blocks of 64 pixels, the last ones have the rest; all but one held out."""
    train, held_out = hold_out_blocks([Blank(200, 130)], 64, 8, Sides(16, 16), 0.9)
    assert held_out == [
        Region(0, 0, 0, 56, 56),
        Region(0, 0, 72, 56, 58),
        Region(0, 72, 0, 48, 56),
        Region(0, 72, 72, 48, 58),
        Region(0, 136, 72, 64, 58),
    ]
    assert train == [Region(0, 128, 0, 72, 64)]
    # Of two scenes without a gap, each smaller than two blocks.
    pair = [Blank(64, 127), Blank(10, 64)]
    train, held_out = hold_out_blocks(pair, 64, 0, Sides(16, 16), None)
    assert (train, held_out) == ([Region(1, 0, 0, 10, 64)], [Region(0, 0, 0, 64, 127)])


@pytest.mark.parametrize(("blocks", "gap"), [(48, 16), (16, 0)])
def test_a_block_of_just_one_tile_and_its_gaps_is_held_out(blocks, gap):
    _, held_out = hold_out_blocks([Blank(3 * blocks, blocks)], blocks, gap, Sides(16, 9), 0.5)
    assert held_out[0] == Region(0, 0, 0, blocks - gap, blocks)
    for wrong in ((blocks - 1, gap), (blocks, -1)):
        with pytest.raises(ConfigError, match=r"data\.params\.blocks"):
            hold_out_blocks([Blank(300, 300)], *wrong, Sides(16, 9), None)


def test_a_block_is_large_enough_for_a_tile_and_its_gaps():
    scene = [Blank(300, 300)]
    with pytest.raises(ConfigError, match=r"blocks 40: .*48 pixels"):
        hold_out_blocks(scene, 40, 16, Sides(16, 16), None)
    with pytest.raises(ConfigError, match="one block"):
        hold_out_blocks(scene, 200, 16, Sides(16, 16), None)


def test_scenes_are_held_out_whole_by_file_folder_or_pattern():
    names = [f"{place}/{year}.tif" for place in ("alps", "delta", "ural") for year in range(4)]
    scenes = [Blank(8, 8, name) for name in names]
    for how, group in (
        ("file", lambda name: name),
        ("folder", lambda name: name.split("/")[0]),
        (r"(?P<group>\d+)\.tif", lambda name: name.split("/")[1]),
    ):
        train, held_out = hold_out_scenes(scenes, how, 0.3)
        parts = [{group(names[region.scene]) for region in part} for part in (train, held_out)]
        assert parts[0].isdisjoint(parts[1])
        assert len(parts[1]) >= 1
        assert sorted(region.scene for region in train + held_out) == list(range(12))
    with pytest.raises(ValueError, match=r"1 scene .*one group|can't be split"):
        hold_out_scenes(scenes[:1], "file", None)


def test_tiles_are_the_scenes_pixels_with_gaps_filled(tmp_path, caplog):
    array = ground(0, (64, 64))
    array[:16, :8, 2] = 0  # of a tile's values: 16 x 8 of 32 x 32 x 4, .03125
    geotiff(tmp_path / "a.tif", array, nodata=0)
    stated = PixelRange.from_node({"pairs": [[5, 10_000]] * 3 + [[0.5, 10_000]], "outside": "clip"})
    scenes = find_scenes(tmp_path, 4)
    tiles = cut(scenes, whole(scenes), Sides(32, 32), 4, stated, 0.03125)
    assert [tiles.key(i) for i in range(4)] == [
        f"a.tif/{top:05d}-{left:05d}" for top in (0, 32) for left in (0, 32)
    ]
    assert {tiles.file(i) for i in range(4)} == {"a.tif"}
    expected = np.where(array == 0, 5, array).clip([5, 5, 5, 1], None)
    assert np.array_equal(image_to_tensor(tiles[0].read()).permute(1, 2, 0), expected[:32, :32])
    assert len(tiles.complete()) == 4
    stricter = cut(scenes, whole(scenes), Sides(32, 32), 4, stated, 0.03)
    with pytest.raises(MissingPixelsError, match=r"a\.tif/00000-00000: 3\.12%"):
        stricter[0]
    kept = stricter.complete()
    assert (len(kept), kept.key(0)) == (3, "a.tif/00000-00032")
    assert "1 tile of 4, which miss" in caplog.text
    geotiff(tmp_path / "a.tif", np.zeros_like(array), nodata=0)
    scenes = find_scenes(tmp_path, 4)
    empty = cut(scenes, whole(scenes), Sides(32, 32), 4, stated)
    with pytest.raises(ValueError, match="`max_nodata` 0 of each of 4 tiles"):
        empty.complete()


def test_the_ranges_missing_value_is_the_one_that_counts(tmp_path):
    array = ground(0, (32, 32))
    array[3, 4] = 7777
    geotiff(tmp_path / "a.tif", array)
    stated = PixelRange.from_node({"pairs": [0, 10_000], "nodata": 7777})
    scenes = find_scenes(tmp_path, 4)
    tiles = cut(scenes, whole(scenes), Sides(32, 32), 4, stated, 0.01)
    found = image_to_tensor(tiles[0].read()).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.where(array == 7777, 0, array))


class Values(Blank):
    """A scene of values in memory, the same in each tile."""

    def __init__(self, values: np.ndarray, missing: bool = False, **more: object) -> None:
        super().__init__(100, 130)
        self.values = values
        self.missing = np.full(values.shape, missing)
        self.path = Path("/x/a.tif")
        self.broken = None
        self.file_state = "9 5"
        self.nodata = None
        self.has_gaps = True
        self.__dict__.update(more)

    def read(self, window, nodata=None):
        if self.broken:
            raise UnreadableImageError(self.name, self.broken)
        self.window = (window, nodata)
        return self.values.copy(), self.missing


REGIONS = np.array([[0, 0, 0, 8, 9], [0, 96, 120, 4, 9], [0, 47, 48, 8, 9]], np.int32)
PIXELS = np.arange(6, dtype=np.uint16).reshape(2, 3, 1)


def tiles_of(scene: Scene, pixel_range: PixelRange = STATED, **more: object) -> SceneTiles:
    return SceneTiles([scene], Sides(8, 9), REGIONS, 1, pixel_range, **more)


def test_a_tiles_names_are_of_its_scene_place_and_block():
    scene = Values(PIXELS)
    tiles = tiles_of(scene, blocks=48)
    assert [tiles.key(i) for i in range(2)] == ["a.tif/00000-00000", "a.tif/00096-00120"]
    # Two by two blocks, of which the last ones have the rest.
    groups = [tiles.group(i, Grouping("folder")) for i in range(3)]
    assert groups == ["a.tif, block 0-0", "a.tif, block 1-1", "a.tif, block 0-1"]
    assert tiles_of(scene).group(1, Grouping()) == "a.tif"
    assert tiles_of(scene).group(1, Grouping("folder")) == "."
    assert tiles.state(1) == "a.tif/00096-00120\x009 5 8x9"
    assert tiles.identity(1) == "a.tif/00096-00120 9"
    assert tiles.eval_transform() == EvalTransform([8, 9])
    scene.broken = "no image"
    assert (tiles.key(1), tiles.files(1)) == ("a.tif", {})
    scene.height, scene.width = 10, 10
    assert tiles.group(0, Grouping()) == "a.tif, block 0-0"


def test_a_tiles_place_is_kept_beside_its_latent(monkeypatch):
    asked = []
    for place, files in ((b"", {}), (b"{}", {"geo.json": b"{}"})):
        monkeypatch.setattr(
            scene_tiles, "describe_place", lambda *args, p=place: [asked.append(args), p][1]
        )
        scene = Values(PIXELS)
        assert tiles_of(scene).files(1) == files
        assert asked[-1] == (scene, 96, 120)


def test_a_tile_is_read_as_it_is_stored_or_in_the_range():
    scene = Values(PIXELS, nodata=3.0)
    photo = tiles_of(scene, AS_STORED)[1]
    assert scene.window == ((96, 120, 4, 9), None)
    assert (photo.name, photo.nodata) == ("/x/a.tif", 3.0)
    assert image_to_tensor(photo.read())[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    stated = PixelRange.from_node({"pairs": [1, 4], "nodata": 2})
    with pytest.raises(UnreadableImageError, match="at row 96, column 120: 0 at row 0") as error:
        tiles_of(scene, stated)[1]
    assert (error.value.name, error.value.image) == ("a.tif", "a.tif/00096-00120")
    assert scene.window == ((96, 120, 4, 9), 2)
    photo = tiles_of(scene)[2]
    assert (photo.name, photo.channels, photo.pixel_range) == ("a.tif/00047-00048", 1, STATED)


def test_tiles_that_may_miss_values_are_read_to_be_counted():
    whole = Values(PIXELS, has_gaps=False)
    tiles = tiles_of(whole)
    assert tiles.complete() is tiles
    stated = PixelRange.from_node({"pairs": [0, 9], "nodata": 2})
    assert len(tiles_of(whole, stated).complete()) == 3
    assert whole.window == ((47, 48, 8, 9), 2)
    missing = Values(PIXELS, missing=True)
    with pytest.raises(ValueError, match="0 of each of 3 tiles"):
        tiles_of(missing).complete()
    assert len(tiles_of(missing, max_nodata=1.0).complete()) == 3
    assert len(tiles_of(Values(PIXELS, broken="cut off")).complete()) == 3
    # Of two scenes the one with gaps alone is read.
    regions = REGIONS.copy()
    regions[1, 0] = 1
    pair = SceneTiles([whole, missing], Sides(8, 9), regions, 1, STATED)
    del whole.window
    assert [pair.key(i)[:5] for i in range(3)] == ["a.tif"] * 3
    assert len(pair.complete()) == 2
    assert not hasattr(whole, "window")


def test_a_share_of_missing_values_is_from_0_to_1():
    for share in (0.0, 1.0):
        assert (
            cut([Blank(8, 9)], [Region(0, 0, 0, 8, 9)], Sides(8, 9), 1, STATED, share).max_nodata
            == share
        )
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"max_nodata must be between 0 and 1, got {share}"):
            cut([Blank(8, 9)], [Region(0, 0, 0, 8, 9)], Sides(8, 9), 1, STATED, share)


def test_two_scenes_are_enough_to_hold_one_out():
    pair = [Blank(8, 9, name) for name in ("a.tif", "b.tif")]
    train, held_out = hold_out_scenes(pair, "file", None)
    assert (train, held_out) == ([Region(1, 0, 0, 8, 9)], [Region(0, 0, 0, 8, 9)])
