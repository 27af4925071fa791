"""Observe images that are not 8-bit RGB: errors in real values, PSNR of transparent images."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from olvae.evaluation.cells import significant
from olvae.evaluation.observers.observer import Observation, PerImageObserver
from olvae.evaluation.results import Row
from olvae.losses.objective import over
from olvae.modules.mixed_precision import in_float64

SPECTRAL = 4  # channels from which a pixel has a spectrum
BACKGROUNDS = {"black": -1.0, "grey": 0.0, "white": 1.0}


class RealValues(PerImageObserver):
    """Errors of images with a stated range, in their values' units; nothing for images of 8 bits.

    An entry has, over all values of all images: ``rmse`` and ``mae``, one per channel;
    ``relative``, the mean of |y - x| / x over values above 0, where a range begins above or at 0;
    ``spectral_angle``, the mean angle in degrees between a pixel's values and its reconstruction's,
    from four channels on, where both are not 0. Reconstructions are clamped to the range.
    """

    name = "real_values"

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        pixels = batch.pixel_range
        if pixels.eight_bits:
            return None
        x = in_float64(pixels.real(batch.x))
        y = in_float64(pixels.real(batch.y))
        error = y - x
        squares = error.square().mean((2, 3))  # (B, C)
        sizes = error.abs().mean((2, 3))

        # Sums and numbers of values, (B, 2); both 0 where they are not measured.
        relative = angles = x.new_zeros(len(x), 2)
        if min(pixels.low) >= 0:
            relative = _mean(error.abs() / x.clamp_min(1e-300), x > 0)
        if x.shape[1] >= SPECTRAL:
            # The spectral angle of Kruse et al. 1993; norms and cosines are (B, H, W).
            norms = x.norm(dim=1) * y.norm(dim=1)
            cosines = ((x * y).sum(1) / norms.clamp_min(1e-300)).clamp(-1.0, 1.0)
            angles = _mean(cosines.acos().rad2deg(), norms > 0)
        return zip(*(t.tolist() for t in (squares, sizes, relative, angles)), strict=True)

    def summarise(self, columns: Sequence[Any]) -> dict[str, Any]:
        squares, sizes, *means = columns
        mse = [math.fsum(channel) / len(channel) for channel in zip(*squares, strict=True)]
        mae = [math.fsum(channel) / len(channel) for channel in zip(*sizes, strict=True)]
        entry: dict[str, Any] = {"rmse": [math.sqrt(value) for value in mse], "mae": mae}
        for name, rows in zip(("relative", "spectral_angle"), means, strict=True):
            total, count = map(math.fsum, zip(*rows, strict=True))
            if count:
                entry[name] = total / count
        return entry

    def of_images(self, target: str, keys: Sequence[str]) -> Mapping[str, float]:
        rows = self._rows.get(target, {})
        known = [rows[key] for key in keys if key in rows]
        if not known:
            return {}
        entry = self.summarise(list(zip(*known, strict=True)))
        squares = math.fsum(value**2 for value in entry["rmse"]) / len(entry["rmse"])
        return {"rmse": math.sqrt(squares), "mae": math.fsum(entry["mae"]) / len(entry["mae"])}

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
            entry = row.observed.get(self.name)
            if entry and len(entry["rmse"]) > 1:
                yield f"{row.target}: RMSE per channel {', '.join(map(significant, entry['rmse']))}"


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Sum of each image's values and their number, (B, 2)."""
    sums = values.where(where, 0.0).flatten(1).sum(1)
    counts = where.flatten(1).sum(1).double()
    return torch.stack((sums, counts), dim=1)


class Transparency(PerImageObserver):
    """PSNR in dB of RGBA images of 8 bits over black, grey and white, and of alpha.

    Means over images, of a range of 255, unrounded after compositing. Equal ones count as 100 dB,
    because many images are opaque. Other images have no entry.
    """

    name = "transparency"

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        if batch.x.shape[1] != 4 or not batch.pixel_range.eight_bits:
            return None
        x = in_float64(batch.pixel_range.normalise(batch.x))
        y = in_float64(batch.pixel_range.normalise(batch.y))
        pairs = []
        for grey in BACKGROUNDS.values():
            paper = x.new_tensor(grey)
            pairs.append((over(x, paper), over(y, paper)))
        pairs.append((x[:, 3:], y[:, 3:]))
        errors = torch.stack([(a - b).square().flatten(1).mean(1) for a, b in pairs], dim=1)
        # In [-1, 1] the range is 2, so its square is 4.
        rows: list[Any] = (10.0 * (4.0 / errors.clamp_min(4e-10)).log10()).tolist()
        return rows

    def summarise(self, columns: Sequence[Any]) -> dict[str, float]:
        named = zip((*BACKGROUNDS, "alpha"), columns, strict=True)
        return {name: math.fsum(column) / len(column) for name, column in named}

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        cells = {}
        for name, value in entry.items():
            heading = name if name == "alpha" else f"over {name}"
            cells[heading] = f"{value:.2f}"
        return cells
