"""Train on tiles of scenes: GeoTIFF, COG, JPEG 2000 and Zarr of any size, read by windows."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olvae.config import ConfigError
from olvae.config.nodes import nearest
from olvae.data.dataset import MAX_VAL_IMAGES, MappedSource
from olvae.data.image import ALL_FILTERS, Augment, RandomScaleCrop
from olvae.data.order.groups import BLOCKS, FILE
from olvae.data.pixels.size_and_range import PixelRange, RangeNode, Sides, Size
from olvae.data.scenes.rasters import find_scenes
from olvae.data.scenes.scene_tiles import (
    USUAL_TILE,
    MissingPixelsError,
    SceneTiles,
    cut,
    hold_out_blocks,
    hold_out_scenes,
    whole,
)
from olvae.data.source import Sample
from olvae.files import counted

# Other tiles that are tried in place of one with too many missing values.
REDRAWN = 1000


class SceneSource(MappedSource):
    """Tiles of scenes of any size; whole scenes or blocks of them are held out.

    A training image is a random crop of a random tile. Validation images are tiles of ``size``
    pixels, as they are stored. A tile with a larger share of missing values than ``max_nodata`` is
    in neither; in others, missing values become the low end of the range.

    Args:
        scenes: a GeoTIFF, a COG, a JPEG 2000 or a Zarr array; a folder of them, searched at any
            depth; or a pattern.
        size, batch_size, num_workers, max_unreadable, range: see
            :class:`~olvae.data.source.Source`.
        val_scenes: the scenes of the validation and test images, in the same ways.
        val_fraction: without them, the share of the scenes or blocks that is held out. By default
            5 %, at least 20 of them or, of fewer than 100, a fifth.
        hold_out_by: ``file`` for whole scenes, by default; ``folder`` or a pattern, see
            :class:`~olvae.data.order.groups.Grouping`; or ``blocks``, by default for one scene.
        blocks: side of the blocks in pixels; by default room for a held-out square of four tiles,
            or for less if the scene is smaller than two such blocks.
        gap: pixels between a held-out tile and the nearest training block; by default ``size``.
        tile: side of the windows that training reads a crop from; by default twice ``size``.
        bands: those that are read, counted from 0; by default all.
        max_nodata: largest share of a tile's values that may be missing.
        min_fraction, filters, flip, shuffle_channels, augment: see
            :class:`~olvae.data.image.RandomScaleCrop`, on a tile.
        channels: of the images: the number of bands that are read.

    Raises FileNotFoundError: there are no scenes. ConfigError: settings contradict each other, or
    the scenes can't be split so. ValueError: no tile is complete, or a batch is larger than the
    data.
    """

    def __init__(
        self,
        scenes: str | Path,
        size: Size,
        batch_size: int,
        num_workers: int = 0,
        val_scenes: str | Path | None = None,
        val_fraction: float | None = None,
        hold_out_by: str | None = None,
        blocks: int | None = None,
        gap: int | None = None,
        tile: Size | None = None,
        bands: Sequence[int] | None = None,
        max_nodata: float = 0.0,
        min_fraction: float = 0.5,
        filters: Sequence[str] = ALL_FILTERS,
        flip: bool = True,
        shuffle_channels: float = 0.0,
        channels: int = 3,
        max_unreadable: float = 0.01,
        range: RangeNode | None = None,  # noqa: A002
        augment: Augment | None = None,
    ) -> None:
        side = Sides.of(size)
        found = find_scenes(scenes, channels, bands)
        others = found
        how = hold_out_by or (BLOCKS if blocks or gap or len(found) == 1 else FILE)
        if val_scenes is not None:
            how = "val_scenes"
        if how != BLOCKS and (blocks is not None or gap is not None):
            raise ConfigError(
                f"data.params.blocks and data.params.gap: whole scenes are held out, by {how}: "
                f"leave them out, or set data.params.hold_out_by to {BLOCKS}"
            )

        # The parts of the scenes that are trained on, and held out.
        if val_scenes is not None:
            others = find_scenes(val_scenes, channels, bands)
            train, held_out = whole(found), whole(others)
        elif how == BLOCKS:
            gap = max(side) if gap is None else gap
            longest = max(max(scene.height, scene.width) for scene in found)
            usual = max(max(side) + 2 * gap, min(2 * max(side) + 2 * gap, longest // 2))
            blocks = blocks or usual
            train, held_out = hold_out_blocks(found, blocks, gap, side, val_fraction)
        else:
            train, held_out = hold_out_scenes(found, how, val_fraction)

        # Their tiles; not all of very many are validated on, evenly spread.
        values = PixelRange.from_node(range)
        read = (channels, values, max_nodata)
        windows = Sides.of(tile) if tile else Sides(2 * side.height, 2 * side.width)
        val = cut(others, held_out, side, *read)
        if len(val) > MAX_VAL_IMAGES:
            places = np.linspace(0, len(val) - 1, MAX_VAL_IMAGES).astype(int)
            val.regions = val.regions[places]
        val = val.complete()
        if how == BLOCKS:
            val.blocks = blocks or 0
        transform = RandomScaleCrop(size, min_fraction, filters, flip, shuffle_channels, augment)
        super().__init__(
            cut(found, train, windows, *read),
            val,
            transform,
            batch_size,
            num_workers,
            channels,
            max_unreadable,
            range=range,
            hold_out_by=FILE if how in (BLOCKS, "val_scenes") else how,
        )
        self.crops = f"tiles of scenes, {side} pixels as stored; missing values: {max_nodata:g}"
        if how == BLOCKS:
            how = f"{BLOCKS} of {blocks} pixels with a gap of {gap}"
        self._held_out = f"of {counted(len(found), 'scene')}, held out by {how}"
        # Numbers of training tiles that were found to miss too much.
        self._left_out: set[int] = set()

    def describe(self) -> str:
        return f"{super().describe()}, {self._held_out}"

    def _train_sample(self, index: int, seed: tuple[int, int]) -> Sample:
        """Read a crop of a tile or, if too much of it is missing, of one drawn in its place."""
        for attempt in range(REDRAWN):
            if index not in self._left_out:
                try:
                    return super()._train_sample(index, seed)
                except MissingPixelsError as error:
                    # It may be another one, drawn in place of a broken one.
                    if error.key == self.train.key(index):
                        self._left_out.add(index)
            rng = np.random.default_rng((*seed, 2, attempt))
            index = int(rng.integers(len(self.train)))
        raise ValueError(
            f"of {REDRAWN} tiles drawn, each misses a larger share of its values than "
            "data.params.max_nodata: set it to more, or data.params.tile to less"
        )


def open_tiles(
    arguments: Mapping[str, Any], channels: int, pixel_range: PixelRange, size: Size | None
) -> SceneTiles:
    """All complete tiles of scenes: of ``tile`` pixels in the arguments, or else ``size``, or 256.

    ``arguments`` are of :class:`SceneSource`; only those that say what a tile is are used. Of any
    number of ``channels``, 0, it is all tiles, complete or not.

    Raises the errors of :class:`SceneSource`; ConfigError for an unknown argument.
    """
    known = inspect.signature(SceneSource).parameters
    for name in arguments:
        if name not in known:
            raise ConfigError(f"`data` scenes: unknown argument {name}{nearest(name, [*known])}")
    found = find_scenes(arguments["scenes"], channels, arguments.get("bands"))
    side = Sides.of(arguments.get("tile") or size or USUAL_TILE)
    if not channels:
        return cut(found, whole(found), side, channels, pixel_range, 1.0)
    share = arguments.get("max_nodata", 0.0)
    return cut(found, whole(found), side, channels, pixel_range, share).complete()
