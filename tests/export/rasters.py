"""Files of JPEG 2000 and Zarr, and what is opened of them."""

import json
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import rasterio

BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}


def jpeg_2000(path: Path, array: np.ndarray, tile: int = 64, **options: object) -> None:
    """Write (H, W, C) without loss, by GDAL."""
    height, width, channels = array.shape
    # Without this extension GDAL leaves the boxes out.
    boxed = path.with_suffix(".jp2")
    with rasterio.open(
        boxed,
        "w",
        driver="JP2OpenJPEG",
        width=width,
        height=height,
        count=channels,
        dtype=array.dtype,
        blockxsize=tile,
        blockysize=tile,
        quality="100",
        reversible="yes",
        **options,
    ) as file:
        file.write(np.moveaxis(array, -1, 0))
    boxed.rename(path)


def with_profile(path: Path, profile: bytes) -> None:
    """Put an ICC profile in the place of a JPEG 2000's number of colours."""
    content = path.read_bytes()
    header = content.index(b"jp2h") - 4
    colours = content.index(b"colr") - 4
    size = int.from_bytes(content[colours : colours + 4], "big")
    box = b"colr\2\0\0" + profile
    grown = 4 + len(box) - size
    whole = int.from_bytes(content[header : header + 4], "big") + grown
    path.write_bytes(
        content[:header]
        + whole.to_bytes(4, "big")
        + content[header + 4 : colours]
        + (4 + len(box)).to_bytes(4, "big")
        + box
        + content[colours + size :]
    )


def zarr(
    folder: Path, array: np.ndarray, chunks: tuple[int, ...], compressor: str = "zlib"
) -> None:
    """Write an array of Zarr's format 2 by hand, the last chunks filled up."""
    folder.mkdir()
    description = {
        "zarr_format": 2,
        "shape": array.shape,
        "chunks": chunks,
        "dtype": array.dtype.str,
        "compressor": BLOSC if compressor == "blosc" else {"id": compressor, "level": 1},
        "fill_value": 0,
        "filters": None,
        "order": "C",
    }
    (folder / ".zarray").write_text(json.dumps(description))
    counts = [-(-side // chunk) for side, chunk in zip(array.shape, chunks, strict=True)]
    for place in np.ndindex(*counts):
        corner = [number * chunk for number, chunk in zip(place, chunks, strict=True)]
        inside = tuple(slice(a, a + chunk) for a, chunk in zip(corner, chunks, strict=True))
        part = array[inside]
        whole = np.zeros(chunks, array.dtype)
        whole[tuple(map(slice, part.shape))] = part
        encode = getattr(imagecodecs, f"{compressor}_encode")
        (folder / ".".join(map(str, place))).write_bytes(encode(whole.tobytes()))


def note_results(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """Collect what a function of a module returns from now on."""
    function = getattr(module, name)
    results: list[Any] = []

    def note(*given: Any) -> Any:
        results.append(function(*given))
        return results[-1]

    monkeypatch.setattr(module, name, note)
    return results
