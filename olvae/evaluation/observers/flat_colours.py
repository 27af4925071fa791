"""Observe what becomes of constant colours: the grids that an autoencoder adds, which photographs hide."""

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from olvae.data.pixels.size_and_range import from_uint8
from olvae.evaluation.observers.observer import Observer, Subject
from olvae.evaluation.report import Page
from olvae.evaluation.results import number, texts
from olvae.models.autoencoder import Autoencoder
from olvae.modules.base import full_float32

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


class FlatColours(Observer):
    """Reconstruct constant colours with every target in float32, and measure the deviation, as a grid and in all.

    An entry has the colours' ``size``, the ``period`` of the grid, both in pixels, the width of the ``frame`` outside
    the inner part, and the numbers of each of the ``colours``: see :func:`reconstruct_colours`.
    """

    name = "test_patterns"
    title = "Artefacts on constant colours"

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] = {}  # by target

    def examine(self, subjects: Mapping[str, Subject], size: int, device: str) -> None:
        models = {
            name: subject.model
            for name, subject in subjects.items()
            if not subject.baseline
            and all(p.dtype == torch.float32 for p in subject.model.parameters())
        }
        size = colour_size([model.downscale for model in models.values()], size)
        for name, model in models.items():
            side = model.side or size  # the only one that it takes
            colours = reconstruct_colours(model, side, device)
            period = model.downscale
            self._entries[name] = {
                "size": side,
                "period": period,
                "frame": _frame(side, period),
                "colours": colours,
            }

    def result(self, target: str, draw: int) -> dict[str, Any] | None:
        return self._entries.get(target)

    def section(self, page: Page) -> Markup | None:
        summary = {
            target: _summary(entry["colours"].values()) for target, entry in self._entries.items()
        }
        caption = (
            "Reconstructions of single-colour images show any pattern that the autoencoder adds. Numbers are in steps "
            "of 8-bit values, over all colours: amplitude is the standard deviation over positions without the border, "
            "grid the part of it that repeats with every position of the latent, shift the largest change of a "
            "channel's mean."
        )
        return page.table(texts(summary), "artefacts", caption) or None


def colour_size(downscales: Sequence[int], largest: int) -> int:
    """The side in pixels of images of one colour, for all autoencoders that downscale by these factors.

    ``largest`` is the side of the images that are evaluated, a multiple of every factor; colours are no larger.
    """
    step = math.lcm(*downscales)
    return min(-(-max(SMALLEST, TILES * max(downscales, default=1)) // step) * step, largest)


@torch.inference_mode()
def reconstruct_colours(
    model: Autoencoder, size: int, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Reconstruct constant colours from the posterior's mode, in full float32, and measure the deviations.

    If there are not three channels, the colours are greys and each channel alone. The square images' side is a multiple
    of the model's factor f. The model is in evaluation mode; it is moved to the device.

    Returns:
        For each colour, in steps of 8-bit values, clamped but not rounded, None where one is not finite: ``shift``, the
        mean minus the colour, per channel; ``amplitude``, the standard deviation over positions, root mean square over
        channels; ``grid``, the part of it that repeats every f pixels: the amplitude of the mean f x f tile; all three
        without a frame of a quarter of the size; and ``amplitude_with_border``, over the whole image.
    """
    model.to(device)
    found: dict[str, dict[str, Any]] = {}
    for name, colour in _colours(model.in_channels).items():
        x = torch.tensor(colour, dtype=torch.uint8, device=device)[None, :, None, None]
        images = from_uint8(x.expand(-1, -1, size, size))
        with full_float32(images):
            y = model.decode(model.encode(images).mode()).float().cpu()
        values = (y.clamp(-1.0, 1.0) + 1.0) * 127.5  # (1, C, H, W) in 0..255
        found[name] = _measure(torch.tensor(colour), values[0].double(), model.downscale)
    return found


def _colours(channels: int) -> dict[str, tuple[int, ...]]:
    colours: dict[str, tuple[int, ...]] = {
        name: (value,) * channels for name, value in GREYS.items()
    }
    if channels == 3:
        colours |= HUES
    elif channels > 1:
        colours |= {
            f"channel {i + 1}": tuple(255 * (i == j) for j in range(channels))
            for i in range(channels)
        }
    return colours


def _frame(size: int, f: int) -> int:
    return size // (4 * f) * f


def _measure(colour: Tensor, image: Tensor, f: int) -> dict[str, Any]:
    frame = _frame(image.shape[-1], f)
    inner = slice(frame, image.shape[-1] - frame)
    inside = image[:, inner, inner]
    tile = inside.unfold(1, f, f).unfold(2, f, f).mean((1, 2))  # (C, f, f)
    amplitudes = {"amplitude": inside, "grid": tile, "amplitude_with_border": image}
    shift = (inside.mean((1, 2)) - colour).tolist()
    return {
        "shift": [value if math.isfinite(value) else None for value in shift],
        **{name: _amplitude(values) for name, values in amplitudes.items()},
    }


def _amplitude(values: Tensor) -> float | None:
    amplitude = math.sqrt(values.var((1, 2), correction=0).mean())
    return amplitude if math.isfinite(amplitude) else None


def _summary(colours: Collection[Mapping[str, Any]]) -> dict[str, str]:
    """Over all colours, cells by heading."""
    shifts = [abs(value) for colour in colours for value in colour["shift"] if value is not None]
    known = {
        name: [colour[name] for colour in colours if colour[name] is not None]
        for name in ("grid", "amplitude", "amplitude_with_border")
    }
    if not all((shifts, *known.values())):
        return {}
    return {
        "grid, mean": number(fmean(known["grid"]), 2),
        "grid, largest": number(max(known["grid"]), 2),
        "amplitude, mean": number(fmean(known["amplitude"]), 2),
        "with border, mean": number(fmean(known["amplitude_with_border"]), 2),
        "shift, largest": number(max(shifts), 1),
    }
