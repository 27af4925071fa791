"""Measure the values of images, to choose `pixel_range`."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.table import Table

from olvae.data.image import Photo, image_to_tensor
from olvae.data.opening import open_images
from olvae.data.pixels.size_and_range import (
    AS_STORED,
    EIGHT_BIT_FILE,
)
from olvae.data.places import holds_shards
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.shards.index import find_shards
from olvae.data.shards.tar_reading import Shard, read_shard

PERCENTILES = (0.0, 0.1, 1.0, 50.0, 99.0, 99.9, 100.0)

LOW, HIGH = 1, 5  # indices in PERCENTILES of the ends of the range that is proposed

VALUES_PER_IMAGE = 2**14  # of a channel


@dataclass
class Measured:
    """Values of a source."""

    images: int  # that were read
    kinds: Mapping[str, int]  # images by dtype
    percentiles: NDArray[np.float64]  # (channels, 7): PERCENTILES of the finite values
    missing: float  # share of the values that are not finite, or that their file names as missing
    unreadable: list[ReadError] = field(default_factory=list)
    nodata: float | None = None  # the value that the files name as missing, if they name just one
    stack: str | None = None  # a file whose channels are pages, perhaps slices of a stack

    def line(self) -> str:
        """``range: ...`` for a config: from percentile .1 to 99.9, for all channels or each."""
        pairs = []
        for row in self.percentiles:
            # Rounding may lead beyond the values that there are.
            ends = np.array((_rounded(row[LOW], math.floor), _rounded(row[HIGH], math.ceil)))
            low, high = ends.clip(row[0], row[-1]).tolist()
            pairs.append([low, high if high > low else low + 1.0])
        stated = json.dumps(pairs if len(pairs) > 1 else pairs[0])
        nodata = ""
        if self.nodata is not None:
            nodata = f", {yaml.safe_dump({'nodata': self.nodata}).strip()}"
        return f"range: {{pairs: {stated}, outside: clip{nodata}}}"

    def table(self) -> Table:
        table = Table("channel", *(f"{p:g} %" for p in PERCENTILES), box=None)
        for number, row in enumerate(self.percentiles):
            table.add_row(str(number), *(f"{value:.5g}" for value in row))
        return table


def measure_range(src: str, images: int = 200) -> Measured:
    """Read up to ``images`` images, evenly spread or the first of shards, and some values of each.

    Raises ValueError: none can be read, all have 8 bits, or their numbers of channels differ.
    """
    kinds: Counter[str] = Counter()
    parts: list[NDArray[np.float64]] = []  # of each image (C, some values)
    unreadable: list[ReadError] = []
    nodata: set[float] = set()
    stack = None
    for open_photo in _openers(src, images):
        if len(parts) == images:
            break
        try:
            photo = open_photo()
            values = image_to_tensor(photo.read())  # (C, H, W)
        except UnreadableImageError as error:
            unreadable.append(error.read_error())
            continue
        if photo.pages:
            stack = photo.name
        kinds[str(values.dtype).removeprefix("torch.")] += 1

        # Every so many values of each channel; NaN where they are missing.
        step = max(1, values[0].numel() // VALUES_PER_IMAGE)
        while math.gcd(step, values.shape[-1]) > 1:  # or it would see the same columns in every row
            step += 1
        part = values.flatten(1)[:, ::step].double().numpy()
        part[photo.missing(part)] = np.nan
        if photo.nodata is not None and math.isfinite(photo.nodata):
            nodata.add(photo.nodata)
        if parts and len(part) != len(parts[0]):
            raise ValueError(
                f"{photo.name}: {len(part)} channels, but those before it have {len(parts[0])}"
            )
        parts.append(part)

    # Refuse a source without values to measure.
    if not parts:
        why = f": {unreadable[0].name}: {unreadable[0].reason}" if unreadable else ""
        raise ValueError(f"{src}: no images can be read{why}")
    if set(kinds) == {"uint8"}:
        raise ValueError(f"{src}: {EIGHT_BIT_FILE}")
    together = np.concatenate(parts, axis=1)  # (C, values of all images)
    finite = np.isfinite(together)
    if not finite.any(1).all():
        raise ValueError(f"{src}: channel {int(np.argmin(finite.any(1)))} has no finite values")

    # Percentiles of each channel.
    channels = zip(together, finite, strict=True)
    rows = np.stack([np.percentile(row[good], PERCENTILES) for row, good in channels])
    named = nodata.pop() if len(nodata) == 1 else None
    missing = float(1.0 - finite.mean())
    return Measured(len(parts), dict(kinds), rows, missing, unreadable, named, stack)


def _openers(src: str, count: int) -> Iterator[Callable[[], Photo]]:
    """Yield functions that open an image: each one of shards, else ``count`` evenly spread ones."""
    if holds_shards(src):
        for url in find_shards(src):
            for entry in read_shard(Shard(url)):
                if not isinstance(entry, ReadError):
                    yield partial(Photo, entry.data, entry.name, 0, AS_STORED)
        return
    found = open_images(src, 0, AS_STORED)
    numbers = {int(i) for i in np.linspace(0, len(found) - 1, min(count, len(found)))}
    for number in sorted(numbers):
        yield partial(found.__getitem__, number)


def _rounded(value: float, to: Any) -> float:
    """Round to four digits, by ``to``: math.floor or math.ceil, so that ranges grow."""
    if value == 0.0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 3)
    return float(f"{to(value / step) * step:.6g}")
