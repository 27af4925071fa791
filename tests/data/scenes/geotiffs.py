"""Small scenes, written by rasterio: GeoTIFF and COG."""

from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

UTM = "EPSG:32632"
PLACE = from_origin(400_000, 5_100_000, 10, 10)


def geotiff(
    path: Path, array: np.ndarray, nodata: float | None = None, tile: int = 32, **options: object
) -> Path:
    """Write (H, W, C) at :data:`PLACE`, in tiles."""
    height, width, count = array.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {"driver": "GTiff", "tiled": True, "blockxsize": tile, "blockysize": tile}
    place = {"crs": UTM, "transform": PLACE, "nodata": nodata}
    size = {"width": width, "height": height, "count": count, "dtype": array.dtype}
    with rasterio.open(path, "w", **{**layout, **place, **size, **options}) as file:
        file.write(np.moveaxis(array, -1, 0), window=((0, height), (0, width)))
        file.descriptions = [f"band {number}" for number in range(count)]
    return path


def ground(seed: int, size: tuple[int, int] = (96, 130), channels: int = 4) -> np.ndarray:
    """Noise of 1 to 9999, uint16 (H, W, C): no 0, which stands for missing values."""
    return np.random.default_rng(seed).integers(1, 10_000, (*size, channels)).astype(np.uint16)
