"""Keep a scene's place on the earth and its missing values, from its file to a result's GeoTIFF."""

import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from olvae.data.image import image_to_tensor, read_picture, stated_picture
from olvae.data.pixels.arrays import NODATA, read_array
from olvae.data.pixels.size_and_range import Array, PixelRange
from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes.rasters import (
    GEOTIFF,
    ZARR,
    Scene,
    find_missing,
    import_rasterio,
    open_dataset,
    raster_driver,
    whole_pixels,
)
from olvae.files import legible, reason

# Tags of a GeoTIFF: scale, tie points, transformation, and the keys of its coordinates.
GEO_KEYS = 34735
PLACE = (33550, 33922, 34264, GEO_KEYS, 34736, 34737)
# GDAL's text of XML, from which names of bands and the meaning of values are kept, but not the
# input's statistics.
METADATA = 42112
KEPT_ITEMS = re.compile(
    r'<Item [^<>]*role="(?:description|scale|offset|unittype)"[^<>]*>[^<>]*</Item>'
)
ASCII = 2

# Extension of the place of a tile, beside its latent.
PLACE_FILE = "geo.json"

Tag = tuple[int, int, int, Any, bool]
"""As tifffile writes it: code, type, count, value, and that it is written once."""


@dataclass(frozen=True)
class Georeference:
    """Where a scene is, as tags of a GeoTIFF, and the value that stands for a missing one."""

    tags: tuple[Tag, ...]
    nodata: float | None

    def gaps(self, array: Array) -> NDArray[np.bool_]:
        """Find missing values of a scene, (H, W, C): also those that are not finite.

        A pixel of 8 bits is missing if all of its bands are.
        """
        return whole_pixels(array, find_missing(array, self.nodata))


@dataclass(frozen=True)
class Gaps:
    """Missing values of a scene: where they are, and what the file has there; (C, H, W) each."""

    missing: Tensor
    values: Tensor
    nodata: float | None

    def restore(self, image: Tensor, pixel_range: PixelRange) -> Tensor:
        """Put them back into an image of real values.

        A value that is there, and equals the one that stands for missing ones, is raised by a
        millionth of the range.
        """
        if self.nodata is not None and not pixel_range.eight_bits:
            span = torch.tensor(pixel_range.high) - torch.tensor(pixel_range.low)
            image = torch.where(image == self.nodata, image + 1e-6 * span[:, None, None], image)
        return torch.where(self.missing, self.values.to(image.dtype), image)


def fill(values: Array, missing: NDArray[np.bool_], pixel_range: PixelRange) -> None:
    """Set missing values, (H, W, C), to the lowest ones in the range that their type can hold."""
    if not missing.any():
        return
    low = np.array(pixel_range.low)
    if values.dtype.kind != "f":
        limits = np.iinfo(values.dtype)  # type: ignore[type-var]
        low = np.ceil(low).clip(limits.min, limits.max)
    np.copyto(values, low.astype(values.dtype), where=missing)


def filled_picture(
    array: Array, georeference: Georeference, pixel_range: PixelRange
) -> tuple[Tensor, Gaps]:
    """Turn a scene's values, (H, W, C), into an image, and its gaps. Raises ValueError."""
    missing = georeference.gaps(array)
    stored = np.moveaxis(array, -1, 0).astype(np.float32)
    places = np.ascontiguousarray(np.moveaxis(missing, -1, 0))
    gaps = Gaps(torch.from_numpy(places), torch.from_numpy(stored), georeference.nodata)
    array = array.copy()
    fill(array, missing, pixel_range)
    return image_to_tensor(stated_picture(array, replace(pixel_range, nodata=None))), gaps


def byte_gaps(image: Tensor, nodata: float | None) -> Gaps:
    """The gaps of an image of 8 bits, (C, H, W): pixels that have no data in any channel."""
    missing = torch.zeros_like(image, dtype=torch.bool)
    if nodata is not None:
        missing = (image == nodata).all(0).expand_as(image)
    return Gaps(missing, image, nodata)


def read_scene(
    path: Path, channels: int, pixel_range: PixelRange, georeference: Georeference | None
) -> tuple[Tensor, Gaps | None]:
    """Read a whole picture, (C, H, W), and, of a GeoTIFF, its gaps. Raises UnreadableImageError."""
    if georeference is None:
        return image_to_tensor(read_picture(path, channels, pixel_range)), None
    if pixel_range.eight_bits:
        image = image_to_tensor(read_picture(path, channels))
        return image, byte_gaps(image, georeference.nodata)
    try:
        array = read_array(path, channels).array
        return filled_picture(array, georeference, pixel_range)
    except Exception as error:  # decoders raise all kinds for a broken file
        raise UnreadableImageError(legible(str(path)), reason(error)) from error


def read_georeference(path: Path, pixel_range: PixelRange) -> Georeference | None:
    """Find where a GeoTIFF is, or another raster of rasterio with coordinates; None for others.

    A TIFF that only names its missing value has a georeference too.
    """
    import tifffile

    try:
        driver = raster_driver(path)
        if driver is not None:
            with open_dataset(path, driver) as dataset:
                if dataset.crs is None:
                    return None
                nodata = None if dataset.driver == ZARR else dataset.nodata
                tags = tags_of(dataset.crs, dataset.transform, nodata, dataset.descriptions)
        else:
            with tifffile.TiffFile(path) as tiff:
                tags = kept_tags(tiff.pages.first.tags.values())
    except Exception:  # read_picture says what is wrong
        return None
    return with_nodata(tags, pixel_range)


def with_nodata(tags: Iterable[Tag], pixel_range: PixelRange) -> Georeference | None:
    """Make a georeference of tags, if they give a place or the value of missing ones.

    The range's own missing value replaces the file's.
    """
    tags = list(tags)
    nodata = pixel_range.nodata
    for code, *_, value, _ in tags:
        if code == NODATA and nodata is None:
            try:
                nodata = float(value)
            except ValueError:
                nodata = None
    if not {GEO_KEYS, NODATA} & {tag[0] for tag in tags}:
        return None
    others = [tag for tag in tags if tag[0] != NODATA]
    if nodata is not None:
        text = "nan" if math.isnan(nodata) else f"{nodata:.17g}"
        others.append((NODATA, ASCII, len(text) + 1, text, True))
    return Georeference(tuple(others), nodata)


def kept_tags(tags: Iterable[Any]) -> list[Tag]:
    """Take the tags that stay true of a result: its place, names of bands, the missing value."""
    kept: list[Tag] = []
    for tag in tags:
        if tag.code in PLACE or tag.code == NODATA:
            kept.append((tag.code, int(tag.dtype), tag.count, tag.value, True))
        elif tag.code == METADATA:
            items = KEPT_ITEMS.findall(str(tag.value))
            if items:
                text = f"<GDALMetadata>{''.join(items)}</GDALMetadata>"
                kept.append((METADATA, ASCII, len(text) + 1, text, True))
    return kept


def tags_of(
    crs: Any, transform: Any, nodata: float | None, names: Sequence[str | None]
) -> list[Tag]:
    """Write as tags where a raster is, in rasterio's terms; ``names`` are of its bands."""
    import tifffile

    rasterio = import_rasterio("writing a GeoTIFF")
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver=GEOTIFF,
            width=1,
            height=1,
            count=len(names),
            dtype="float32",
            crs=crs,
            transform=transform,
            nodata=nodata,
        ) as file:
            file.descriptions = names
        content = memory.read()
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        return kept_tags(tiff.pages.first.tags.values())


def describe_place(scene: Scene, top: int, left: int) -> bytes:
    """Describe as JSON where a tile of a scene is; empty if the scene has no coordinates.

    The file has ``crs`` as WKT, ``transform`` as GDAL's six numbers, ``nodata``, and the names of
    ``bands``.
    """
    dataset = scene.opened()
    if dataset.crs is None:
        return b""
    # The tile's first corner takes the place of the scene's.
    a, b, c, d, e, f = dataset.transform[:6]
    x = c + a * left + b * top
    y = f + d * left + e * top
    nodata = dataset.nodata
    place = {
        "crs": dataset.crs.to_wkt(),
        "transform": (x, a, b, y, d, e),
        "nodata": None if nodata is None else str(nodata),
        "bands": [dataset.descriptions[band] for band in scene.bands],
    }
    return json.dumps(place).encode()


def tags_from(content: bytes, enlarge: int = 1) -> list[Tag]:
    """Read what :func:`describe_place` wrote, as tags of a GeoTIFF.

    ``enlarge``: pixels of the GeoTIFF for one of the described place, along each side.
    Raises ValueError: it is something else. ConfigError: rasterio is missing.
    """
    rasterio = import_rasterio("writing a GeoTIFF")
    try:
        place = json.loads(content)
        left, *across, top, right, down = (float(number) for number in place["transform"])
        steps = [step / enlarge for step in (*across, right, down)]
        transform = rasterio.Affine.from_gdal(left, *steps[:2], top, *steps[2:])
        # A decoded tile has no missing values.
        return tags_of(place["crs"], transform, None, place["bands"])
    except Exception as error:  # GDAL raises all kinds
        raise ValueError(f"{PLACE_FILE} does not say where it is: {reason(error)}") from error
