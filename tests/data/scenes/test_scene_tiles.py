from itertools import product

import numpy as np
import pytest

from olvae.config import ConfigError
from olvae.data.image import image_to_tensor
from olvae.data.pixels.size_and_range import PixelRange, Sides
from olvae.data.scenes.rasters import Scene, find_scenes
from olvae.data.scenes.scene_tiles import (
    MissingPixelsError,
    Region,
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
