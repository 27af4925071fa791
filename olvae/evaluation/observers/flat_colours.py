"""Observe what becomes of constant colours: the grids that an autoencoder adds, which photographs hide."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from olvae.data.image import from_uint8, to_uint8
from olvae.data.source import Batch
from olvae.evaluation.cells import number, texts
from olvae.evaluation.html import Page
from olvae.evaluation.observers.observer import Conditions, Observer, Subject, Wrapper
from olvae.models.autoencoder import Autoencoder
from olvae.modules.precision import full_float32

GREYS = {"black": 0, "grey 64": 64, "grey 128": 128, "grey 192": 192, "white": 255}
HUES = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "yellow": (255, 255, 0),
}

TILES, SMALLEST = 16, 128
"""The side of an image of one colour, in latent positions, and at least in pixels: the inner half is far enough from
the border where networks are trained."""

AMPLIFIED = 64
"""The most that deviations are amplified in pictures."""

PATCH = 128
"""Screen pixels per side of a picture."""


@dataclass(frozen=True)
class Colour:
    """The reconstruction of an image of one colour. Numbers are in steps of 8-bit values, clamped but not rounded.

    The inner part is the image without a frame of a quarter of its size.

    Args:
        shift: the mean over the inner part minus the colour, per channel.
        amplitude: standard deviation over the inner part's positions, root mean square over channels.
        grid: the part of the amplitude that repeats every f pixels: the amplitude of the mean f x f tile.
        amplitude_with_border: the amplitude over the whole image.
        x, y: input and reconstruction, uint8 (C, H, W).
        deviation: reconstruction minus its mean over the inner part, float32 (C, H, W).
    """

    shift: list[float]
    amplitude: float
    grid: float
    amplitude_with_border: float
    x: Tensor
    y: Tensor
    deviation: Tensor

    @property
    def largest_shift(self) -> float:
        return max(self.shift, key=abs)

    def as_dict(self) -> dict[str, Any]:
        """The numbers for metrics.json; None where one is not finite."""
        amplitudes = {name: getattr(self, name) for name in ("amplitude", "grid", "amplitude_with_border")}
        return {
            "shift": [value if math.isfinite(value) else None for value in self.shift],
            **{name: value if math.isfinite(value) else None for name, value in amplitudes.items()},
        }


class FlatColours(Observer):
    """Reconstruct constant colours with every target in float32, and measure the deviation, as a grid and in all.

    An entry has the colours' ``size``, the ``period`` of the grid, both in pixels, the width of the ``frame`` outside
    the inner part, and the numbers of each of the ``colours``.
    """

    name = "test_patterns"
    title = "Artefacts on constant colours"

    def __init__(self) -> None:
        self._colours: dict[str, dict[str, Colour]] = {}  # by target
        self._periods: dict[str, int] = {}
        self._size = 0

    def examine(self, subjects: Mapping[str, Subject], conditions: Conditions) -> None:
        models = {
            name: subject.model
            for name, subject in subjects.items()
            if not subject.baseline and all(p.dtype == torch.float32 for p in subject.model.parameters())
        }
        if not models:
            return
        self._periods = {name: model.downscale for name, model in models.items()}
        self._size = colour_size(self._periods.values(), conditions.size)
        for name, model in models.items():
            wrap = conditions.progress("constant colours", shared=False)
            self._colours[name] = reconstruct_colours(model, self._size, conditions.device, conditions.batch_size, wrap)

    def result(self, target: str, draw: int) -> dict[str, Any] | None:
        if target not in self._colours:
            return None
        colours = {name: colour.as_dict() for name, colour in self._colours[target].items()}
        period = self._periods[target]
        return {"size": self._size, "period": period, "frame": _frame(self._size, period), "colours": colours}

    def section(self, page: Page) -> Markup | None:
        if not self._colours:
            return None
        side = min(PATCH // 2 if max(self._periods.values()) <= PATCH // 8 else PATCH, self._size)
        screen = side * max(1, PATCH // side)  # a whole multiple: other scaling would add a grid
        factor = amplification(self._colours.values())

        def picture(image: Tensor, alt: str, swatch: bool = False) -> Markup:
            style = "" if swatch else f"width: {screen}px; height: {screen}px"
            return page.picture(image[:, :side, :side], alt, style=style, swatch=swatch)

        return page.render(
            "flat_colours.html",
            summary=texts({target: _summary(colours.values()) for target, colours in self._colours.items()}),
            colours=self._colours,
            names=list(next(iter(self._colours.values()))),
            side=side,
            factor=factor,
            amplified=amplified,
            picture=picture,
        )


def colour_size(downscales: Iterable[int], largest: int) -> int:
    """The side in pixels of images of one colour, for all autoencoders that downscale by these factors.

    Args:
        largest: the side of the images that are evaluated, a multiple of every factor; colours are no larger.
    """
    factors = list(downscales)
    step = math.lcm(*factors)
    return min(-(-max(SMALLEST, TILES * max(factors)) // step) * step, largest)


@torch.inference_mode()
def reconstruct_colours(
    model: Autoencoder,
    size: int,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    wrap: Wrapper = lambda batches, _: batches,
) -> dict[str, Colour]:
    """Reconstruct constant colours from the posterior's mode, in full float32.

    If there are not three channels, the colours are greys and each channel alone.

    Args:
        model: in evaluation mode; it is moved to the device.
        size: side of the square images, in pixels; a multiple of the model's downscale factor f.
        wrap: gets the batches, to show progress.
    """
    assert size % model.downscale == 0
    images = _images(model.in_channels, size)
    names = list(images)
    batches = [
        Batch(image=torch.stack([images[name] for name in some]), key=some)
        for some in (names[i : i + batch_size] for i in range(0, len(names), batch_size))
    ]
    model.to(device)
    colours: dict[str, Colour] = {}
    for batch in wrap(batches, len(images)):
        x = from_uint8(batch["image"].to(device))
        with full_float32(x):
            y = model.decode(model.encode(x).mode()).float().cpu()
        for key, image, reconstruction in zip(batch["key"], batch["image"], y, strict=True):
            colours[key] = _measure(image, reconstruction, model.downscale)
    return colours


def amplification(results: Iterable[Mapping[str, Colour]]) -> int:
    """The power of two, 64 at most, at which 99 % of the worst target's deviations stay within a picture's range.

    It is one factor for all targets, so that their pictures compare.
    """
    deviations = (np.concatenate([colour.deviation.flatten() for colour in found.values()]) for found in results)
    largest = max(float(np.quantile(np.abs(values), 0.99)) for values in deviations)
    factor = AMPLIFIED
    while factor > 1 and factor * largest > 127.0:
        factor //= 2
    return factor


def amplified(deviation: Tensor, factor: int) -> Tensor:
    """A deviation in steps of 8-bit values -> a picture, uint8; no deviation is grey 128."""
    return (128.0 + factor * deviation).round().clamp(0, 255).to(torch.uint8)


def _images(channels: int, size: int) -> dict[str, Tensor]:
    values = {name: (value,) * channels for name, value in GREYS.items()}
    if channels == 3:
        values |= HUES
    elif channels > 1:
        values |= {f"channel {i + 1}": tuple(255 * (i == j) for j in range(channels)) for i in range(channels)}
    return {
        name: torch.tensor(value, dtype=torch.uint8).view(-1, 1, 1).repeat(1, size, size)
        for name, value in values.items()
    }


def _frame(size: int, f: int) -> int:
    return size // (4 * f) * f


def _measure(x: Tensor, y: Tensor, f: int) -> Colour:
    values = (y.clamp(-1.0, 1.0) + 1.0) * 127.5  # (C, H, W) in 0..255
    frame = _frame(values.shape[-1], f)
    inner = slice(frame, values.shape[-1] - frame)
    inside = values[:, inner, inner].double()
    mean = inside.mean((1, 2))
    tile = inside.unfold(1, f, f).unfold(2, f, f).mean((1, 2))  # (C, f, f)
    return Colour(
        (mean - x[:, 0, 0]).tolist(),
        _amplitude(inside),
        _amplitude(tile),
        _amplitude(values.double()),
        x,
        to_uint8(y),
        values - mean.float().view(-1, 1, 1),
    )


def _amplitude(values: Tensor) -> float:
    """Standard deviation over positions, root mean square over channels."""
    return math.sqrt(values.var((1, 2), correction=0).mean())


def _summary(colours: Collection[Colour]) -> dict[str, str]:
    """Over all colours, cells by heading."""
    grids = [colour.grid for colour in colours]
    return {
        "grid, mean": number(sum(grids) / len(colours), 2),
        "grid, largest": number(max(grids), 2),
        "amplitude, mean": number(sum(colour.amplitude for colour in colours) / len(colours), 2),
        "with border, mean": number(sum(colour.amplitude_with_border for colour in colours) / len(colours), 2),
        "shift, largest": number(max(abs(colour.largest_shift) for colour in colours), 1),
    }
