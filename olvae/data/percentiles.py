"""Measure the values of a source's images: percentiles per channel, and a range to state by them."""

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

from olvae.config.reading import holds_shards
from olvae.data.image import Photo, image_to_tensor
from olvae.data.opening import open_images
from olvae.data.pixels.size_and_range import AS_STORED, EIGHT_BIT_FILE
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.shards.index import find_shards
from olvae.data.shards.tar_reading import Shard, read_shard

PERCENTILES = (0.0, 0.1, 1.0, 50.0, 99.0, 99.9, 100.0)
LOW, HIGH = 1, 5  # of these, the ends of the range that is proposed
VALUES_PER_IMAGE = 2**14  # of a channel


@dataclass
class Measured:
    """Values of a source."""

    images: int  # that were read
    kinds: Mapping[str, int]  # images by dtype
    percentiles: NDArray[np.float64]  # (channels, 7), those of PERCENTILES over finite values
    missing: float  # share of the values that are not finite, or that their file names as missing
    unreadable: list[ReadError] = field(default_factory=list)
    nodata: float | None = None  # the value that the files name as missing, if it is one

    def line(self) -> str:
        """``range: ...`` for a config: from the percentile .1 to 99.9, for all channels or each."""
        pairs = []
        for row in self.percentiles:
            low = float(max(_rounded(row[LOW], math.floor), row[0]))
            high = float(min(_rounded(row[HIGH], math.ceil), row[-1]))
            pairs.append([low, high if high > low else low + 1.0])
        nodata = "" if self.nodata is None else f", {yaml.safe_dump({'nodata': self.nodata}).strip()}"
        return f"range: {{pairs: {json.dumps(pairs if len(pairs) > 1 else pairs[0])}, outside: clip{nodata}}}"

    def table(self) -> Table:
        table = Table("channel", *(f"{p:g} %" for p in PERCENTILES), box=None)
        for number, row in enumerate(self.percentiles):
            table.add_row(str(number), *(f"{value:.5g}" for value in row))
        return table


def measure(src: str, images: int = 200) -> Measured:
    """Read up to ``images`` images, evenly spread or the first of shards, and some values of each.

    Raises ValueError: none can be read, all have 8 bits, or they differ in their number of channels.
    """
    kinds: Counter[str] = Counter()
    parts: list[NDArray[np.float64]] = []
    unreadable: list[ReadError] = []
    nodata: set[float] = set()
    for open_photo in _openers(src, images):
        if len(parts) == images:
            break
        try:
            photo = open_photo()
            values = image_to_tensor(photo.read()).flatten(1)  # (C, H W)
        except UnreadableImageError as error:
            unreadable.append(error.read_error())
            continue
        kinds[str(values.dtype).removeprefix("torch.")] += 1
        part = values[:, :: max(1, values.shape[1] // VALUES_PER_IMAGE)].double().numpy()
        part[photo.missing(part)] = np.nan
        nodata |= {value for value in (photo.nodata,) if value is not None and math.isfinite(value)}
        if parts and len(part) != len(parts[0]):
            raise ValueError(f"{photo.name}: {len(part)} channels, but those before it have {len(parts[0])}")
        parts.append(part)
    if not parts:
        reasons = "; ".join(f"{error.name}: {error.reason}" for error in unreadable[:1])
        raise ValueError(f"{src}: no images can be read{': ' if reasons else ''}{reasons}")
    if set(kinds) == {"uint8"}:
        raise ValueError(f"{src}: {EIGHT_BIT_FILE}")
    together = np.concatenate(parts, axis=1)
    finite = np.isfinite(together)
    if not finite.any(1).all():
        raise ValueError(f"{src}: channel {int(np.argmin(finite.any(1)))} has no finite values")
    rows = np.stack([np.percentile(row[good], PERCENTILES) for row, good in zip(together, finite, strict=True)])
    named = nodata.pop() if len(nodata) == 1 else None
    return Measured(len(parts), dict(kinds), rows, float(1.0 - finite.mean()), unreadable, named)


def _openers(src: str, count: int) -> Iterator[Callable[[], Photo]]:
    if holds_shards(src):
        entries = (entry for url in find_shards(src) for entry in read_shard(Shard(url)))
        return (partial(Photo, e.data, e.name, 0, AS_STORED) for e in entries if not isinstance(e, ReadError))
    found = open_images(src, 0, AS_STORED)
    numbers = {int(i) for i in np.linspace(0, len(found) - 1, min(count, len(found)))}
    return (partial(found.__getitem__, number) for number in sorted(numbers))


def _rounded(value: float, to: Any) -> float:
    """To four digits, outwards."""
    if value == 0.0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 3)
    return float(f"{to(value / step) * step:.6g}")
