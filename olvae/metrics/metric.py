"""What every metric offers to an evaluation: accumulate, merge, compute."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from olvae.modules.precision import full_float32
from olvae.weights import WeightsFile

__all__ = ["Kind", "Metric", "PerImage", "Unavailable", "check_pairs"]

SAME = {"rel_tol": 1e-3, "abs_tol": 1e-5}
"""How far two values of one key may differ and still be one pair of images, rounded twice."""


class Unavailable(ValueError):  # noqa: N818  (a state of the data, with the reason)
    """This metric can't be had from these images, and the message says why; others can."""


@dataclass(frozen=True)
class Kind:
    """What is known of a metric before there are images.

    Args:
        name: in commands and files.
        label: the heading of a column, with the unit.
        better: whether higher or lower values are.
        needs: its file of pretrained weights.
        digits: decimals that are shown.
    """

    name: str
    label: str
    better: Literal["higher", "lower"]
    needs: WeightsFile | None = None
    digits: int = 3


class Metric(ABC):
    """Compares images with their reconstructions, batch by batch; of one contender.

    Images are known by their keys, and a key counts once: neither batches, nor their order, nor images that two
    processes saw make a difference. ``other.merge(metric.state())`` joins what two processes have; merging twice
    does no harm.
    """

    kind: Kind

    @abstractmethod
    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Take in images and reconstructions.

        Args:
            keys: of the B images.
            x, y: uint8 (B, C, H, W), on any device.

        Raises:
            Unavailable: images of this size or these channels can't be compared so.
            ValueError: x and y are no such pair.
        """

    @abstractmethod
    def state(self) -> Any:
        """All that was taken in, to be pickled and merged elsewhere; not a copy."""

    @abstractmethod
    def merge(self, state: Any) -> None:
        """Take in what another process took in: the :meth:`state` of a metric of the same kind."""

    @abstractmethod
    def compute(self) -> float:
        """The value over all images; infinite PSNR is ``math.inf``.

        Raises:
            Unavailable: there are too few images.
        """

    @abstractmethod
    def details(self) -> dict[str, object]:
        """What the number rests on, ready for JSON; ``warning`` is a sentence for the reader. After compute()."""

    def per_image(self) -> dict[str, float] | None:
        """The values by key, in the order of the keys; None if the metric is of the set as a whole."""
        return None


class PerImage(Metric):
    """The mean over images of a function of each pair, exactly rounded.

    Args:
        compare: from x, y, uint8 (B, C, H, W), to one value per pair (B,).
        device: where it is computed.
        details: see :meth:`Metric.details`.
    """

    def __init__(
        self,
        kind: Kind,
        compare: Callable[[Tensor, Tensor], Tensor],
        device: str | torch.device = "cpu",
        details: Mapping[str, object] | None = None,
    ) -> None:
        self.kind = kind
        self._compare = compare
        self._device = torch.device(device)
        self._details = dict(details or {})
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

    def details(self) -> dict[str, object]:
        return self._details

    def per_image(self) -> dict[str, float]:
        return dict(sorted(self._values.items()))

    def _add(self, key: str, value: float) -> None:
        known = self._values.setdefault(key, value)
        if not math.isclose(known, value, **SAME):
            raise ValueError(
                f"two different pairs of images have the key {key!r} ({self.kind.name} {known:.6g} and {value:.6g}): "
                "give each image its own"
            )


def check_pairs(keys: Sequence[str], x: Tensor, y: Tensor) -> None:
    """Raises ValueError unless x and y are uint8 images of one shape (B, C, H, W), with B keys."""
    if x.dtype != torch.uint8 or y.dtype != torch.uint8:
        raise ValueError(f"metrics compare uint8 images, got {x.dtype} and {y.dtype}")
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"metrics compare images of one shape (B, C, H, W), got {tuple(x.shape)} and {tuple(y.shape)}")
    if len(keys) != x.shape[0]:
        raise ValueError(f"{len(keys)} keys for {x.shape[0]} images")
