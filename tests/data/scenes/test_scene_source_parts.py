"""How scenes are split by default, which tiles they are cut into, and what replaces one."""

from typing import Any

import numpy as np
import pytest

from olvae.config import ConfigError
from olvae.data.dataset import MappedSource
from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.scenes import scene_source
from olvae.data.scenes.scene_source import REDRAWN, SceneSource, open_tiles
from olvae.data.scenes.scene_tiles import MissingPixelsError
from tests.data.scenes.geotiffs import geotiff, ground
from tests.data.scenes.test_scene_tiles import Blank

RANGE = {"pairs": [0, 10_000]}


class StopError(Exception):
    """What follows is not needed."""


@pytest.fixture
def split(monkeypatch):
    """How `SceneSource` splits scenes of a size: the function that it asks, with what."""

    def found(count: int, size: tuple[int, int], **arguments: Any) -> tuple[Any, ...]:
        asked = []
        for name in ("hold_out_blocks", "hold_out_scenes"):

            def ask(_: object, *args: object, name: str = name) -> None:
                asked.append((name, *args))
                raise StopError

            monkeypatch.setattr(scene_source, name, ask)
        scenes = [Blank(*size, name=f"{number}.tif") for number in range(count)]
        monkeypatch.setattr(scene_source, "find_scenes", lambda *_: scenes)
        with pytest.raises(StopError):
            SceneSource("x", [16, 24], 2, **arguments)
        return asked[0]

    return found


@pytest.mark.parametrize(
    ("size", "arguments", "blocks", "gap"),
    [
        ((100, 300), {}, 96, 24),
        ((300, 100), {}, 96, 24),
        ((160, 100), {}, 80, 24),
        ((100, 100), {}, 72, 24),
        ((300, 300), {"gap": 5}, 58, 5),
        ((300, 300), {"gap": 0}, 48, 0),
        ((300, 300), {"blocks": 200}, 200, 24),
        ((300, 300), {"blocks": 200, "gap": 9, "hold_out_by": "blocks"}, 200, 9),
    ],
)
def test_one_scene_is_split_by_blocks_of_two_tiles_and_gaps(split, size, arguments, blocks, gap):
    """Or of half of the scene, but never less than a tile and its gaps."""
    found = split(1, size, val_fraction=0.3, **arguments)
    assert found == ("hold_out_blocks", blocks, gap, (16, 24), 0.3)


def test_several_scenes_are_held_out_whole_unless_blocks_are_named(split):
    assert split(2, (99, 99), val_fraction=0.3) == ("hold_out_scenes", "file", 0.3)
    assert split(2, (99, 99), hold_out_by="folder") == ("hold_out_scenes", "folder", None)
    for named in ({"blocks": 80}, {"gap": 3}, {"hold_out_by": "blocks"}):
        assert split(2, (99, 99), **named)[0] == "hold_out_blocks"
    for named in ({"hold_out_by": "folder", "gap": 0}, {"val_scenes": "y", "blocks": 80}):
        with pytest.raises(ConfigError, match=r"are held out, by (folder|val_scenes)"):
            SceneSource("x", 16, 2, **named)


def test_a_sources_tiles_and_crops(tmp_path):
    for number in range(2):
        geotiff(tmp_path / f"{number}.tif", ground(number, (64, 96)))
    common = {"channels": 2, "bands": [1, 3], "range": RANGE}
    s = SceneSource(
        tmp_path,
        [16, 24],
        2,
        3,
        max_nodata=0.1,
        min_fraction=0.9,
        filters=["box"],
        flip=False,
        shuffle_channels=0.2,
        max_unreadable=0.3,
        augment={"turns": False},
        **common,
    )
    assert (s.train.side, s.val.side) == ((32, 48), (16, 24))
    assert (len(s.train), len(s.val)) == (4, 16)
    assert (s.size, s.batch_size, s.num_workers, s.channels) == ((16, 24), 2, 3, 2)
    assert (s.max_unreadable, s.grouping.how, s.val.blocks) == (0.3, "file", 0)
    crop = s.transform
    assert (crop.min_fraction, crop.filters, crop.flip) == (0.9, ["box"], False)
    assert (crop.shuffle_channels, crop.augment) == (0.2, {"turns": False})
    assert s.crops == "tiles of scenes, 16x24 pixels as stored; missing values: 0.1"
    assert s.describe().endswith(", of 2 scenes, held out by file")
    assert SceneSource(tmp_path, 16, 2, tile=40, **common).train.side == (40, 40)
    blocks = SceneSource(tmp_path, 16, 2, blocks=32, gap=4, **common)
    assert (blocks.val.blocks, blocks.grouping.how) == (32, "file")
    others = SceneSource(tmp_path, 16, 2, val_scenes=tmp_path / "0.tif", **common)
    assert (len(others.train), len(others.val), others.grouping.how) == (12, 24, "file")
    assert others.describe().endswith(", of 2 scenes, held out by val_scenes")
    for folder in "ab":
        geotiff(tmp_path / "deep" / folder / "0.tif", ground(0, (64, 96)))
    assert SceneSource(tmp_path / "deep", 16, 2, hold_out_by="folder", **common).grouping.how == (
        "folder"
    )


def test_tiles_have_the_side_that_is_named(tmp_path):
    array = ground(0, (64, 96))
    array[:3, :3] = 0
    geotiff(tmp_path / "a.tif", array, nodata=0)
    stated = PixelRange.from_node(RANGE)
    scenes = {"scenes": str(tmp_path)}
    for arguments, size, side, tiles in (
        ({"tile": [16, 32]}, 48, (16, 32), 12 - 1),
        ({}, 32, (32, 32), 6 - 1),
        ({"max_nodata": 1.0}, 32, (32, 32), 6),
        ({"max_nodata": 1.0}, None, (256, 256), 1),
    ):
        found = open_tiles({**scenes, **arguments}, 4, stated, size)
        assert (found.side, len(found)) == (side, tiles)
    # Of any number of channels all are taken.
    found = open_tiles({**scenes, "bands": [2, 0]}, 0, stated, 32)
    assert (len(found), found.max_nodata, found.scenes[0].bands) == (6, 1.0, [2, 0])
    with pytest.raises(ConfigError, match="unknown argument tiles; did you mean tile"):
        open_tiles({**scenes, "tiles": 3}, 4, stated, 32)


class Tiles:
    def __len__(self) -> int:
        return 9

    def key(self, index: int) -> str:
        return f"key{index}"


def test_a_tile_that_misses_too_much_is_replaced_by_the_samples_own_numbers(monkeypatch):
    asked = []
    missing = {3}

    def read(_: object, index: int, seed: tuple[int, int]) -> str:
        asked.append(index)
        if index in missing:
            raise MissingPixelsError(f"key{index}", 0.5)
        if index == 4:
            raise MissingPixelsError("key8", 0.5)
        return f"sample{index}"

    monkeypatch.setattr(MappedSource, "_train_sample", read)
    source = SceneSource.__new__(SceneSource)
    source.train, source._left_out = Tiles(), set()
    drawn = [int(np.random.default_rng((5, 7, 2, n)).integers(9)) for n in range(REDRAWN)]
    missing |= {*drawn[:2]} - {drawn[2]}
    wanted = next(index for index in drawn if index not in missing and index != 4)
    assert source._train_sample(3, (5, 7)) == f"sample{wanted}"
    assert source._left_out == {index for index in asked if index in missing}
    # What was left out is not read again.
    first = asked.copy()
    assert source._train_sample(3, (5, 7)) == f"sample{wanted}"
    assert asked[len(first) :] == [index for index in first if index not in missing]
    # Another tile, drawn in place of a broken one, leaves this one in.
    source._left_out = set()
    source._train_sample(4, (5, 7))
    assert 4 not in source._left_out
    missing |= set(range(9))
    with pytest.raises(ValueError, match=f"of {REDRAWN} tiles drawn, each misses"):
        source._train_sample(3, (5, 7))
