"""Observe texture: the distance of reconstructions in EfficientNet-Lite0's features."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from olvae.data.pixels.size_and_range import from_uint8
from olvae.devices import full_float32
from olvae.evaluation.cells import significant
from olvae.evaluation.observers.observer import Observation, Observer, PerImageObserver
from olvae.losses.perceptual import Lite0
from olvae.modules.frozen import installed_lite0

LITE0_SIZE = 16  # pixels of a side: at less, the last stage has no position


class Lite0Distance(PerImageObserver):
    """The mean over images of the perceptual loss :class:`~olvae.losses.perceptual.Lite0`.

    An entry has ``distance``. Images have 8 bits, three channels and 16 pixels or more. It is not
    LPIPS, and its values do not compare with it.
    """

    name = "lite0"

    def conflicts(
        self, targets: Sequence[str], metrics: Sequence[str], observers: Sequence[Observer]
    ) -> Iterator[str]:
        try:
            installed_lite0()
        except FileNotFoundError as error:
            yield f"`observe` lite0: {error}"

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        """The distance of each image."""
        _, channels, height, width = batch.x.shape
        if channels != 3 or min(height, width) < LITE0_SIZE or not batch.pixel_range.eight_bits:
            return None
        device = batch.latents.device
        distance = _network().to(device)
        rows: list[Any] = []
        for x, y in zip(batch.x.to(device), batch.y.to(device), strict=True):
            with full_float32(x):
                rows.append([distance(from_uint8(x[None]), from_uint8(y[None])).item()])
        return rows

    def summarise(self, columns: Sequence[Any]) -> dict[str, float]:
        (distances,) = columns
        return {"distance": math.fsum(distances) / len(distances)}

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        return {"Lite0": significant(entry["distance"])}


@cache
def _network() -> Lite0:
    return Lite0()
