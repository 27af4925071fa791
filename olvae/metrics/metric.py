"""The contract of a metric: update, merge, compute; sets of metrics; PSNR, L1, SSIM, MS-SSIM."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.devices import full_float32
from olvae.modules.mixed_precision import in_float64
from olvae.pretrained_networks import WeightsFile

# SSIM's windows and sigma in pixels, and two constants against divisions by 0 [Wang et al. 2004].
SSIM_WINDOW = 11
SIGMA = 1.5
UNIFORM_WINDOW = 7
SAMPLE = UNIFORM_WINDOW**2 / (UNIFORM_WINDOW**2 - 1)  # makes means of products sample covariances
C1 = (0.01 * 255) ** 2
C2 = (0.03 * 255) ** 2
SSIM_TILE = 256  # pixels along a side of a tile that is filtered at a time
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM [Wang et al. 2003]


class Unavailable(ValueError):  # noqa: N818  (a state of the data, with the reason)
    """A metric can't be computed from these images, and why; other metrics can."""


@dataclass(frozen=True)
class Kind:
    """Name, label and needs of a metric."""

    name: str  # in commands and files
    label: str  # the heading of its column, with the unit
    better: Literal["higher", "lower"]  # values
    needs: WeightsFile | None = None  # the file of pretrained weights
    digits: int = 3  # decimals in tables


class Metric(ABC):
    """Compares images with one target's reconstructions of them, batch by batch.

    Images are identified by keys, and a key counts once. So the batch size, the order, and images
    that two processes both saw make no difference. To join two processes, ``merge`` in one each of
    the ``states`` of the other; merging twice does no harm.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        # What the value depends on, for JSON; "warning" is for the reader.
        self.details: dict[str, object] = {}

    @abstractmethod
    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Add images and their reconstructions, with their B keys.

        Both are levels (B, C, H, W), on any device: uint8 or, for images with more than 8 bits,
        float32 in 0..255.

        Raise Unavailable for a size or number of channels that the metric is not defined for.
        """

    @abstractmethod
    def states(self) -> Iterator[Any]:
        """Yield everything accumulated, in parts to be pickled and merged elsewhere; not copies.

        What is large comes in parts of bounded size, and only once: metrics share it.
        """

    @abstractmethod
    def merge(self, state: Any) -> None:
        """Add one of the :meth:`states` of the same metric in another process."""

    @abstractmethod
    def compute(self) -> float:
        """Return the value over all images, and complete ``details``.

        PSNR is infinite if each image equals its reconstruction.

        Raise Unavailable if there are too few images.
        """

    def per_image(self) -> Mapping[str, float] | None:
        """Return the values by key; None if the metric compares whole sets."""
        return None


class PerImage(Metric):
    """The mean over images of a function of each pair, exactly rounded.

    Without infinite values (PSNR of equal images). ``compare`` maps x and y, levels (B, C, H, W) on
    the device, to one value per pair (B,).
    """

    def __init__(
        self,
        kind: Kind,
        compare: Callable[[Tensor, Tensor], Tensor],
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(kind)
        self._compare = compare
        self._device = torch.device(device)
        self._values: dict[str, float] = {}

    @torch.no_grad()
    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        check_pairs(keys, x, y)
        x, y = x.to(self._device), y.to(self._device)
        with full_float32(x):
            values = in_float64(self._compare(x, y)).tolist()
        self._add(zip(keys, values, strict=True))

    def states(self) -> Iterator[dict[str, float]]:
        yield self._values

    def merge(self, state: Mapping[str, float]) -> None:
        self._add(state.items())

    def compute(self) -> float:
        if not self._values:
            raise Unavailable(f"{self.kind.name} needs an image, got none")
        finite = [value for value in self._values.values() if value != math.inf]
        equal = len(self._values) - len(finite)
        if equal:
            self.details["equal_images"] = equal
        if not finite:
            return math.inf
        # fsum rounds once, whatever the order.
        return math.fsum(finite) / len(finite)

    def per_image(self) -> dict[str, float]:
        return self._values

    def _add(self, values: Iterable[tuple[str, float]]) -> None:
        for key, value in values:
            # The same pair may be rounded differently in another batch, or on another device.
            known = self._values.setdefault(key, value)
            same = math.isclose(known, value, rel_tol=1e-3, abs_tol=1e-5)
            if not (same or (math.isnan(known) and math.isnan(value))):
                differ = f"{self.kind.name} {known:.6g} and {value:.6g}"
                raise ValueError(
                    f"two different pairs of images have the key {key!r} ({differ}): "
                    "give each its own"
                )


class MetricSet:
    """Several metrics of one target, and why some of them have no value.

    A metric that raises :class:`Unavailable` is dropped, in every process once they are merged.
    ``skipped`` has the reason by name; at first for the metrics that could not be made.
    """

    def __init__(
        self, metrics: Mapping[str, Metric], skipped: Mapping[str, str] | None = None
    ) -> None:
        self.metrics = dict(metrics)
        self.skipped = dict(skipped or {})

    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Add images and their reconstructions; see :meth:`Metric.update`."""
        # A list, as metrics may be dropped meanwhile.
        for name, metric in list(self.metrics.items()):
            try:
                metric.update(keys, x, y)
            except Unavailable as reason:
                self._drop(name, str(reason))

    def per_image(self) -> dict[str, Mapping[str, float]]:
        """Return the values by key, for each metric that compares single images, by its name."""
        found = {name: metric.per_image() for name, metric in self.metrics.items()}
        return {name: values for name, values in found.items() if values is not None}

    def states(self) -> Iterator[Any]:
        """See :meth:`Metric.states`."""
        yield self.skipped, {}
        for name, metric in self.metrics.items():
            for state in metric.states():
                yield {}, {name: state}

    def merge(self, state: Any) -> None:
        """Add one of the :meth:`states` of the same metrics in another process."""
        skipped, states = state
        for name, reason in list(skipped.items()):
            self._drop(name, reason)
        for name, content in states.items():
            if name in self.metrics:
                self.metrics[name].merge(content)

    def compute(self) -> dict[str, float]:
        """Return the values by name, maybe infinite.

        Metrics without a value are dropped, with the reason in ``skipped``.
        """
        values = {}
        for name, metric in list(self.metrics.items()):
            try:
                value = metric.compute()
                if math.isnan(value):
                    raise Unavailable("not a number")
                values[name] = value
            except Unavailable as reason:
                self._drop(name, str(reason))
        return values

    def _drop(self, name: str, reason: str) -> None:
        self.metrics.pop(name, None)
        self.skipped[name] = reason


def check_pairs(keys: Sequence[str], x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless x and y are levels of one shape (B, C, H, W), with B keys."""
    levels = x.dtype == y.dtype and x.dtype in (torch.uint8, torch.float32)
    if not levels or x.ndim != 4 or x.shape != y.shape or len(keys) != len(x):
        raise ValueError(
            "metrics compare uint8 or float32 images of one shape (B, C, H, W), with B keys: "
            f"got {x.dtype} {tuple(x.shape)}, {y.dtype} {tuple(y.shape)} and {len(keys)} keys"
        )


# Comparisons of pairs of images, levels in 0..255: uint8, or float32 for more than 8 bits. They
# compute in float64, on the CPU where the images' device has none.


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR of each image in dB, infinite for equal ones: levels (B, C, H, W) twice -> float64 (B,).

    10 log10(255^2 / mean squared error over the image).
    """
    # 64 rows at a time, so that large images need little memory; sums of integers are exact.
    exact = Tensor.int if x.dtype == torch.uint8 else in_float64
    errors = [
        (exact(a) - exact(b)).square().flatten(1).sum(1)
        for a, b in zip(x.split(64, 2), y.split(64, 2), strict=True)
    ]
    error = torch.stack(errors).sum(0)
    return 10.0 * (255.0**2 / (in_float64(error) / x[0].numel())).log10()


def mean_absolute_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean of |x - y| / 255 over each image: levels (B, C, H, W) twice -> float64 (B,)."""
    return (in_float64(x) - in_float64(y)).abs().flatten(1).mean(1) / 255.0


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each image: levels (B, C, H, W) twice, of at least 11 pixels -> float64 (B,).

    Gaussian window of 11 pixels, sigma 1.5, K 0.01 and 0.03, range 255, mean over channels and over
    the positions where the window fits, as scikit-image's and the paper's.
    """
    _check_size("SSIM", x, SSIM_WINDOW)
    return _similarity(x, y)[0]


def ssim_uniform(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each image as by default in scikit-image, otherwise as :func:`ssim`.

    A uniform window of 7 pixels, sample covariances.
    """
    _check_size("SSIM", x, UNIFORM_WINDOW)
    return _similarity(x, y, uniform=True)[0]


def _similarity(x: Tensor, y: Tensor, uniform: bool = False) -> Tensor:
    """Return means of SSIM and of its contrast term where the window fits, float64 (2, B).

    Levels (B, C, H, W) twice. In float64: a variance is a small difference of large squares, which
    in float32 loses up to 1e-3 of bright images.
    """
    sums = torch.zeros((), dtype=torch.double)
    border = (UNIFORM_WINDOW if uniform else SSIM_WINDOW) - 1
    # Positions where the window fits.
    height = x.shape[-2] - border
    width = x.shape[-1] - border
    # The filters are matrices, as wide as a tile, so tiles have to be small. They overlap by the
    # border: each position is in one of them.
    step = SSIM_TILE - border
    for top in range(0, height, step):
        for left in range(0, width, step):
            tile = ..., slice(top, top + SSIM_TILE), slice(left, left + SSIM_TILE)
            a, b = in_float64(x[tile]), in_float64(y[tile])

            # Both, their squares and their product, averaged under the window at each position.
            products = torch.stack([a, b, a * a, b * b, a * b])  # (5, B, C, H, W)
            if uniform:
                planes = F.avg_pool2d(products.flatten(0, 2), UNIFORM_WINDOW, stride=1)
                averages = planes.unflatten(0, products.shape[:3])
            else:
                rows = _windows(a.shape[-2], a.device)
                columns = _windows(a.shape[-1], a.device)
                averages = rows @ products @ columns.T
            mean_a, mean_b, aa, bb, ab = averages  # (5, B, C, H - border, W - border)

            covariance = ab - mean_a * mean_b
            variances = (aa - mean_a**2) + (bb - mean_b**2)
            if uniform:
                covariance *= SAMPLE
                variances *= SAMPLE
            contrast = (2 * covariance + C2) / (variances + C2)
            del covariance, variances  # large, and of no use below
            luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
            sums = sums + torch.stack([luminance * contrast, contrast]).flatten(2).sum(2)
    return sums / (x.shape[1] * height * width)


def _windows(side: int, device: torch.device) -> Tensor:
    """Return the Gaussian window at each position where it fits: (side - 10, side)."""
    places = torch.arange(side, device=device)
    from_centre = places - places[: side - SSIM_WINDOW + 1, None] - SSIM_WINDOW // 2
    inside = from_centre.abs() <= SSIM_WINDOW // 2
    weights = (-0.5 * (from_centre.double() / SIGMA) ** 2).exp() * inside
    return weights / weights.sum(1, keepdim=True)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM of each image by torchmetrics' definition: levels (B, C, H, W) twice -> (B,).

    Sides of at least 176 pixels, range 255, the paper's five weights, the window of :func:`ssim`.
    Each scale averages 2x2 pixels of the one before. The first four give their contrast term,
    averaged over channels and over the positions where the window fits. The last gives its SSIM,
    averaged over all positions, with the image reflected at its border. A negative mean counts
    as 0.
    """
    # After four halvings the window still fits.
    _check_size("MS-SSIM with five scales", x, SSIM_WINDOW * 2**4)
    x, y = in_float64(x), in_float64(y)
    found = torch.ones(len(x), dtype=torch.double, device=x.device)
    for weight in MS_SSIM_WEIGHTS[:-1]:
        found *= _similarity(x, y)[1].relu() ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)

    border = 4 * [SSIM_WINDOW // 2]
    x, y = F.pad(x, border, mode="reflect"), F.pad(y, border, mode="reflect")
    return found * _similarity(x, y)[0].relu() ** MS_SSIM_WEIGHTS[-1]


def _check_size(name: str, x: Tensor, least: int) -> None:
    if min(x.shape[-2:]) < least:
        raise Unavailable(
            f"{name} needs images of at least {least} pixels, got {tuple(x.shape[-2:])}"
        )
