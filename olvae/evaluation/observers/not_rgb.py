"""Observe images that are not RGB of 8 bits: errors in real values, and PSNR of transparent ones over backgrounds."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from olvae.evaluation.observers.observer import Observation, PerImageObserver
from olvae.evaluation.results import Row, significant
from olvae.losses.objective import over

SPECTRAL = 4  # channels from which a pixel has a spectrum
BACKGROUNDS = {"black": -1.0, "grey": 0.0, "white": 1.0}


class RealValues(PerImageObserver):
    """Errors of images with a stated range, in their values' units; nothing for images of 8 bits.

    An entry has, over all values of all images: ``rmse`` and ``mae``, one per channel; ``relative``, the mean of
    |y - x| / x over values above 0, where a range begins above or at 0; ``spectral_angle``, the mean angle in degrees
    between a pixel's values and its reconstruction's, from four channels on, where both are not 0. Reconstructions are
    clamped to the range.
    """

    name = "real_values"

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        pixels = batch.pixel_range
        if pixels.eight_bits:
            return None
        x, y = (pixels.real(levels).double() for levels in (batch.x, batch.y))
        error = y - x
        squares, sizes = error.square().mean((2, 3)), error.abs().mean((2, 3))  # (B, C)
        relative = angles = x.new_zeros(len(x), 2)  # of no values
        if min(pixels.low) >= 0:
            relative = _mean(error.abs() / x.clamp_min(1e-300), x > 0)
        if x.shape[1] >= SPECTRAL:
            angles = _angles(x, y)
        return zip(*(t.tolist() for t in (squares, sizes, relative, angles)), strict=True)

    def summarise(self, columns: Sequence[Any]) -> dict[str, Any]:
        squares, sizes, *means = columns
        entry: dict[str, Any] = {
            "rmse": [
                math.sqrt(math.fsum(channel) / len(channel))
                for channel in zip(*squares, strict=True)
            ],
            "mae": [math.fsum(channel) / len(channel) for channel in zip(*sizes, strict=True)],
        }
        for name, rows in zip(("relative", "spectral_angle"), means, strict=True):
            if count := math.fsum(n for _, n in rows):
                entry[name] = math.fsum(total for total, _ in rows) / count
        return entry

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        rmse = math.sqrt(math.fsum(value**2 for value in entry["rmse"]) / len(entry["rmse"]))
        cells = {
            "RMSE": significant(rmse),
            "MAE": significant(math.fsum(entry["mae"]) / len(entry["mae"])),
        }
        if "relative" in entry:
            cells["relative"] = f"{significant(100 * entry['relative'])} %"
        if "spectral_angle" in entry:
            cells["angle"] = f"{significant(entry['spectral_angle'])}°"
        return cells

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            if (entry := row.observed.get(self.name)) and len(entry["rmse"]) > 1:
                yield f"{row.target}: RMSE per channel {', '.join(map(significant, entry['rmse']))}"


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Sum of each image's values and their number, (B, 2)."""
    return torch.stack(
        (values.where(where, 0.0).flatten(1).sum(1), where.flatten(1).sum(1).double()), dim=1
    )


def _angles(x: Tensor, y: Tensor) -> Tensor:
    """Spectral angle (Kruse et al. 1993) of pixels, in degrees: sum of each image, and number of pixels, (B, 2)."""
    norms = x.norm(dim=1) * y.norm(dim=1)  # (B, H, W)
    cosines = ((x * y).sum(1) / norms.clamp_min(1e-300)).clamp(-1.0, 1.0)
    return _mean(cosines.acos().rad2deg(), norms > 0)


class Transparency(PerImageObserver):
    """PSNR in dB of RGBA images of 8 bits over black, grey and white, and of alpha; nothing for other images.

    Means over images, of a range of 255, unrounded after compositing. Equal ones count as 100 dB, because many images
    are opaque.
    """

    name = "transparency"

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        if batch.x.shape[1] != 4 or not batch.pixel_range.eight_bits:
            return None
        x, y = (batch.pixel_range.normalise(levels).double() for levels in (batch.x, batch.y))
        pairs = [
            (over(x, x.new_tensor(grey)), over(y, x.new_tensor(grey)))
            for grey in BACKGROUNDS.values()
        ]
        errors = torch.stack(
            [(a - b).square().flatten(1).mean(1) for a, b in [*pairs, (x[:, 3:], y[:, 3:])]], dim=1
        )
        rows: list[Any] = (10.0 * (4.0 / errors.clamp_min(4e-10)).log10()).tolist()
        return rows

    def summarise(self, columns: Sequence[Any]) -> dict[str, float]:
        names = (*BACKGROUNDS, "alpha")
        return {
            name: math.fsum(column) / len(column)
            for name, column in zip(names, columns, strict=True)
        }

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        return {
            (name if name == "alpha" else f"over {name}"): f"{value:.2f}"
            for name, value in entry.items()
        }
