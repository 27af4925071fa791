"""Cut scenes into tiles: numbered pictures of one size; whole scenes or blocks are held out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from olvae.config import ConfigError
from olvae.data.dataset import ImageDataset, evenly_spread
from olvae.data.image import EvalTransform, Photo, stated_picture
from olvae.data.order.groups import Grouping
from olvae.data.pixels.size_and_range import AS_STORED, PixelRange, Sides
from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes.georeference import PLACE_FILE, describe_place, fill
from olvae.data.scenes.rasters import Scene
from olvae.files import counted, warn_once

# The tile's pixels where nobody says another number.
USUAL_TILE = 256


class Region(NamedTuple):
    """A part of a scene, by the scene's number; all others in its pixels."""

    scene: int
    top: int
    left: int
    height: int
    width: int

    def tiles(self, side: Sides) -> NDArray[np.int32]:
        """Cut into tiles that cover it, (N, 5); the last ones are moved back to end where it ends.

        A side that is shorter than a tile's stays as it is.
        """
        height = min(side.height, self.height)
        width = min(side.width, self.width)
        tops = np.append(np.arange(0, self.height - height, side.height), self.height - height)
        lefts = np.append(np.arange(0, self.width - width, side.width), self.width - width)
        grid = np.empty((len(tops), len(lefts), 5), np.int32)
        grid[:] = (self.scene, self.top, self.left, height, width)
        grid[..., 1] += tops[:, None].astype(np.int32)
        grid[..., 2] += lefts.astype(np.int32)
        return grid.reshape(-1, 5)


class MissingPixelsError(ValueError):
    """A tile, by its key, has a larger share of missing values than `max_nodata`."""

    def __init__(self, key: str, share: float) -> None:
        super().__init__(f"{key}: {share:.2%} of its values are missing")
        self.key = key


@dataclass
class SceneTiles(ImageDataset):
    """Tiles of scenes, as pictures. Their missing values become the low end of the range.

    Args:
        scenes: the files.
        side: of a tile, in pixels; smaller where a scene is.
        regions: the tiles, an array (N, 5) of :class:`Region`.
        channels, pixel_range: as of :class:`~olvae.data.image.Photo`.
        max_nodata: the largest share of a tile's values that may be missing.
        blocks: side of the blocks that are held out; 0 where whole scenes are.
    """

    scenes: Sequence[Scene]
    side: Sides
    regions: NDArray[np.int32]
    channels: int
    pixel_range: PixelRange
    max_nodata: float = 0.0
    blocks: int = 0

    def __len__(self) -> int:
        return len(self.regions)

    def region(self, index: int) -> Region:
        """The place of a tile."""
        return Region(*self.regions[index].tolist())

    def file(self, index: int) -> str:
        return self.scenes[self.region(index).scene].name

    def key(self, index: int) -> str:
        """The scene's name, and the tile's first row and column."""
        region = self.region(index)
        scene = self.scenes[region.scene]
        return scene.name if scene.broken else f"{scene.name}/{region.top:05d}-{region.left:05d}"

    def group(self, index: int, grouping: Grouping) -> str:
        """Name a tile's scene, its group by ``grouping``, or the block that is held out."""
        if not self.blocks:
            return super().group(index, grouping)
        region = self.region(index)
        scene = self.scenes[region.scene]
        # The last block of a row or a column has the rest too.
        row = min(region.top // self.blocks, max(0, scene.height // self.blocks - 1))
        column = min(region.left // self.blocks, max(0, scene.width // self.blocks - 1))
        return f"{scene.name}, block {row}-{column}"

    def eval_transform(self) -> EvalTransform:
        return EvalTransform(self.side.node)

    def state(self, index: int) -> str:
        scene = self.scenes[self.region(index).scene]
        return f"{self.key(index)}\0{scene.file_state} {self.side}"

    def identity(self, index: int) -> str:
        # The time is left out: it is another one in a copy.
        size = self.scenes[self.region(index).scene].file_state.partition(" ")[0]
        return f"{self.key(index)} {size}"

    def files(self, index: int) -> Mapping[str, bytes]:
        """Where a tile is, for `olvae decode` to write a GeoTIFF."""
        region = self.region(index)
        scene = self.scenes[region.scene]
        place = b"" if scene.broken else describe_place(scene, region.top, region.left)
        return {PLACE_FILE: place} if place else {}

    def __getitem__(self, index: int) -> Photo:
        """Raises UnreadableImageError; MissingPixelsError if more than `max_nodata` is missing."""
        region = self.region(index)
        scene = self.scenes[region.scene]
        values, missing = scene.read(region[1:], self.pixel_range.nodata)
        share = float(missing.mean())
        if share > self.max_nodata:
            raise MissingPixelsError(self.key(index), share)

        # Values as they are stored keep those that stand for missing ones.
        name = str(scene.path)
        if self.pixel_range == AS_STORED:
            photo = Photo(stated_picture(values, AS_STORED), name, self.channels, AS_STORED)
            photo.nodata = scene.nodata
            return photo
        fill(values, missing, self.pixel_range)
        try:
            picture = stated_picture(values, replace(self.pixel_range, nodata=None))
        except ValueError as error:
            where = f"the tile at row {region.top}, column {region.left}"
            why = f"{where}: {error}"
            raise UnreadableImageError(scene.name, why, self.key(index)) from error
        return Photo(picture, self.key(index), self.channels, self.pixel_range)

    def complete(self) -> "SceneTiles":
        """The tiles that miss at most `max_nodata`; reads all that may miss values.

        Raises ValueError: there are none.
        """
        nodata = self.pixel_range.nodata
        if nodata is None and not any(scene.has_gaps for scene in self.scenes):
            return self
        kept = [index for index in range(len(self)) if self._is_complete(index)]
        if not kept:
            raise ValueError(
                f"more than `max_nodata` {self.max_nodata:g} of each of "
                f"{counted(len(self), 'tile')} is missing: set a larger share, or smaller tiles"
            )
        if len(kept) < len(self):
            warn_once(
                f"left out {counted(len(self) - len(kept), 'tile')} of {len(self)}, "
                f"which miss more than `max_nodata` {self.max_nodata:g} of their values"
            )
        return replace(self, regions=self.regions[kept])

    def _is_complete(self, index: int) -> bool:
        region = self.region(index)
        scene = self.scenes[region.scene]
        nodata = self.pixel_range.nodata
        if self.max_nodata >= 1.0 or not (scene.has_gaps or nodata is not None):
            return True
        try:
            return bool(scene.read(region[1:], nodata)[1].mean() <= self.max_nodata)
        except UnreadableImageError:  # reading it counts it
            return True


def cut(
    scenes: Sequence[Scene],
    regions: Iterable[Region],
    side: Sides,
    channels: int,
    pixel_range: PixelRange,
    max_nodata: float = 0.0,
) -> SceneTiles:
    """Cut regions into tiles of ``side``; a scene that can't be read counts as one tile.

    Raises ValueError: `max_nodata` is no share.
    """
    if not 0.0 <= max_nodata <= 1.0:
        raise ValueError(f"max_nodata must be between 0 and 1, got {max_nodata}")
    tiles = np.concatenate([region.tiles(side) for region in regions])
    return SceneTiles(scenes, side, tiles, channels, pixel_range, max_nodata)


def whole(scenes: Sequence[Scene]) -> list[Region]:
    """Each scene as one region."""
    return [Region(i, 0, 0, scene.height, scene.width) for i, scene in enumerate(scenes)]


def hold_out_scenes(
    scenes: Sequence[Scene], how: str, fraction: float | None
) -> tuple[list[Region], list[Region]]:
    """Split scenes into training and, evenly spread, held-out ones, group by group.

    Raises ValueError: there is one group alone.
    """
    groups = list(Grouping(how).members(scene.name for scene in scenes).values())
    if len(groups) < 2:
        raise ValueError(
            f"`hold_out_by` {how}: the {counted(len(scenes), 'scene')} are one group, which can't "
            "be split: set it to blocks"
        )
    chosen = evenly_spread(len(groups), fraction)
    held_out = {scene for number in chosen for scene in groups[number]}
    regions = whole(scenes)
    train = [region for region in regions if region.scene not in held_out]
    return train, [region for region in regions if region.scene in held_out]


def hold_out_blocks(
    scenes: Sequence[Scene], blocks: int, gap: int, least: Sides, fraction: float | None
) -> tuple[list[Region], list[Region]]:
    """Split scenes into blocks to train on and, evenly spread, held-out ones without their margin.

    A block has ``blocks`` pixels on each side; the last one of a row or a column has the rest too.
    The margin of ``gap`` pixels, where a block meets another one, is in neither part. So any
    training pixel is more than ``gap`` pixels from those that are held out.

    Raises ConfigError: a held-out block would be smaller than ``least``, or there is one block.
    """
    needed = max(least) + 2 * gap
    if gap < 0 or blocks < needed:
        raise ConfigError(
            f"data.params.blocks {blocks}: a block that is held out needs {needed} pixels, for a "
            f"tile of {least.short} and a gap of {gap} on both sides: set it to that or more, or "
            "data.params.gap to less"
        )
    regions = []
    for number, scene in enumerate(scenes):
        tops = range(0, max(1, scene.height // blocks) * blocks, blocks)
        lefts = range(0, max(1, scene.width // blocks) * blocks, blocks)
        for top, left in product(tops, lefts):
            bottom = scene.height if top == tops[-1] else top + blocks
            right = scene.width if left == lefts[-1] else left + blocks
            regions.append(Region(number, top, left, bottom - top, right - left))
    if len(regions) < 2:
        raise ConfigError(
            f"data.params.blocks {blocks}: the scene is one block of this size, which can't be "
            "split: set less, and data.params.gap too"
        )

    # Training blocks as they are; held-out ones without the margins to their neighbours.
    chosen = set(evenly_spread(len(regions), fraction))
    held_out = []
    for number in sorted(chosen):
        scene_number, top, left, height, width = regions[number]
        scene = scenes[scene_number]
        bottom = top + height
        right = left + width
        top += gap if top else 0
        left += gap if left else 0
        bottom -= gap if bottom < scene.height else 0
        right -= gap if right < scene.width else 0
        held_out.append(Region(scene_number, top, left, bottom - top, right - left))
    return [regions[i] for i in range(len(regions)) if i not in chosen], held_out
