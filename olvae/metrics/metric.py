"""The contract of a metric (update, merge, compute), and the metrics of one target that are accumulated together."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from olvae.checkpoint import WeightsFile
from olvae.modules.precision import full_float32


class Unavailable(ValueError):  # noqa: N818  (a state of the data, with the reason)
    """This metric can't be computed from these images; the message says why. Other metrics can."""


@dataclass(frozen=True)
class Kind:
    """Name, label and needs of a metric.

    Args:
        name: in commands and files.
        label: the heading of its column, with the unit.
        better: which values are better.
        needs: the file of pretrained weights that it needs.
        digits: decimals shown in tables.
    """

    name: str
    label: str
    better: Literal["higher", "lower"]
    needs: WeightsFile | None = None
    digits: int = 3


class Metric(ABC):
    """Compares images with one target's reconstructions of them, batch by batch.

    Images are identified by keys, and a key counts once. So the batch size, the order, and images that two processes
    both saw make no difference. ``other.merge(metric.state())`` joins what two processes have; merging twice does no
    harm.

    Args:
        details: see :meth:`details`.
    """

    def __init__(self, kind: Kind, details: Mapping[str, object] | None = None) -> None:
        self.kind = kind
        self._details = dict(details or {})

    @abstractmethod
    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Add images and their reconstructions, B keys and twice uint8 (B, C, H, W), on any device.

        Raises:
            Unavailable: the metric is not defined for this size or number of channels.
            ValueError: x and y do not fit together.
        """

    @abstractmethod
    def state(self) -> Any:
        """Everything accumulated so far, to be pickled and merged in another process; not a copy."""

    @abstractmethod
    def merge(self, state: Any) -> None:
        """Add the :meth:`state` of the same metric in another process."""

    @abstractmethod
    def compute(self) -> float:
        """The value over all images; may be infinite (PSNR of equal images).

        Raises:
            Unavailable: there are too few images.
        """

    def details(self) -> dict[str, object]:
        """What the value depends on, ready for JSON; ``warning`` is a sentence for the reader. Call compute() first."""
        return self._details

    def per_image(self) -> dict[str, float] | None:
        """The values by key, sorted by key; None if the metric compares the whole sets."""
        return None

    def values(self, keys: Sequence[str]) -> list[float] | None:  # noqa: ARG002
        """The values of some images; None if the metric compares the whole sets."""
        return None


class PerImage(Metric):
    """The mean over images of a function of each pair, exactly rounded.

    Args:
        compare: maps x, y, uint8 (B, C, H, W), to one value per pair (B,).
        device: where it is computed.
    """

    def __init__(
        self,
        kind: Kind,
        compare: Callable[[Tensor, Tensor], Tensor],
        device: str | torch.device = "cpu",
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(kind, details)
        self._compare = compare
        self._device = torch.device(device)
        self._values: dict[str, float] = {}

    @torch.no_grad()
    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        check_pairs(keys, x, y)
        x, y = x.to(self._device), y.to(self._device)
        with full_float32(x):
            values = self._compare(x, y).double().tolist()
        for key, value in zip(keys, values, strict=True):
            self._add(key, value)

    def state(self) -> dict[str, float]:
        return self._values

    def merge(self, state: Mapping[str, float]) -> None:
        for key, value in state.items():
            self._add(key, value)

    def compute(self) -> float:
        if not self._values:
            raise Unavailable(f"{self.kind.name} needs an image, got none")
        return math.fsum(self._values.values()) / len(self._values)  # fsum rounds once, whatever the order

    def per_image(self) -> dict[str, float]:
        return dict(sorted(self._values.items()))

    def values(self, keys: Sequence[str]) -> list[float]:
        return [self._values[key] for key in keys]

    def _add(self, key: str, value: float) -> None:
        known = self._values.setdefault(key, value)
        if not math.isclose(known, value, rel_tol=1e-3, abs_tol=1e-5):  # the same pair, rounded twice
            raise ValueError(
                f"two different pairs of images have the key {key!r} ({self.kind.name} {known:.6g} and {value:.6g}): "
                "give each image its own"
            )


class MetricSet:
    """Several metrics of one target, and why some of them have no value.

    A metric that raises :class:`Unavailable` is dropped, in every process once they are merged. ``skipped`` has the
    reasons, at first those of metrics that could not be made.
    """

    def __init__(self, metrics: Mapping[str, Metric], skipped: Mapping[str, str] | None = None) -> None:
        self.metrics = dict(metrics)
        self.skipped = dict(skipped or {})

    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Add images and their reconstructions; see :meth:`Metric.update`."""
        for name, metric in list(self.metrics.items()):
            try:
                metric.update(keys, x, y)
            except Unavailable as reason:
                self._drop(name, str(reason))

    def values(self, keys: Sequence[str]) -> dict[str, list[float]]:
        """By metric of single images, its values of some."""
        found = {name: metric.values(keys) for name, metric in self.metrics.items()}
        return {name: values for name, values in found.items() if values is not None}

    def state(self) -> Any:
        """Everything accumulated so far, to be pickled and merged in another process; not a copy."""
        return {name: metric.state() for name, metric in self.metrics.items()}, self.skipped

    def merge(self, state: Any) -> None:
        """Add the :meth:`state` of the same metrics in another process."""
        states, skipped = state
        for name, reason in list(skipped.items()):
            self._drop(name, reason)
        for name, part in states.items():
            if name in self.metrics:
                self.metrics[name].merge(part)

    def compute(self) -> dict[str, float]:
        """The values by name, maybe infinite. Metrics without a value are dropped, with the reason in ``skipped``."""
        values = {}
        for name, metric in list(self.metrics.items()):
            try:
                value = metric.compute()
            except Unavailable as reason:
                self._drop(name, str(reason))
                continue
            if math.isnan(value):
                self._drop(name, "not a number")
            else:
                values[name] = value
        return values

    def _drop(self, name: str, reason: str) -> None:
        self.metrics.pop(name, None)
        self.skipped[name] = reason


def check_pairs(keys: Sequence[str], x: Tensor, y: Tensor) -> None:
    """Raises ValueError unless x and y are uint8 images of one shape (B, C, H, W), with B keys."""
    if x.dtype != torch.uint8 or y.dtype != torch.uint8:
        raise ValueError(f"metrics compare uint8 images, got {x.dtype} and {y.dtype}")
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"metrics compare images of one shape (B, C, H, W), got {tuple(x.shape)} and {tuple(y.shape)}")
    if len(keys) != x.shape[0]:
        raise ValueError(f"{len(keys)} keys for {x.shape[0]} images")
