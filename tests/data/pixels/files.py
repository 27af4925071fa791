"""Files of arrays, written by the libraries whose formats they are."""

import io
from pathlib import Path

import imagecodecs
import numpy as np
import OpenEXR
import tifffile


def values(
    kind: str, channels: int = 3, size: tuple[int, int] = (20, 24), seed: int = 0
) -> np.ndarray:
    """Noise over what the dtype holds, (H, W, C); floats are in 0..1000, halves exact."""
    rng = np.random.default_rng(seed)
    if kind.startswith("float"):
        return (1000 * rng.random((*size, channels))).astype(np.float16).astype(kind)
    info = np.iinfo(kind)
    return rng.integers(info.min, info.max + 1, (*size, channels)).astype(kind)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(array: np.ndarray, **more: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, array, **more)
    return stream.getvalue()


def png(array: np.ndarray) -> bytes:
    return imagecodecs.png_encode(np.ascontiguousarray(array.squeeze()))


def tiff(array: np.ndarray, photometric: str = "minisblack", **options: object) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, photometric=photometric, **options)
    return stream.getvalue()


def tiff_of_pages(pages: np.ndarray) -> bytes:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for page in pages:
            writer.write(page)
    return stream.getvalue()


def exr(channels: dict[str, np.ndarray], path: Path) -> bytes:
    OpenEXR.File(
        {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, channels
    ).write(str(path))
    return path.read_bytes()
