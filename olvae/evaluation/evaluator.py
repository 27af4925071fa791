"""One pass over the test images for several contenders and protocols: reconstruct, compare, keep what is shown."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from olvae.data.source import Batch
from olvae.evaluation.bootstrap import pooled_psnr
from olvae.evaluation.processes import gather
from olvae.evaluation.protocol import Protocol
from olvae.evaluation.reconstruction import Reconstruct
from olvae.metrics.metric import Metric, Unavailable
from olvae.metrics.registry import MakeMetrics

__all__ = ["EQUAL", "Images", "Result", "Tally", "evaluate", "results"]

EQUAL = "infinite: an image is equal to its reconstruction to the pixel"


@dataclass(frozen=True)
class Result:
    """The metrics of one contender under one protocol.

    Args:
        target: the contender's name.
        n: images.
        metrics: values by name.
        skipped: for those that could not be had, the reason.
        details: by metric, what its number rests on.
        per_image: by metric, the images' values by key.
    """

    target: str
    n: int
    metrics: dict[str, float]
    skipped: dict[str, str]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_image: dict[str, dict[str, float]] = field(default_factory=dict)


class Images:
    """Which images they were: a digest of the pixels by key, and one of all that depends on no order."""

    def __init__(self) -> None:
        self.digests: dict[str, bytes] = {}

    def add(self, keys: Sequence[str], x: Tensor) -> None:
        for key, image in zip(keys, x, strict=True):
            self.digests[key] = hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes()).digest()

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(sorted(self.digests.values()))).hexdigest()


class Tally:
    """What is known of one contender: its metrics, and why some of them are not to be had.

    Args:
        metrics: fresh ones, by the names of their variants.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = dict(metrics)
        self.skipped: dict[str, str] = {}

    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        for name, metric in list(self.metrics.items()):
            try:
                metric.update(keys, x, y)
            except Unavailable as reason:
                self._drop(name, reason)

    def state(self) -> Any:
        return {name: metric.state() for name, metric in self.metrics.items()}, self.skipped

    def merge(self, state: Any) -> None:
        states, skipped = state
        for name, reason in skipped.items():
            self._drop(name, reason)
        for name, part in states.items():
            if name in self.metrics:
                self.metrics[name].merge(part)

    def _drop(self, name: str, reason: object) -> None:
        self.metrics.pop(name, None)
        self.skipped[name] = str(reason)


def evaluate(
    contenders: Mapping[str, Reconstruct],
    batches: Iterable[Batch],
    make: MakeMetrics,
    watch: Callable[[str, Sequence[str], Tensor, Tensor, Tally], None] | None = None,
) -> tuple[Images, dict[str, Tally]] | None:
    """Compare images with their reconstructions, for several contenders in one pass, on one or many processes.

    Args:
        contenders: names to functions that reconstruct.
        batches: of this process's share of the test images; each image has a key of its own.
        make: makes the metrics of a contender.
        watch: called after each batch of each contender with its name, keys, images, reconstructions and tally.

    Returns:
        What was seen, and each contender's tally, in the first process; None in the others.

    Raises:
        ValueError: there are no images.
    """
    images = Images()
    tallies = {name: Tally(make()) for name in contenders}
    for batch in batches:
        keys, x = batch["key"], batch["image"]
        images.add(keys, x)
        for name, reconstruct in contenders.items():
            y = reconstruct(keys, x)
            tallies[name].update(keys, x, y)
            if watch is not None:
                watch(name, keys, x, y, tallies[name])
    parts = gather((images.digests, {name: tally.state() for name, tally in tallies.items()}))
    if parts is None:
        return None
    for digests, states in parts:
        images.digests.update(digests)
        for name, state in states.items():
            tallies[name].merge(state)
    if not images.digests:
        raise ValueError("the test set has no images that can be read")
    return images, tallies


def results(
    tallies: Mapping[str, Tally], protocol: Protocol, names: Sequence[str], skipped: Mapping[str, str], n: int
) -> list[Result]:
    """Each contender's numbers under a protocol.

    Args:
        names: of metrics, in the order of the table.
        skipped: metrics that could not be made, by the names of their variants, with the reason.
        n: how many images there were.
    """
    found = []
    for target, tally in tallies.items():
        result = Result(target, n, {}, {})
        for name in names:
            variant = protocol.columns.get(name, name)
            metric = tally.metrics.get(variant)
            if metric is None:
                result.skipped[name] = tally.skipped.get(variant) or skipped[variant]
                continue
            try:
                value, values = metric.compute(), metric.per_image()
            except Unavailable as reason:
                result.skipped[name] = str(reason)
                continue
            if name == "psnr" and protocol.psnr == "pooled":
                assert values is not None
                value = float(pooled_psnr(np.array(list(values.values()))))
            if math.isinf(value):
                result.skipped[name] = EQUAL
            elif math.isnan(value):
                result.skipped[name] = "not a number"
            else:
                result.metrics[name] = value
                result.details[name] = metric.details()
            if values is not None:
                result.per_image[name] = values
        found.append(result)
    return found
